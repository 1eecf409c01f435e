#!/usr/bin/env python3
"""Estimates of --dry-run beside what then happens: time, CPU time and memory of profile, validate, sweep and study.

  bench/estimates.py --kvplan build/release/cli/kvplan --model M --text T [--out FOLDER] [--only NAME...]

Prints a Markdown table (docs/doctor.md) and writes estimates.json. Other work on the machine stretches the time on the clock;
CPU time (of all threads together) shows the same comparison with less of that.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import time

CASES = {
    "profile, 4 x 512": ["profile", "--part", "0:0.5", "--window", 512, "--tokens", 2048],
    "profile, 8 x 1024": ["profile", "--part", "0:0.5", "--window", 1024, "--tokens", 8192],
    "validate, 4 x 512": ["validate", "--part", "0.5:1", "--window", 512, "--windows", 4],
    "validate, 4 x 1024, decode, no baselines": ["validate", "--part", "0.5:1", "--window", 1024, "--windows", 4, "--mode", "decode", "--baselines", "none"],
    "sweep, 4 configurations, 4 x 512": ["sweep", "--part", "0.5:1", "--window", 512, "--windows", 4, "--k-bits", "3,4", "--v-bits", "2,3"],
    "study E7, 4 x 512": ["study", "E7", "--part", "0.5:1", "--window", 512, "--windows", 4, "--tokens", 2048],
}


def run(command):
    """Standard output, seconds, CPU seconds and peak resident bytes."""
    begin = time.monotonic()
    child = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.stdout.read(), child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, command))}: {err}")
    return out, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kvplan", "model", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("estimates"), help="folder for profile, plan and results")
    parser.add_argument("--threads", type=int, default=0, help="of kvplan; 1 on a busy machine, where threads wait for each other")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name begins so")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    texts = ["--model", given.model, "--text", given.text, "--threads", given.threads, "--quiet"]
    profile, plan = given.out / "profile", given.out / "plan"
    if not profile.exists():
        run([given.kvplan, "profile", *texts, "--part", "0:0.5", "--window", 512, "--tokens", 2048, "--out", profile])
    if not plan.exists():
        run([given.kvplan, "plan", "--profile", profile, "--bits", 3.25, "--context", 1024, "--out", plan])
    rows = []
    for name, arguments in CASES.items():
        if given.only and not name.startswith(tuple(given.only)):
            continue
        out = given.out / "result"
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        command = [given.kvplan, *arguments, *texts, "--out", out] + (["--plan", plan] if arguments[0] == "validate" else [])
        estimate, took, *_ = run([*command, "--dry-run", "--json"])
        estimate = json.loads(estimate)
        _, seconds, cpu_seconds, memory = run(command)
        rows.append({"work": name, "estimate_took_seconds": took,
                     "seconds": [estimate["estimated_seconds"], seconds],
                     "cpu_seconds": [estimate["estimated_cpu_seconds"], cpu_seconds],
                     "memory_bytes": [estimate["estimated_memory_bytes"], memory]})
        print(json.dumps(rows[-1]), flush=True)
    (given.out / "estimates.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n| work | estimate took | time: estimated, taken | CPU time | peak memory |\n|---|---|---|---|---|")
    for row in rows:
        def pair(field, unit, scale=1.0):
            guess, found = (x / scale for x in row[field])
            return f"{guess:.0f}, {found:.0f} {unit} ({guess / found - 1:+.0%})"
        print(f"| {row['work']} | {row['estimate_took_seconds']:.0f} s | {pair('seconds', 's')} | {pair('cpu_seconds', 's')} | {pair('memory_bytes', 'MB', 1e6)} |")


if __name__ == "__main__":
    main()
