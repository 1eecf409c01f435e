#!/usr/bin/env python3
"""End-to-end tests of the kvplan program: exit codes, stdout, stderr and files, on a tiny random model."""
import json
import pathlib
import resource
import shutil
import signal
import struct
import subprocess

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from cli_test_case import (CliTest, KVPLAN, MODEL, PROFILE, REPOSITORY, ROOT, TEXT, main, make_model, profile_args, run, setUpModule,
                           tearDownModule)


class MainLine(CliTest):
    def test_profile_plan_validate_report(self):
        plan = self.plan("plan")
        done = self.validate(plan, "--mode", "worst,decode", "--baselines", "q8_0,q4_0,turboquant:3,kivi:2", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        validation = json.loads(done.stdout)
        self.assertEqual(validation, json.loads((plan / "validation.json").read_text()))
        by_name = {(c["name"], c["mode"]): c for c in validation["candidates"]}
        self.assertEqual(by_name["fp16", "worst"]["kl"]["mean"], 0)
        for mode in ("worst", "decode"):
            self.assertLess(by_name["q8_0", mode]["kl"]["mean"], by_name["q4_0", mode]["kl"]["mean"])
            self.assertLess(by_name["plan", mode]["kl"]["mean"], by_name["turboquant:3", mode]["kl"]["mean"])
        self.assertLess(by_name["plan", "decode"]["kl"]["mean"], by_name["plan", "worst"]["kl"]["mean"])
        self.assertAlmostEqual(by_name["q4_0", "worst"]["effective_bits"], 4.5)
        self.assertLessEqual(by_name["plan", "worst"]["effective_bits"], 3.5)
        self.succeeds("report", "--profile", PROFILE, "--plan", plan, "--out", self.folder / "report.html")
        html = (self.folder / "report.html").read_text()
        self.assertIn(validation["plan_sha256"], html)
        self.assertNotIn("/*@", html, "a mark of the template was left in")
        self.assertNotRegex(html, r'(src|href)="https?:', "the report must not need the network")

    def test_inspect_shows_each_kind(self):
        plan = self.plan("plan")
        for path, word in ((MODEL, "llama"), (PROFILE, "key norm"), (plan, "effective bits"), (plan / "plan.json", "effective bits")):
            with self.subTest(path=path):
                self.assertIn(word, self.succeeds("inspect", path).stdout)
                json.loads(self.succeeds("inspect", path, "--json").stdout)

    def test_compare(self):
        a, b = self.plan("a"), self.plan("b", bits=2.5)
        self.assertEqual(self.validate(a, "--baselines", "none").returncode, 0)
        both = json.loads(self.succeeds("compare", a, b, "--json").stdout)
        self.assertGreater(both["a"]["effective_bits"], both["b"]["effective_bits"])
        self.assertIn("kl", both["a"]["measured"]["worst"])
        self.assertNotIn("measured", both["b"])
        self.assertIn("not measured", self.succeeds("compare", a, b).stdout)

    def test_policies_and_constraints(self):
        for more in (["--policy", "rank432"], ["--policy", "norm-ratio"], ["--policy", "outlier83"]):
            out = self.folder / more[1]
            with self.subTest(more=more):
                self.succeeds("plan", "--profile", PROFILE, "--codec", "rotated", *more, "--out", out)
                self.assertEqual(json.loads((out / "plan.json").read_text())["policy"], more[1])
                self.assertEqual(self.validate(out, "--baselines", "none").returncode, 0)
        uniform = json.loads((self.plan("u", "--policy", "uniform") / "plan.json").read_text())
        self.assertEqual(len({w for l in uniform["layers"] for s in "kv" for h in l[s]["heads"] for w in h["widths"]}), 1)
        tensor = json.loads((self.plan("t", "--merge", "tensor", "--widths", "2,4") / "plan.json").read_text())
        for layer in tensor["layers"]:
            for side in "kv":
                widths = {w for h in layer[side]["heads"] for w in h["widths"]}
                self.assertEqual(len(widths), 1)
                self.assertLessEqual(widths, {2, 4})
        skipped = json.loads((self.plan("s", "--skip-layers", "1", bits=10) / "plan.json").read_text())
        self.assertEqual(skipped["layers"][1]["k"]["bits"], 16)

    def test_published_codecs_as_policies(self):
        kl = {}
        for name in ("q8_0", "fp8_e4m3", "int:4+g8", "turboquant:3+rht+nc", "turboquant:3+prod", "turboquant:2+split=8+centre"):
            out = self.folder / name.replace(":", "_")
            with self.subTest(name=name):
                self.succeeds("plan", "--profile", PROFILE, "--policy", name, "--context", 256, "--out", out)
                plan = json.loads((out / "plan.json").read_text())
                self.assertEqual(plan["policy"], name)
                self.assertEqual(plan["budget"]["kind"], "none")
                self.assertAlmostEqual(sum(l["predicted_kl_share"] for l in plan["layers"]), 1)
                self.assertEqual(len(plan["provenance"]["profile_sha256"]), 64)
                kl[name] = plan["predicted_kl"]
        self.assertLess(kl["q8_0"], kl["fp8_e4m3"])
        self.assertLess(kl["fp8_e4m3"], kl["turboquant:3+rht+nc"])
        self.assertLess(kl["turboquant:3+rht+nc"], kl["turboquant:3+prod"])
        self.assertEqual(self.validate(self.folder / "turboquant_2+split=8+centre", "--baselines", "mxfp4,polar:3").returncode, 0)
        out = self.folder / "x"
        self.fails(2, "give no budget", "plan", "--profile", PROFILE, "--policy", "q8_0", "--bits", 8.5, "--out", out)
        self.fails(2, "turboquant:K/V", "plan", "--profile", PROFILE, "--policy", "best", "--out", out)

    def test_budgets_agree(self):
        plan = json.loads((self.plan("bits") / "plan.json").read_text())
        for flag, value in (("--bytes-per-token", plan["bytes_per_token"]), ("--max-kl", plan["predicted_kl"] * (1 + 1e-9))):
            out = self.folder / flag.strip("-")
            self.succeeds("plan", "--profile", PROFILE, flag, value, "--context", 256, "--out", out)
            other = json.loads((out / "plan.json").read_text())
            self.assertAlmostEqual(other["predicted_kl"], plan["predicted_kl"], places=9)
        self.succeeds("plan", "--profile", PROFILE, "--gib", 0.001, "--context", 8192, "--batch", 2, "--out", self.folder / "gib")


    def test_config_file(self):
        config = self.folder / "kvplan.toml"
        config.write_text("[plan]\nbits = 3.5\ncontext = 256\n")
        out = self.folder / "configured"
        self.succeeds("plan", "--config", config, "--profile", PROFILE, "--out", out)
        self.assertEqual((out / "plan.json").read_bytes(), (self.plan("flags") / "plan.json").read_bytes())
        config.write_text("[plan]\nbitz = 3.5\n")
        self.fails(2, "bitz", "plan", "--config", config, "--profile", PROFILE, "--out", self.folder / "x")


class Choosing(CliTest):
    MEASURE = ["--model", MODEL, "--text", TEXT, "--part", "0:0.5", "--window", 64]

    def test_trials_choose_and_stay_on_record(self):
        out = ROOT / "chosen"
        done = self.succeeds("plan", "--profile", PROFILE, "--bits", 2.5, "--context", 64, "--try", "code=tcq,group-size=8", "--seeds", 3,
                             *self.MEASURE, "--windows", 5, "--folds", 2, "--out", out)
        self.assertIn("over seeds", done.stdout)
        plan = json.loads((out / "plan.json").read_text())
        names = [t["name"] for t in plan["trials"]]
        self.assertEqual(names, ["as asked", "code=tcq,group-size=8", "seed 0", "seed 1", "seed 2"])
        rounds = plan["trials"][:2], plan["trials"][2:]
        for trials in rounds:
            self.assertEqual(sum(t["chosen"] for t in trials), 1)
        winner = next(t for t in rounds[1] if t["chosen"])
        self.assertEqual(winner["worst_fold_kl"], min(t["worst_fold_kl"] for t in rounds[1]))
        self.assertEqual(plan["seed"], int(winner["name"].split()[1]))
        self.assertEqual(plan["code"], "tcq" if rounds[0][1]["chosen"] else "scalar")
        self.assertEqual(len(plan["provenance"]["sources"]), 2)

    def test_trials_need_a_model_and_known_options(self):
        plan = ["plan", "--profile", PROFILE, "--bits", 3, "--context", 64, "--out", ROOT / "never"]
        self.fails(2, "--model", *plan, "--seeds", 2)
        self.fails(2, "--try", *plan, "--try", "colour=blue", *self.MEASURE, "--windows", 5)
        self.fails(2, "windows", *plan, "--seeds", 2, *self.MEASURE, "--windows", 3)

    def test_outlier_channels_as_choices(self):
        plan = ["plan", "--profile", PROFILE, "--codec", "rotated", "--bits", 5, "--context", 64]
        self.succeeds(*plan, "--out", ROOT / "rotated-plain")
        self.succeeds(*plan, "--outliers", 8, "--out", ROOT / "rotated-outliers")
        plain, offered = (json.loads((ROOT / f / "plan.json").read_text()) for f in ("rotated-plain", "rotated-outliers"))
        self.assertLessEqual(offered["predicted_kl"], plain["predicted_kl"])
        self.assertLessEqual(offered["effective_bits"], 5)
        self.fails(2, "multiples of 8", *plan, "--outliers", 5, "--out", ROOT / "never")

    def test_correction_shifts_a_kl_ceiling(self):
        measured = self.plan("to-correct", bits=2.5)
        self.validate(measured)
        ceiling = ["plan", "--profile", PROFILE, "--max-kl", 0.05, "--context", 256]
        self.succeeds(*ceiling, "--out", ROOT / "ceiling")
        self.succeeds(*ceiling, "--correction", measured / "validation.json", "--out", ROOT / "corrected")
        found = next(c for c in json.loads((measured / "validation.json").read_text())["candidates"] if c["name"] == "plan")
        ratio = found["kl"]["mean"] / found["predicted_kl"]
        corrected = json.loads((ROOT / "corrected" / "plan.json").read_text())
        self.assertLessEqual(corrected["predicted_kl"] * ratio, 0.05 * 1.0000001)
        raw = json.loads((ROOT / "ceiling" / "plan.json").read_text())
        self.assertEqual(corrected["effective_bits"] > raw["effective_bits"], ratio > 1)

    def test_sweep(self):
        out = ROOT / "sweep.json"
        done = self.succeeds("sweep", "--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 64, "--windows", 3, "--profile",
                             PROFILE, "--k-bits", "2,4", "--v-bits", "2,3", "--plan-bits", "2,4", "--context", 64, "--max-ppl-rise", 100,
                             "--out", out)
        self.assertIn("smallest turboquant within", done.stdout)
        sweep = json.loads(out.read_text())
        self.assertEqual(len(sweep["points"]), 6)
        self.assertEqual((sweep["smallest_grid"]["k_bits"], sweep["smallest_grid"]["v_bits"]), (2, 2))
        self.assertEqual(sweep["smallest_plan"]["effective_bits"], min(p["effective_bits"] for p in sweep["points"][4:]))

    def test_study(self):
        out = ROOT / "study"
        done = self.succeeds("study", "A3", "C3", "D4", "--out", out)
        self.assertIn("1 confirmed, 0 explained, 1 refuted, 1 not run", done.stdout)
        studies = {s["id"]: s for s in json.loads((out / "study.json").read_text())["studies"]}
        self.assertEqual({i: s["verdict"] for i, s in studies.items()}, {"A3": "C", "C3": "R", "D4": "-"})
        self.assertTrue(all(c["passed"] for c in studies["A3"]["checks"]))
        self.assertIn("kvplan studies", (out / "study.html").read_text())
        self.assertIn("### A3", self.succeeds("study", "A3", "--markdown").stdout)
        self.fails(2, "no study 'Z9'", "study", "Z9")
        self.fails(2, "--out", "study", "A3", "--model", MODEL, "--text", TEXT)


class TaskChecks(CliTest):
    def prompts(self, text, name="prompts.jsonl"):
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def test_passkey(self):
        plan = self.plan("plan")
        done = self.validate(plan, "--baselines", "q8_0,turboquant:2", "--mode", "worst,decode", "--passkey", "--passkey-contexts", "200,256",
                             "--passkey-depths", "0,0.5", "--passkey-trials", 2, "--seed", 5, windows=1)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("fp16 itself repeats", done.stdout)
        validation = json.loads((plan / "validation.json").read_text())
        self.assertEqual(validation["seed"], 5)
        cells = validation["passkey"]
        self.assertEqual([(c["context"], c["depth"]) for c in cells[:4]], [(n, d) for n in (200, 256) for d in (0, 0.5)])
        self.assertEqual(len(cells), 4 * 2 * 4)
        change = {n: np.mean([abs(c["log_probability_change"]["mean"]) for c in cells if c["name"] == n]) for n in ("fp16", "q8_0", "turboquant:2")}
        self.assertEqual(change["fp16"], 0)
        self.assertLess(0, change["q8_0"])
        self.assertLess(change["q8_0"], change["turboquant:2"])
        again = self.plan("again")
        self.validate(again, "--baselines", "none", "--passkey", "--passkey-contexts", "200", "--passkey-depths", "0.5", "--passkey-trials", 2,
                      "--seed", 5, windows=1)
        cell = json.loads((again / "validation.json").read_text())["passkey"][0]
        self.assertEqual(cell, next(c for c in cells if (c["context"], c["depth"], c["mode"]) == (200, 0.5, "worst")))

    def test_prompts(self):
        plan = self.plan("plan")
        file = self.prompts('{"prompt": "Permission is hereby granted", "answer": " free of charge", "category": "licence"}\n'
                            '{"prompt": "import json\\n", "category": "code"}\n')
        done = self.validate(plan, "--baselines", "turboquant:2", "--prompts", file, "--max-tokens", 8, windows=1)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("prompts of prompts.jsonl", done.stdout)
        validation = json.loads((plan / "validation.json").read_text())
        self.assertEqual(validation["prompt_source"]["max_tokens"], 8)
        self.assertEqual([(r["name"], r["category"]) for r in validation["prompts"]],
                         [(n, c) for n in ("fp16", "plan", "turboquant:2") for c in ("", "licence", "code")])
        self.assertEqual(validation["prompts"][0]["greedy_agreement"]["mean"], 1)
        self.assertEqual(validation["prompts"][0]["tokens"], 16)
        self.assertLess(validation["prompts"][3]["kl"]["mean"], validation["prompts"][6]["kl"]["mean"])
        self.succeeds("report", "--plan", plan, "--out", self.folder / "report.html")
        self.assertIn("licence", (self.folder / "report.html").read_text())

    def test_figures_by_text(self):
        plan, other = self.plan("plan"), self.folder / "other.txt"
        other.write_text((REPOSITORY / "scripts" / "run_tests.py").read_text())
        done = self.validate(plan, "--text", other, "--baselines", "none", windows=4)
        self.assertEqual(done.returncode, 0, done.stderr)
        validation = json.loads((plan / "validation.json").read_text())
        self.assertEqual([(r["name"], r["text"]) for r in validation["by_text"]],
                         [(n, t) for n in ("fp16", "plan") for t in ("text.md", "other.txt")])
        self.assertEqual(sum(r["windows"] for r in validation["by_text"][:2]), validation["windows"])
        kl = [r["kl"]["mean"] * r["windows"] for r in validation["by_text"] if r["name"] == "plan"]
        self.assertAlmostEqual(sum(kl) / validation["windows"], validation["candidates"][1]["kl"]["mean"])
        self.assertIn("by text", done.stdout)

    def test_bad_prompts(self):
        plan = self.plan("plan")
        for text, word in (("", "found none"), ('{"prompt": "a"}\n{"answer": "b"}', "line 2"), ("{", "line 1"), (b"\xff\xfe", "UTF-8"),
                           (json.dumps({"prompt": "word " * 400}), "context is 256")):
            with self.subTest(text=text[:20]):
                done = self.validate(plan, "--prompts", self.prompts(text))
                self.assertEqual(done.returncode, 3, done.stderr)
                self.assertIn("prompts.jsonl", done.stderr)
                self.assertIn(word, done.stderr)
                self.assertFalse((plan / "validation.json").exists())
        self.assertEqual(self.validate(plan, "--prompts", self.folder / "none.jsonl").returncode, 3)

    def test_usage(self):
        plan = self.plan("plan")
        for more, word in ((["--passkey", "--passkey-contexts", 4096], "beyond the 256"), (["--passkey", "--passkey-contexts", 20], "no room"),
                           (["--passkey", "--passkey-depths", 2], "passkey-depths"), (["--passkey-trials", 3], "--passkey"),
                           (["--max-tokens", 3], "--prompts"), (["--prompts", self.prompts("a", "p.txt"), "--stop", "many words"], "single token")):
            with self.subTest(more=more):
                done = self.validate(plan, *more)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(word, done.stderr)
                self.assertFalse((plan / "validation.json").exists())


class Determinism(CliTest):
    def test_same_plan_bytes_on_any_thread_count(self):
        a, b = self.plan("a", "--threads", 1), self.plan("b", "--threads", 2)
        for name in ("plan.json", "plan.safetensors"):
            self.assertEqual((a / name).read_bytes(), (b / name).read_bytes(), name)

    def test_merged_shards_equal_one_run_in_any_order(self):
        shards = []
        for i in range(4):
            shards.append(self.folder / f"shard{i}")
            self.succeeds(*profile_args(shards[-1], "--shard", f"{i}/4"))
        self.succeeds("merge", *shards, "--out", self.folder / "ab")
        self.succeeds("merge", *shards[::-1], "--out", self.folder / "ba")
        for name in ("profile.json", "profile.safetensors"):
            self.assertEqual((self.folder / "ab" / name).read_bytes(), (self.folder / "ba" / name).read_bytes(), name)
        one, merged = load_file(PROFILE / "profile.safetensors"), load_file(self.folder / "ab" / "profile.safetensors")
        self.assertEqual(one.keys(), merged.keys())
        for name, x in one.items():
            scale = max(np.abs(x).max(), 1e-30)
            self.assertLess(np.abs(x - merged[name]).max() / scale, 1e-6, name)

    def test_interrupted_profile_resumes_to_the_same_bytes(self):
        for sent in (signal.SIGINT, signal.SIGKILL):
            with self.subTest(signal=sent):
                out = self.folder / sent.name
                args = [str(KVPLAN), *map(str, profile_args(out, tokens=4096))]
                child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                for line in child.stderr:
                    if line.startswith("profile "):  # the first progress line
                        break
                child.send_signal(sent)
                child.communicate()
                if sent == signal.SIGINT:
                    self.assertIn(child.returncode, (130, 0))
                if not (out / "profile.json").exists():
                    self.succeeds(*profile_args(out, tokens=4096))
                whole = self.folder / f"whole-{sent.name}"
                self.succeeds(*profile_args(whole, tokens=4096))
                for name in ("profile.json", "profile.safetensors"):
                    self.assertEqual((out / name).read_bytes(), (whole / name).read_bytes(), name)
                self.assertFalse((out / "checkpoint").exists())


class BadInput(CliTest):
    def broken_model(self, change):
        folder = self.folder / "broken"
        shutil.copytree(MODEL, folder)
        change(folder)
        return folder

    def test_usage(self):
        for args in (["plan"], ["frobnicate"], ["plan", "--profile", PROFILE, "--out", "x", "--bits", "-1"],
                     ["plan", "--profile", PROFILE, "--out", "x"], ["plan", "--profile", PROFILE, "--out", "x", "--bits", 3, "--gib", 1],
                     ["profile", "--model", MODEL, "--text", TEXT, "--part", "0.9:0.1", "--out", self.folder / "x"],
                     ["plan", "--profile", PROFILE, "--out", "x", "--bits", 3, "--group-size", 128]):
            with self.subTest(args=args):
                done = run(*args)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertNotEqual(done.stderr, "")
                self.assertFalse(pathlib.Path("x").exists())

    def test_advice(self):
        """What was typed wrong is named, with what would have been right."""
        plan = self.plan("plan")
        unfinished = self.folder / "unfinished" / "checkpoint"
        unfinished.mkdir(parents=True)
        text = ["--text", TEXT, "--out", self.folder / "x"]
        for code, words, args in (
                (2, "commands are inspect profile", []), (2, "there is no command 'quantize'", ["quantize", MODEL]),
                (2, 'did you mean "profile"?', ["profil"]), (2, 'did you mean "--model"?', ["profile", "--modle", MODEL]),
                (2, "did you mean --model model.gguf?", ["profile", "model.gguf"]),
                (2, "did you mean --plan plan?", ["export", "vllm", "plan"]),
                (2, "expected a number above 0, found '3bit'", ["plan", "--profile", PROFILE, "--bits", "3bit", "--out", "x"]),
                (2, "not fisher or uniform", ["plan", "--profile", PROFILE, "--bits", 3, "--policy", "q4", "--out", "x"]),
                (2, "found 'both'", ["validate", "--model", MODEL, *text, "--plan", plan, "--mode", "both"]),
                (2, "not in {bash,fish,zsh}", ["completion", "tcsh"]), (2, "not in {fp32,bf16,fp16}", ["profile", "--model", MODEL, *text, "--dtype", "int8"]),
                (3, "kvplan downloads nothing", ["profile", "--model", "HuggingFaceTB/SmolLM2-135M", *text]),
                (3, "found none of them", ["inspect", self.folder]), (3, "found a plan", ["plan", "--profile", plan, "--bits", 3, "--out", "x"]),
                (3, "continues it", ["report", "--profile", unfinished.parent, "--out", "x"])):
            with self.subTest(args=args):
                self.fails(code, words, *args)
        for args in (["help"], ["help", "plan"]):
            self.assertIn("--json" if len(args) == 2 else "Subcommands", self.succeeds(*args).stdout)

    def test_truncated_weights(self):
        def cut(folder):
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[:len(data) // 2])
        self.fails(3, "model.safetensors", "inspect", self.broken_model(cut))

    def test_corrupted_header(self):
        def garble(folder):
            path = folder / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[:8] = struct.pack("<Q", 1 << 60)
            path.write_bytes(data)
        self.fails(3, "header", "inspect", self.broken_model(garble))

    def test_unsupported_architecture(self):
        def rename(folder):
            config = json.loads((folder / "config.json").read_text())
            config["model_type"] = "mamba"
            (folder / "config.json").write_text(json.dumps(config))
        self.fails(3, "mamba", "inspect", self.broken_model(rename))

    def test_nan_weights(self):
        def poison(folder):
            path = folder / "model.safetensors"
            data = bytearray(path.read_bytes())
            with safe_open(path, "numpy") as f:
                self.assertIn("model.layers.1.self_attn.k_proj.weight", f.keys())
            size = struct.unpack("<Q", data[:8])[0]
            begin = json.loads(data[8:8 + size])["model.layers.1.self_attn.k_proj.weight"]["data_offsets"][0]
            data[8 + size + begin:8 + size + begin + 4] = struct.pack("<f", float("nan"))
            path.write_bytes(data)
        model = self.broken_model(poison)
        out = self.folder / "p"
        self.fails(3, "layers.1.self_attn.k_proj.weight", "profile", "--model", model, "--text", TEXT, "--window", 64, "--tokens", 128, "--out", out)
        self.assertFalse((out / "profile.json").exists())

    def test_wrong_tokenizer(self):
        def shrink(folder):
            path = folder / "tokenizer.json"
            t = json.loads(path.read_text())
            t["model"]["vocab"] = {k: v + 5000 for k, v in t["model"]["vocab"].items()}
            path.write_text(json.dumps(t))
        self.fails(3, "vocabulary", "profile", "--model", self.broken_model(shrink), "--text", TEXT, "--window", 64, "--out",
                   self.folder / "p")

    def test_bad_text(self):
        for name, data in (("empty", b""), ("binary", b"abc\0def" * 1000), ("latin1", b"caf\xe9 " * 1000), ("short", b"three words only")):
            path = self.folder / f"{name}.txt"
            path.write_bytes(data)
            with self.subTest(name=name):
                self.fails(3, path.name, "profile", "--model", MODEL, "--text", path, "--window", 64, "--tokens", 64, "--out",
                           self.folder / "p")
        self.fails(3, "missing.txt", "profile", "--model", MODEL, "--text", self.folder / "missing.txt", "--out", self.folder / "p")

    def test_infeasible_budget_names_the_smallest(self):
        done = self.fails(4, "0.5000 effective bits", "plan", "--profile", PROFILE, "--bits", 0.1, "--context", 256, "--out", self.folder / "p")
        self.assertFalse((self.folder / "p").exists(), done.stderr)

    def test_plan_of_another_model(self):
        other = self.folder / "other"
        make_model(other, 1)
        self.fails(3, "kv_weights_sha256", "validate", "--model", other, "--text", TEXT, "--part", "0.5:1", "--window", 64, "--plan",
                   self.plan("plan"))

    def test_validation_on_calibration_text_is_refused(self):
        self.fails(3, "calibrated on", "validate", "--model", MODEL, "--text", TEXT, "--part", "0.2:1", "--window", 64, "--plan",
                   self.plan("plan"))

    def test_plan_changed_after_it_was_written(self):
        plan = self.plan("plan")
        path = plan / "plan.json"
        path.write_text(path.read_text().replace('"codec":', '"codex": 1, "codec":'))
        self.fails(3, "codex", "inspect", plan)
        tensors = self.plan("second") / "plan.safetensors"
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
        self.fails(3, "SHA-256", "inspect", tensors.parent)

    def test_gate(self):
        plan = self.plan("plan")
        done = self.validate(plan, "--baselines", "none", "--gate", "kl<=1e-9")
        self.assertEqual(done.returncode, 6, done.stderr)
        self.assertIn("FAILED", done.stdout)
        self.assertEqual(self.validate(plan, "--baselines", "none", "--gate", "kl<=100", "--force").returncode, 0)

    def test_existing_output_is_kept(self):
        plan = self.plan("plan")
        before = (plan / "plan.json").read_bytes()
        self.fails(7, "--force", "plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--out", plan)
        self.assertEqual((plan / "plan.json").read_bytes(), before)

    def test_unwritable_output(self):
        blocker = self.folder / "file"
        blocker.write_text("")
        self.fails(7, "file", "plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--out", blocker / "plan")

    def test_full_disk_leaves_nothing_half_written(self):
        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        out = self.folder / "plan"
        self.fails(7, "plan", "plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--out", out, preexec_fn=small_files)
        self.assertFalse((out / "plan.json").exists())
        self.assertEqual([p.name for p in self.folder.rglob("*.tmp*")], [])
        out = self.folder / "profile"
        self.fails(7, "profile", *profile_args(out), preexec_fn=small_files)
        self.assertFalse((out / "profile.json").exists())

    def test_dry_run_writes_nothing(self):
        for args in (profile_args(self.folder / "p"), ["plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--out", self.folder / "q"]):
            self.succeeds(*args, "--dry-run")
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    main()
