#!/usr/bin/env python3
"""A short run of every fuzzer (scripts/fuzz); longer ones are for people: scripts/fuzz --minutes 10."""
import json
import pathlib
import shutil
import subprocess
import sys
import unittest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 8  # of each target


class Fuzzers(unittest.TestCase):
    def test_find_nothing_in_a_short_run(self):
        if shutil.which("clang++-19") is None:
            self.skipTest("clang++-19 is not installed (scripts/setup --tests)")
        done = subprocess.run([REPOSITORY / "scripts/fuzz", "--seconds", str(SECONDS)], stdout=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout.splitlines()[-1], r"^fuzz: [5-9] targets, 0 findings$")


if __name__ == "__main__":
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=1).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len(result.failures) + len(result.errors)
    print(json.dumps({"passed": result.testsRun - failed - len(result.skipped), "failed": failed, "skipped": len(result.skipped)}))
    sys.exit(1 if failed else 0)
