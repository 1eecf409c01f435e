#!/usr/bin/env python3
"""Runs every test executable of a build folder and the command-line tests, adds up the counts.

  run_tests.py [--executables] BUILD_DIR [NAME_PART]      --executables: without the command-line tests

Last line: "N passed, N failed, N skipped". Exit status 1 if any test failed or no test ran.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile


def run_gtest(executable):
    """Counts of one GoogleTest executable; a crash counts as one failure."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "result.json"
        status = subprocess.run([executable, "--gtest_brief=1", f"--gtest_output=json:{result}"]).returncode
        if not result.exists():
            print(f"{executable.name}: ended with status {status} before its tests were done")
            return 0, 1, 0
        cases = [case for suite in json.loads(result.read_text())["testsuites"] for case in suite["testsuite"]]
    failed = sum("failures" in case for case in cases)
    skipped = sum(case["result"] == "SKIPPED" for case in cases)
    return len(cases) - failed - skipped, failed, skipped


def run_unittest(script, build):
    """Counts of one Python unittest file, from its machine-readable last line."""
    run = subprocess.run([sys.executable, script], env={**os.environ, "KVPLAN_BUILD": str(build)},
                         stdout=subprocess.PIPE, text=True)
    lines = run.stdout.strip().splitlines()
    try:
        counts = json.loads(lines[-1])
        return counts["passed"], counts["failed"], counts["skipped"]
    except (IndexError, ValueError, KeyError):
        print(f"{script.name}: ended with status {run.returncode} before its tests were done")
        return 0, 1, 0


def main():
    arguments = [a for a in sys.argv[1:] if a != "--executables"]
    build = pathlib.Path(arguments[0]).resolve()
    wanted = arguments[1] if len(arguments) > 1 else ""
    tests = pathlib.Path(__file__).resolve().parent.parent / "tests"
    total = [0, 0, 0]
    jobs = [(p.name, lambda p=p: run_gtest(p)) for p in sorted((build / "tests").glob("*_test"))]
    if "--executables" not in sys.argv:
        jobs += [(p.name, lambda p=p: run_unittest(p, build)) for p in sorted(tests.rglob("test_*.py"))]
    for name, job in jobs:
        if wanted not in name:
            continue
        counts = job()
        print(f"{name}: {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped", flush=True)
        total = [a + b for a, b in zip(total, counts)]
    print(f"{total[0]} passed, {total[1]} failed, {total[2]} skipped")
    sys.exit(1 if total[1] or not total[0] else 0)


if __name__ == "__main__":
    main()
