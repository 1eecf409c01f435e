#!/usr/bin/env python3
"""llama.cpp itself against our codecs of its types. Needs llama-cpp-python and gguf, and the demo model in KVPLAN_DEMO_MODEL;
skipped without them, as compiling llama.cpp takes minutes."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from cli_test_case import REPOSITORY, fixed_text, main, run

PAIRS = ["q4_0,q4_0", "q8_0,q4_0"]
MODEL = os.environ.get("KVPLAN_DEMO_MODEL")


@unittest.skipUnless(importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"), "llama-cpp-python or gguf is not installed")
@unittest.skipUnless(MODEL, "KVPLAN_DEMO_MODEL is not set")
class LlamaCpp(unittest.TestCase):
    def test_our_codecs_predict_what_it_measures(self):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            text = folder / "text.md"
            text.write_text(fixed_text(8000))
            subprocess.run([sys.executable, REPOSITORY / "scripts/llamacpp_kl.py", text, "--model", MODEL, "--f32", folder / "f32.gguf",
                            "--part", "0:1", "--window", "256", "--windows", "2", "--pairs", " ".join(PAIRS), "--out", folder / "kl.json"],
                           check=True, stderr=subprocess.DEVNULL)
            measured = json.loads((folder / "kl.json").read_text())
            flags = ["--model", MODEL, "--text", text]
            done = run("profile", *flags, "--part", "0:1", "--window", 256, "--tokens", 256, "--out", folder / "profile")
            self.assertEqual(done.returncode, 0, done.stderr)
            done = run("plan", "--profile", folder / "profile", "--policy", "fp16", "--out", folder / "plan")
            self.assertEqual(done.returncode, 0, done.stderr)
            done = run("validate", *flags, "--part", "0:1", "--window", 256, "--windows", 2, "--plan", folder / "plan", "--baselines", "none",
                       "--allow-calibration-text", *sum((["--as", f"llamacpp:{pair}"] for pair in PAIRS), []), "--out", folder / "v.json")
            self.assertEqual(done.returncode, 0, done.stderr)
            ours = {c["name"]: c for c in json.loads((folder / "v.json").read_text())["candidates"]}
        self.assertAlmostEqual(ours["fp16"]["perplexity"] / measured["perplexity_f16"], 1, delta=1e-3)
        for pair in measured["pairs"]:
            name = f"llamacpp:{pair['k']},{pair['v']}"
            # 384 scored tokens, of which single ones hold some percent of the mean.
            self.assertAlmostEqual(ours[name]["kl"]["mean"] / pair["kl"], 1, delta=.25, msg=name)


if __name__ == "__main__":
    main()
