#!/usr/bin/env python3
"""What kvplan does when the machine fails it: killed, no space, no permission, damaged and hostile files, two runs in one folder.

KVPLAN_FAULT_KILLS: how often a profile is killed at a random point (default 10).
"""
import ctypes
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "cli"))
from cli_test_case import CliTest, KVPLAN, MODEL, PROFILE, TEXT, main, profile_args, run, setUpModule, tearDownModule  # noqa: E402,F401

KILLS = int(os.environ.get("KVPLAN_FAULT_KILLS", "10"))
LIBC = ctypes.CDLL(None)
PR_CAPBSET_DROP = 24  # linux/prctl.h
GIB = 1 << 30
SHIM = pathlib.Path(__file__).resolve().parent / "shim.c"


def start(*args, **more):
    return subprocess.Popen([str(KVPLAN), *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)


def wait_for_progress(child):
    """Until some work is done and the folder is locked."""
    for line in child.stderr:
        if line.startswith("profile ") and not line.startswith("profile 0/"):
            return
    raise AssertionError(f"ended with {child.wait()} before any progress")


class Killed(CliTest):
    def test_at_random_points_the_profile_ends_in_the_same_bytes(self):
        draw = random.Random(0)
        whole, out = self.folder / "whole", self.folder / "out"
        begun = time.monotonic()
        self.succeeds(*profile_args(whole, tokens=1024))
        seconds = time.monotonic() - begun
        kills = 0
        while kills < KILLS:
            child = start(*profile_args(out, tokens=1024))
            try:
                child.communicate(timeout=draw.uniform(0.05, 1) * seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
                kills += 1
            if (out / "profile.json").exists():
                self.assert_same_profile(out, whole)
                shutil.rmtree(out)
        if not (out / "profile.json").exists():
            self.succeeds(*profile_args(out, tokens=1024))
        self.assert_same_profile(out, whole)
        self.assertEqual([p.name for p in out.rglob("*.tmp-*")], [], "leftovers of killed runs")

    def assert_same_profile(self, out, whole):
        for name in ("profile.json", "profile.safetensors"):
            self.assertEqual((out / name).read_bytes(), (whole / name).read_bytes(), name)


class SharedFolder(CliTest):
    def test_second_run_is_refused_and_changes_nothing(self):
        out = self.folder / "out"
        child = start(*profile_args(out, tokens=8192))
        try:
            wait_for_progress(child)
            child.send_signal(signal.SIGSTOP)  # holds its lock for as long as the others need
            for more in ([], ["--force"]):
                with self.subTest(more=more):
                    self.fails(7, "another run is working in this folder", *profile_args(out, *more, tokens=8192))
            self.assertEqual(child.poll(), None, "the first run ended too early to show anything")
        finally:
            child.send_signal(signal.SIGINT)
            child.send_signal(signal.SIGCONT)
            child.communicate()
        self.assertEqual(child.returncode, 130)
        self.assertTrue((out / "checkpoint/state.json").exists(), "the second run removed the first one's checkpoint")


class Machine(CliTest):
    def test_full_disk(self):
        """On a file system of 48 KB; RLIMIT_FSIZE in test_cli.py covers machines that allow no mount."""
        disk = self.folder / "disk"
        disk.mkdir()
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True).returncode:
            self.skipTest("mounting a small file system is not permitted here")
        try:
            self.fails(7, "space", *profile_args(disk / "profile"))
            self.assertFalse((disk / "profile" / "profile.json").exists())
            self.assertEqual([p.name for p in disk.rglob("*.tmp-*")], [])
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_read_error_of_a_mapped_file(self):
        """The kernel reports it as SIGBUS."""
        child = start(*profile_args(self.folder / "out", tokens=8192))
        wait_for_progress(child)
        child.send_signal(signal.SIGBUS)
        _, stderr = child.communicate()
        self.assertEqual(child.returncode, 7)
        self.assertIn("could not be read", stderr)

    def shimmed(self, **variables):
        """The environment that puts shim.c between the program and the C library."""
        library = self.folder / "shim.so"
        subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
        return {**os.environ, "LD_PRELOAD": str(library), **variables}

    def test_clock_that_jumps(self):
        """By decades, forwards and backwards, with a checkpoint from the future: same bytes."""
        steady, jumping = self.folder / "steady", self.folder / "jumping"
        self.succeeds(*profile_args(steady, tokens=1024))
        env = self.shimmed(SHIM_CLOCK="1")
        years = subprocess.run([sys.executable, "-c", "import time; print(len({time.time() // 3e7 for _ in range(20)}))"], env=env,
                               capture_output=True, text=True, check=True)
        self.assertGreater(int(years.stdout), 3, "the shim does not jump")
        child = start(*profile_args(jumping, tokens=1024), env=env)
        wait_for_progress(child)
        child.send_signal(signal.SIGINT)
        child.communicate()
        for file in jumping.rglob("*"):
            os.utime(file, (1 << 32, 1 << 32))
        if child.returncode != 0:
            self.succeeds(*profile_args(jumping, tokens=1024), env=env)
        for name in ("profile.json", "profile.safetensors"):
            self.assertEqual((jumping / name).read_bytes(), (steady / name).read_bytes(), name)

    def test_files_that_cannot_be_read(self):
        """EIO from the disk: the file is named, and the exit code is that of a bad input or of the environment."""
        plan = self.plan("plan")
        profile = profile_args(self.folder / "out")
        for part, args in (("config.json", profile), ("tokenizer.json", profile), ("model.safetensors", profile), (TEXT.name, profile),
                           ("plan.json", ["inspect", plan]), ("plan.safetensors", ["inspect", plan]), ("profile.json", ["inspect", PROFILE]),
                           ("profile.safetensors", ["inspect", PROFILE])):
            with self.subTest(file=part):
                done = run(*args, env=self.shimmed(SHIM_EIO=part))
                self.assertIn(done.returncode, (3, 7), done.stderr)
                self.assertIn(part, done.stderr)
                self.assertFalse((self.folder / "out" / "profile.json").exists())

    def test_no_permission(self):
        """Root may do everything, so where the tests run as root the program runs without root's capabilities."""
        def drop_capabilities():
            for capability in range(64):
                LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        preexec = drop_capabilities if os.geteuid() == 0 else None
        locked = self.folder / "locked"
        locked.mkdir(mode=0o500)
        if subprocess.run(["touch", locked / "file"], capture_output=True, preexec_fn=preexec).returncode == 0:
            self.skipTest("permissions do not bind here: capabilities cannot be dropped, or the file system has none")
        model = self.folder / "model"
        shutil.copytree(MODEL, model)
        (model / "model.safetensors").chmod(0)
        self.fails(3, "Permission denied", "inspect", model, preexec_fn=preexec)
        plan = ["plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--out"]
        self.fails(7, "Permission denied", *plan, locked / "plan", preexec_fn=preexec)
        self.fails(7, "Permission denied", *profile_args(locked / "profile"), preexec_fn=preexec)


class DamagedFiles(CliTest):
    def test_truncated_anywhere(self):
        draw = random.Random(1)
        plan = self.plan("plan")
        for original in (MODEL / "model.safetensors", MODEL / "config.json", MODEL / "tokenizer.json", PROFILE / "profile.json",
                         PROFILE / "profile.safetensors", plan / "plan.json", plan / "plan.safetensors"):
            data = original.read_bytes()
            for size in (1, draw.randrange(2, len(data) - 1), len(data) - 2):
                with self.subTest(file=original.name, size=size, of=len(data)):
                    folder = self.folder / f"{original.name}-{size}"
                    shutil.copytree(original.parent, folder)
                    (folder / original.name).write_bytes(data[:size])
                    # inspect reads no tokenizer.
                    args = ["profile", "--model", folder, "--text", TEXT, "--out", folder / "out", "--dry-run"] if original.parent == MODEL else \
                        ["inspect", folder]
                    self.fails(3, original.name, *args)

    def test_missing_and_truncated_shards(self):
        from safetensors.numpy import load_file, save_file
        tensors = load_file(MODEL / "model.safetensors")
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:len(names) // 2], "model-00002-of-00002.safetensors": names[len(names) // 2:]}
        model = self.folder / "sharded"
        shutil.copytree(MODEL, model)
        (model / "model.safetensors").unlink()
        for shard, of in shards.items():
            save_file({name: tensors[name] for name in of}, model / shard)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: s for s, of in shards.items() for n in of}}))
        self.succeeds("inspect", model)
        shard = model / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
        self.fails(3, shard.name, "inspect", model)
        shard.unlink()
        self.fails(3, shard.name, "inspect", model)

    def test_small_files_cannot_ask_for_much_memory(self):
        """Four GiB of address space hold the program and its libraries; files of some KB claim more than that."""
        def limited():
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        limit = 4 * GIB
        self.succeeds("inspect", MODEL, preexec_fn=limited)

        def gguf(name, tensors=0, metadata=0, body=b""):
            path = self.folder / f"{name}.gguf"
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, metadata) + body)
            return path

        def key(name, kind, value):
            return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value

        def safetensors(name, header, length=None):
            path = self.folder / f"{name}.safetensors"
            text = json.dumps(header).encode()
            path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
            return path

        def model(name, weights=None, **config):
            folder = self.folder / name
            shutil.copytree(MODEL, folder)
            text = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(text))
            if weights:
                shutil.copy(weights, folder / "model.safetensors")
            return folder

        def plan(name, change):
            folder = self.folder / name
            self.succeeds("plan", "--profile", PROFILE, "--policy", "turboquant:3", "--context", 256, "--out", folder)
            document = json.loads((folder / "plan.json").read_text())
            change(document)
            (folder / "plan.json").write_text(json.dumps(document))
            return folder

        def one_wide_head(d):
            d["model"] |= {"num_layers": 1, "query_heads": 1, "kv_heads": 1, "head_dim": 1 << 30, "rotary_dim": 0}
            d["group_size"] = 1 << 30

        many = 1 << 40
        hostile = [gguf("tensors", tensors=many), gguf("metadata", metadata=many),
                   gguf("array", metadata=1, body=key(b"a", 9, struct.pack("<IQ", 4, many))),
                   gguf("string", metadata=1, body=key(b"a", 8, struct.pack("<Q", many))),
                   gguf("name", tensors=1, body=struct.pack("<Q", many)),
                   model("header", safetensors("header", {}, length=90 << 20)),
                   model("shape", safetensors("shape", {"x": {"dtype": "F32", "shape": [many, 1 << 20], "data_offsets": [0, 8]}})),
                   model("layers", num_hidden_layers=1 << 31), model("wide", hidden_size=1 << 40), model("heads", num_attention_heads=1 << 30),
                   plan("head", one_wide_head), plan("layer", lambda d: d["model"].update(num_layers=1 << 30)),
                   plan("sketch", lambda d: d["variant"].update(sketch="gaussian", sketch_rows=1 << 30)),
                   plan("sinks", lambda d: d.update(sink_tokens=1 << 40))]
        for path in hostile:
            with self.subTest(path=path.name):
                self.fails(3, self.folder.name, "inspect", path, preexec_fn=limited)


if __name__ == "__main__":
    main()
