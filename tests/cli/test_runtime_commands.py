#!/usr/bin/env python3
"""End-to-end tests of the commands that apply a plan: generate, size, validate --runtime."""
import json
import shutil
import unittest

from cli_test_case import CliTest, MODEL, PROFILE, TEXT, main, make_model, profile_args, run, setUpModule, tearDownModule


class Generate(CliTest):
    PROMPT = "The plan says how every vector of the cache is stored, and a page of tokens is packed when it is full. " * 3

    def generate(self, *more, prompt=PROMPT):
        return ["generate", "--model", MODEL, "--prompt", prompt, "--max-tokens", 40, *more]

    def published(self, name):
        out = self.folder / name.replace(":", "_")
        self.succeeds("plan", "--profile", PROFILE, "--policy", name, "--context", 256, "--out", out)
        return out

    def generated(self, *more, **prompt):
        done = self.succeeds(*self.generate("--json", *more, **prompt))
        return json.loads(done.stdout)

    def test_a_plan_of_fp16_changes_nothing(self):
        plain, paged = self.generated(), self.generated("--plan", self.published("fp16"))
        self.assertGreater(plain["cached_tokens"], 68 + 64, "the text fills no two pages")
        self.assertEqual(plain["tokens"], paged["tokens"])
        self.assertEqual(plain["text"], paged["text"])
        self.assertEqual((plain["runtime"], paged["runtime"]), ("fp16", "cpu"))
        for g in (plain, paged):
            self.assertEqual(g["cache_bytes"], g["fp16_bytes"])
            self.assertEqual(g["fp16_bytes"], g["cached_tokens"] * 2 * 2 * 2 * 2 * 16)
            self.assertEqual(g["effective_bits"], 16)
            self.assertEqual(g["cached_tokens"], g["prompt_tokens"] + len(g["tokens"]) - (not g["stopped"]))

    def test_a_plan_of_few_bits_takes_fewer_bytes(self):
        plan = self.plan("plan", bits=2.5)
        g = self.generated("--plan", plan)
        packed = (g["cached_tokens"] - 4) // 64 * 64
        fp16_per_token = g["fp16_bytes"] // g["cached_tokens"]
        block = json.loads(self.succeeds("size", "--plan", plan, "--context", 256, "--json").stdout)["packed_bytes_per_token"]
        self.assertEqual(g["cache_bytes"], (g["cached_tokens"] - packed) * fp16_per_token + packed * block)
        self.assertLess(g["effective_bits"], 10)
        self.assertEqual(g["plan_sha256"], json.loads(self.validate(plan, "--json").stdout)["plan_sha256"])
        self.assertEqual(self.generated("--plan", plan)["tokens"], g["tokens"])

    def test_text_on_stdout_figures_on_stderr(self):
        done = self.succeeds(*self.generate("--plan", self.plan("plan")))
        g = self.generated("--plan", self.folder / "plan")
        self.assertEqual(done.stdout, g["text"] + "\n")
        for word in ("prompt tokens", "bytes", "effective bits", "tokens/s", "runtime cpu"):
            self.assertIn(word, done.stderr)
        self.assertEqual(self.succeeds(*self.generate("--quiet")).stderr, "")

    def test_prompt_of_a_file_and_special_tokens(self):
        path = self.folder / "prompt.txt"
        path.write_text(self.PROMPT)
        base = ["generate", "--model", MODEL, "--max-tokens", 8, "--json"]
        from_file = json.loads(self.succeeds(*base, "--prompt-file", path).stdout)
        plain = json.loads(self.succeeds(*base, "--prompt", self.PROMPT).stdout)
        self.assertEqual(from_file["tokens"], plain["tokens"])
        model = self.folder / "model"
        shutil.copytree(MODEL, model)
        config = json.loads((model / "config.json").read_text())
        (model / "generation_config.json").unlink(missing_ok=True)
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [plain["tokens"][3]]}))
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        base[2] = model
        stopped = json.loads(self.succeeds(*base, "--prompt", self.PROMPT).stdout)
        self.assertTrue(stopped["stopped"])
        self.assertEqual(stopped["tokens"], plain["tokens"][:plain["tokens"].index(plain["tokens"][3])])
        tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "!", "type_id": 0}},
                                       {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens":
                                       {"!": {"id": "!", "ids": [0], "tokens": ["!"]}}}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        self.assertEqual(json.loads(self.succeeds(*base, "--prompt", self.PROMPT).stdout)["prompt_tokens"], plain["prompt_tokens"] + 1)

    def test_refusals(self):
        self.fails(2, "--prompt", "generate", "--model", MODEL)
        self.fails(2, "empty", *self.generate(prompt=""))
        self.fails(2, "256", *self.generate(prompt=self.PROMPT * 3))
        self.fails(3, "kivi", *self.generate("--plan", self.published("kivi:2")))
        self.fails(3, "missing", "generate", "--model", MODEL, "--prompt-file", self.folder / "missing")
        other = self.folder / "other"
        make_model(other, 1)
        self.fails(3, "kv_weights_sha256", "generate", "--model", other, "--prompt", "x", "--plan", self.plan("plan"))
        self.fails(2, "--runtime", *self.generate("--runtime", "tpu"))

    @unittest.skipIf(shutil.which("nvidia-smi"), "there is a GPU")
    def test_without_a_gpu(self):
        self.fails(7, "CUDA", *self.generate("--runtime", "cuda", "--plan", self.plan("plan")))
        self.fails(7, "CUDA", *self.generate("--device", "cuda"))
        done = self.validate(self.folder / "plan", "--mode", "decode", "--runtime", "cuda")
        self.assertEqual((done.returncode, done.stdout), (7, ""), done.stderr)


class Size(CliTest):
    def size(self, *args):
        return json.loads(self.succeeds("size", *args, "--json").stdout)

    def test_parts_add_up_beside_fp16(self):
        plan = self.plan("plan", bits=2.5)
        size = self.size("--plan", plan, "--context", 4096, "--batch", 3)
        parts = size["bytes"]
        self.assertEqual(parts["total"], sum(parts[p] for p in ("pages", "open", "tables", "statics", "workspace")))
        self.assertEqual(size["fp16_bytes"], 3 * 4096 * 2 * 2 * 2 * 2 * 16)
        self.assertAlmostEqual(size["ratio"], size["fp16_bytes"] / parts["total"])
        pages = (4096 - 4) // 64
        self.assertAlmostEqual(parts["pages"], 3 * pages * 64 * size["packed_bytes_per_token"], delta=2 * 256)
        text = self.succeeds("size", "--plan", plan, "--context", 4096, "--batch", 3).stdout
        self.assertIn(str(parts["total"]), text)
        twice = self.size("--plan", plan, "--context", 4096, "--batch", 3, "--multiprocessors", 264)
        self.assertGreater(twice["bytes"]["workspace"], parts["workspace"])
        self.assertEqual(twice["bytes"]["pages"], parts["pages"])

    def test_what_fits_is_the_largest(self):
        plan = self.plan("plan", bits=2.5)
        gib = 0.01
        fits = self.size("--plan", plan, "--context", 512, "--batch", 2, "--gib", gib)["fits"]
        total = lambda context, batch: self.size("--plan", plan, "--context", context, "--batch", batch)["bytes"]["total"]
        self.assertLessEqual(total(512, fits["batch"]), gib * 2**30)
        self.assertGreater(total(512, fits["batch"] + 1), gib * 2**30)
        self.assertLessEqual(total(fits["context"], 2), gib * 2**30)
        self.assertGreater(total(fits["context"] + 1, 2), gib * 2**30)
        self.assertEqual(fits["fp16_context"], int(gib * 2**30 // (2 * 256)))
        self.assertEqual(self.size("--plan", plan, "--context", 10**6, "--gib", gib)["fits"]["batch"], 0)

    def test_a_codec_on_a_model_or_an_architecture(self):
        by_model = self.size("--for", "turboquant:4", "--model", MODEL)
        self.assertEqual(by_model["bytes"], self.size("--for", "turboquant:4", "--arch", "2x4x2x16")["bytes"])
        self.assertEqual(by_model["packed_bytes_per_token"], 2 * 2 * 2 * (16 * 4 / 8 + 2))
        self.assertEqual(self.size("--for", "turboquant:4", "--arch", "llama-3.1-8b")["bytes"],
                         self.size("--for", "turboquant:4", "--arch", "32x32x8x128")["bytes"])
        for arch in ("32x32x8", "0x1x1x64", "gpt-5", "32x32x8x128x1", "99999999999x1x1x64"):
            with self.subTest(arch=arch):
                self.fails(2, "--arch", "size", "--for", "turboquant:4", "--arch", arch)
        self.fails(2, "query", "size", "--for", "turboquant:4", "--arch", "2x5x2x64")
        self.fails(2, "--plan", "size", "--context", 4096)
        self.fails(3, "q4_0", "size", "--for", "q4_0", "--arch", "llama-3.1-8b")


class Runtimes(CliTest):
    def test_packed_pages_agree_with_round_trips(self):
        plan = self.plan("plan", bits=2.5)
        done = self.validate(plan, "--mode", "worst,decode", "--runtime", "cpu,reference", "--baselines", "turboquant:3", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        validation = json.loads(done.stdout)
        self.assertEqual(validation["runtime"], "cpu,reference")
        found = {(c["name"], c["mode"], c["runtime"]): c for c in validation["candidates"]}
        self.assertEqual(set(found), {(n, m, "cpu") for n in ("fp16", "plan", "turboquant:3") for m in ("worst", "decode")} |
                         {("plan", "decode", "reference")})
        simulated, paged = (found["plan", "decode", r]["kl"]["mean"] for r in ("cpu", "reference"))
        self.assertGreater(simulated, 0)
        self.assertLess(abs(paged / simulated - 1), 0.02)
        table = self.succeeds("inspect", plan / "validation.json").stdout
        self.assertIn("decode, reference", table)

    def test_trellis_plans_in_pages(self):
        model, profile, plan = (self.folder / name for name in ("model", "profile", "plan"))
        make_model(model, 2, hidden_size=128, heads=2)  # head_dim 64: a trellis needs 32 coordinates
        args = profile_args(profile)
        args[args.index(MODEL)] = model
        self.succeeds(*args)
        self.succeeds("plan", "--profile", profile, "--bits", 2.5, "--context", 256, "--code", "tcq", "--group-size", 8, "--out", plan)
        self.assertIn(b'"lut.', (plan / "plan.safetensors").read_bytes()[:4096])
        done = run("validate", "--model", model, "--text", TEXT, "--part", "0.5:1", "--window", 200, "--windows", 3, "--plan", plan, "--mode",
                   "decode", "--runtime", "cpu,reference", "--baselines", "none", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        simulated, paged = (c["kl"]["mean"] for c in json.loads(done.stdout)["candidates"] if c["name"] == "plan")
        self.assertLess(abs(paged / simulated - 1), 0.02)
        size = json.loads(self.succeeds("size", "--plan", plan, "--context", 256, "--json").stdout)
        self.assertAlmostEqual(size["packed_bytes_per_token"] * 8 / (2 * 2 * 64), 2.5, delta=0.1)
        g = json.loads(self.succeeds("generate", "--model", model, "--prompt", Generate.PROMPT, "--max-tokens", 8, "--plan", plan, "--json").stdout)
        self.assertLess(g["cache_bytes"], g["fp16_bytes"])

    def test_refusals(self):
        plan = self.plan("plan")
        for more, text in ((["--runtime", "reference"], "--mode decode"), (["--runtime", "tpu", "--mode", "decode"], "tpu"),
                           (["--runtime", "cpu,cpu", "--mode", "decode"], "twice")):
            with self.subTest(more=more):
                done = self.validate(plan, *more)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(text, done.stderr)
        self.assertFalse((plan / "validation.json").exists())


if __name__ == "__main__":
    main()
