#!/usr/bin/env python3
"""What --dry-run estimates, on a tiny model: that it is there, grows with the work and leaves nothing behind. bench/estimates.py compares it with real runs."""
import json
import pathlib
import tempfile

from cli_test_case import CliTest, MODEL, PROFILE, TEXT, main, profile_args, run, setUpModule, tearDownModule  # noqa: F401

HELD_OUT = ["--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 64]
FIELDS = ("estimated_seconds", "estimated_cpu_seconds", "estimated_memory_bytes")
SCORED_CACHES = {"E3": 5, "E4": 7, "E5": 12, "E6": 1, "E7": 4, "E11": 2}  # studies/scored_caches.cpp


class Estimates(CliTest):
    def estimate(self, *args):
        before = set(pathlib.Path(tempfile.gettempdir()).glob("kvplan-[0-9]*"))
        found = json.loads(self.succeeds(*args, "--dry-run", "--json").stdout)
        self.assertEqual(set(pathlib.Path(tempfile.gettempdir()).glob("kvplan-[0-9]*")) - before, set(), "the measurement left files")
        for field in FIELDS:
            self.assertGreater(found[field], 0, field)
        return found

    def test_every_long_command(self):
        plan = self.plan("plan")
        out = self.folder / "out"
        commands = {"profile": profile_args(out), "validate": ["validate", *HELD_OUT, "--windows", 2, "--plan", plan, "--out", out],
                    "sweep": ["sweep", *HELD_OUT, "--windows", 2, "--k-bits", 3, "--v-bits", 3, "--out", out],
                    "study": ["study", "E7", *HELD_OUT, "--windows", 2, "--tokens", 256, "--out", out]}
        for name, args in commands.items():
            with self.subTest(command=name):
                self.assertEqual(self.estimate(*args)["command"], name)
                self.assertFalse(out.exists())

    def test_more_windows_and_candidates_take_longer(self):
        def cpu(*args):
            return self.estimate(*args)["estimated_cpu_seconds"]
        self.assertGreater(cpu(*profile_args(self.folder / "p", tokens=16384)), 2 * cpu(*profile_args(self.folder / "p", tokens=512)))
        validate = ["validate", *HELD_OUT, "--plan", self.plan("plan"), "--out", self.folder / "v"]
        few = self.estimate(*validate, "--windows", 1, "--baselines", "none")
        many = self.estimate(*validate, "--windows", 100, "--baselines", "turboquant:2,turboquant:3,turboquant:4,int:3,int:4,int:5")
        self.assertEqual([(found["windows"], found["candidates"]) for found in (few, many)], [(1, 2), (100, 8)])
        self.assertGreater(many["estimated_cpu_seconds"], few["estimated_cpu_seconds"])

    def test_a_limit_of_memory_is_the_estimate(self):
        self.assertLessEqual(self.estimate(*profile_args(self.folder / "p"), "--memory", "300MiB")["estimated_memory_bytes"], 300 << 20)

    def test_studies_score_as_many_caches_as_they_say(self):
        for study, caches in SCORED_CACHES.items():
            with self.subTest(study=study):
                out = self.folder / study
                self.succeeds("study", study, *HELD_OUT, "--windows", 1, "--tokens", 64, "--out", out)
                self.assertEqual(len(list((out / "scores").glob("*.safetensors"))), caches + 1)  # and the fp16 cache
        other = json.loads(self.succeeds("study", "E1", "T1", "--dry-run", "--json").stdout)
        self.assertEqual(other["not_estimated"], ["E1", "T1"])


if __name__ == "__main__":
    main()
