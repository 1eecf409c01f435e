"""What results.py and ablation.py share: kvplan commands whose finished outputs are kept in a work folder, in parallel processes."""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess


def parser(doc, work):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text")
    p.add_argument("--kvplan", default="build/release/cli/kvplan")
    p.add_argument("--model", default=".cache/model/SmolLM2-135M-Instruct.Q4_1.gguf")
    p.add_argument("--work", default=work)
    p.add_argument("--bits", default="2.25,3.25,4.25")
    p.add_argument("--jobs", type=int, default=1, help="processes at once, each with its share of the cores")
    for name, value in [("tokens", 65536), ("windows", 24), ("window", 1024)]:
        p.add_argument(f"--{name}", type=int, default=value)
    return p


def print_table(header, rows):
    print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def kl(candidate, digits=4):
    return f"{candidate['kl']['mean']:.{digits}f} ± {candidate['kl']['standard_error']:.{digits}f}"


class Measurement:
    def __init__(self, a):
        self.a, self.bits, self.work = a, [float(b) for b in a.bits.split(",")], pathlib.Path(a.work)
        self.threads = max(1, (os.cpu_count() or 1) // a.jobs)
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, *args):
        subprocess.run([self.a.kvplan, *map(str, args), "--threads", str(self.threads)], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(self.threads)})

    def parallel(self, calls):
        with concurrent.futures.ThreadPoolExecutor(self.a.jobs) as pool:
            list(pool.map(lambda call: self.run(*call), calls))

    def profile(self, name, text):
        folder, a = self.work / f"profile-{name}", self.a
        if (folder / "profile.json").exists():
            return folder
        shards = [self.work / f"profile-{name}-{i}-of-{a.jobs}" for i in range(a.jobs)]
        flags = ["--model", a.model, "--text", text, "--part", "0:0.5", "--tokens", a.tokens, "--window", a.window]
        if a.jobs == 1:
            self.run("profile", *flags, "--out", folder)
        else:
            self.parallel([["profile", *flags, "--shard", f"{i}/{a.jobs}", "--out", s] for i, s in enumerate(shards)
                           if not (s / "profile.json").exists()])
            self.run("merge", *shards, "--out", folder)
        return folder

    def plans(self, profile, wanted):
        """wanted: {key: (folder name, bits, flags)} -> {key: folder}"""
        folders = {key: self.work / name for key, (name, _, _) in wanted.items()}
        self.parallel([["plan", "--profile", profile, "--bits", bits, *flags, "--out", folders[key]]
                       for key, (_, bits, flags) in wanted.items() if not (folders[key] / "plan.json").exists()])
        return folders

    def validate(self, name, text, plans, baselines=(), window=None, windows=None):
        """Candidates by plan folder or baseline name, measured on the second half of the text."""
        a, plans = self.a, list(plans)
        chunks = [(plans[i::a.jobs], list(baselines)[i::a.jobs]) for i in range(min(a.jobs, len(plans)))]
        outs = [self.work / f"{name}-{i}-of-{len(chunks)}.json" for i in range(len(chunks))]
        self.parallel([["validate", "--model", a.model, "--text", text, "--part", "0.5:1", "--windows", windows or a.windows, "--window",
                        window or a.window, "--baselines", ",".join(b) or "none", "--out", out, "--plan", *p]
                       for (p, b), out in zip(chunks, outs) if not out.exists()])
        found = {}
        for (p, _), out in zip(chunks, outs):
            for c in json.loads(out.read_text())["candidates"]:
                of_plan = p[0] if c["name"] == "plan" else self.work / c["name"]
                found[of_plan if of_plan in p else c["name"]] = c
        return found
