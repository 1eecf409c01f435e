#!/usr/bin/env python3
"""End-to-end tests of several kvplan processes in one run: the same bytes as one process, and what happens when one of them dies."""
import json
import os
import socket
import subprocess
import sys
import unittest

import cli_test_case
from cli_test_case import KVPLAN, PROFILE, CliTest, main, profile_args

setUpModule, tearDownModule = cli_test_case.setUpModule, cli_test_case.tearDownModule


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_rank(rank, size, port, *args):
    return subprocess.Popen([str(KVPLAN), *map(str, args), "--threads", "1", "--peer-timeout", "120"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def start(size, *args):
    """`size` processes of one run, as a launcher starts them."""
    port = free_port()
    return [start_rank(rank, size, port, *args) for rank in range(size)]


# A report is an int32 state (0 working, 1 done), an int32 signal and 1,000 bytes of text; rank 0 answers with all of them.
STAND_IN = """
import datetime, os, sys, torch, torch.distributed as dist
timeout = datetime.timedelta(seconds=60)
store = dist.PrefixStore("kvplan/0", dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timeout))
group = dist.ProcessGroupGloo(store, 1, 2, timeout)
for state in (1, 1, 0, 0):  # connected, ready to begin, two windows
    report = torch.zeros(1008, dtype=torch.uint8)
    report[0] = state
    group.send([report], 0, 0).wait()
    group.recv([torch.zeros(2 * 1008, dtype=torch.uint8)], 0, 0).wait()
os._exit(9)
"""


def finish(processes):
    """[(exit code, stdout, stderr)] by rank."""
    return [(p.returncode, out, err) for p, (out, err) in [(p, p.communicate(timeout=300)) for p in processes]]


class Peers(CliTest):
    def test_profile_and_validation_equal_one_process(self):
        one, plan = self.folder / "one", self.plan("plan")
        self.succeeds(*profile_args(one, "--threads", 1))
        self.assertEqual(self.validate(plan, "--mode", "worst,decode", "--threads", 1).returncode, 0)
        expected = json.loads((plan / "validation.json").read_text())
        for size in (2, 4):
            out = self.folder / f"of-{size}"
            done = finish(start(size, *profile_args(out)))
            self.assertEqual([code for code, _, _ in done], [0] * size, done)
            self.assertEqual([bool(text) for _, text, _ in done], [True] + [False] * (size - 1), "rank 0 alone prints")
            for name in ("profile.json", "profile.safetensors"):
                self.assertEqual((out / name).read_bytes(), (one / name).read_bytes(), f"{size} processes: {name}")
            self.assertFalse((out / "checkpoint").exists())
        found = self.folder / "validation.json"
        done = finish(start(2, "validate", "--model", cli_test_case.MODEL, "--text", cli_test_case.TEXT, "--part", "0.5:1", "--window", 200,
                            "--windows", 3, "--plan", plan, "--mode", "worst,decode", "--out", found))
        self.assertEqual([code for code, _, _ in done], [0, 0], done)
        self.assertEqual(json.loads(found.read_text()), expected)
        self.assertEqual(list(self.folder.glob("*partial*")), [])

    def test_dead_process_stops_the_others_and_the_run_continues(self):
        """Rank 1 is a stand-in that takes part in two windows and then vanishes, as if it had been killed."""
        out, one = self.folder / "many", self.folder / "one"
        args, port = profile_args(out), free_port()
        first = start_rank(0, 2, port, *args)
        die = subprocess.run([sys.executable, "-c", STAND_IN, str(port)], capture_output=True, text=True, timeout=120)
        self.assertEqual(die.returncode, 9, die.stderr)
        code, text, error = finish([first])[0]
        self.assertEqual(code, 7, error)
        self.assertEqual(text, "")
        self.assertIn("rank 1 of 2", error)
        self.assertFalse((out / "profile.json").exists())
        self.assertEqual(json.loads((out / "checkpoint" / "rank-0-of-2" / "state.json").read_text())["done"], 3)
        done = finish(start(2, *args))
        self.assertEqual([code for code, _, _ in done], [0, 0], done)
        self.succeeds(*profile_args(one, "--threads", 1))
        self.assertEqual((out / "profile.safetensors").read_bytes(), (one / "profile.safetensors").read_bytes())

    def test_missing_variables_are_named(self):
        for name, value, expected in (("MASTER_PORT", None, "MASTER_PORT is not set"), ("RANK", "x", "RANK: expected a number"),
                                      ("RANK", "5", "rank 5 of 2")):
            env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            env.pop(name) if value is None else env.update({name: value})
            self.fails(2, expected, *profile_args(self.folder / "p"), env=env)

    def test_memory_limit(self):
        """A model of this size fits anywhere: streaming itself is tested in streaming_test.cpp."""
        self.succeeds(*profile_args(self.folder / "wide", "--memory", "4GiB"))
        self.assertEqual((self.folder / "wide" / "profile.safetensors").read_bytes(), (PROFILE / "profile.safetensors").read_bytes())
        done = self.fails(5, "the smallest that works is --memory", *profile_args(self.folder / "narrow", "--memory", "1MiB"))
        smallest = done.stderr.split("smallest that works is --memory ")[1].split()[0]
        self.succeeds(*profile_args(self.folder / "narrow", "--memory", smallest))
        self.fails(2, "--memory", *profile_args(self.folder / "none", "--memory", "lots"))
        self.fails(2, "--device", *profile_args(self.folder / "none", "--device", "cpu,cuda"))


if __name__ == "__main__":
    main()
