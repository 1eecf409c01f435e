#!/usr/bin/env python3
"""End-to-end tests of planning for serving stacks: plan --for, validate --as, size --stacks."""
import json
import unittest

from cli_test_case import CliTest, MODEL, PROFILE, TEXT, main, run, setUpModule, tearDownModule


class PlanFor(CliTest):
    def plan_for(self, stack, *budget):
        out = self.folder / "-".join(map(str, (stack, *budget)))
        self.succeeds("plan", "--profile", PROFILE, "--for", stack, *budget, "--context", 256, "--out", out)
        return out, json.loads((out / "plan.json").read_text())

    def test_exports_of_such_plans_lose_nothing(self):
        # heads of 16, so groups of 16: the builder takes 4 bits beside its codes
        for stack, bits in [("lmdeploy", 6), ("lmdeploy", 9.9), ("hf", 6), ("modelopt", 6.5)]:
            with self.subTest(stack=stack, bits=bits):
                out, plan = self.plan_for(stack, "--bits", bits)
                self.assertLessEqual(plan["effective_bits"], bits)
                self.assertEqual(plan["policy"], "for:" + stack)
                self.assertGreater(plan["predicted_kl"], 0)
                self.assertEqual(plan["sink_tokens"], 0)
                done = run("export", stack, "--plan", out, "--out", self.folder / "files", "--strict", "--dry-run", "--json",
                           *(["--model", MODEL] if stack == "modelopt" else []))
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                report = json.loads(done.stdout)
                self.assertEqual([item for item in report["items"] if item["class"] != "note"], [])
                self.assertEqual(report["bytes_per_token"], plan["bytes_per_token"])

    def test_more_bytes_cost_less(self):
        costs = [self.plan_for("hf", "--bits", bits)[1]["predicted_kl"] for bits in (5.5, 7, 9)]
        self.assertGreater(costs[0], costs[1])
        self.assertGreater(costs[1], costs[2])

    def test_a_ceiling_takes_the_fewest_bytes_below_it(self):
        _, wide = self.plan_for("hf", "--bits", 8)
        _, plan = self.plan_for("hf", "--max-kl", wide["predicted_kl"])
        self.assertLessEqual(plan["predicted_kl"], wide["predicted_kl"])
        self.assertLessEqual(plan["effective_bits"], wide["effective_bits"])

    def test_refusals(self):
        flags = ["plan", "--profile", PROFILE, "--context", 256, "--out", self.folder / "p", "--bits", 6]
        self.fails(2, "expected vllm", *flags, "--for", "tensorrt")
        self.fails(2, "excludes", *flags, "--for", "hf", "--widths", "2,4")
        self.fails(2, "no --policy", *flags, "--for", "hf", "--policy", "uniform")
        self.fails(3, "multiple of 32", *flags, "--for", "llamacpp")
        self.fails(4, "smallest takes", *flags[:-1], 1, "--for", "lmdeploy")
        self.fails(4, "no predicted KL below", *flags[:-2], "--max-kl", 1e-12, "--for", "lmdeploy")


class ValidateAs(CliTest):
    def test_candidates_carry_the_stack_as_their_name(self):
        plan = self.plan("plan", bits=4)
        out = self.folder / "validation.json"
        self.succeeds("validate", "--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 64, "--windows", 2, "--plan", plan,
                      "--baselines", "none", "--as", "hf", "--as", "lmdeploy", "--mode", "worst,decode", "--out", out)
        rows = {(c["name"], c["mode"]): c for c in json.loads(out.read_text())["candidates"]}
        self.assertEqual({name for name, _ in rows}, {"fp16", "plan", "hf", "lmdeploy"})
        self.assertGreater(rows["lmdeploy", "worst"]["kl"]["mean"], 0)
        # the builder keeps a tail of up to 128 tokens at 16 bits, more than a window holds
        self.assertEqual(rows["hf", "decode"]["kl"]["mean"], 0)
        self.assertGreater(rows["hf", "worst"]["kl"]["mean"], 0)

    def test_refusals(self):
        flags = ["validate", "--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 64, "--windows", 1,
                 "--plan", self.plan("plan", bits=4), "--out", self.folder / "v.json"]
        self.fails(2, "unknown stack", *flags, "--as", "nothing")
        self.fails(2, "types of keys and values", *flags, "--as", "llamacpp:q8_0,")
        self.fails(2, "types of keys and values", *flags, "--as", "llamacpp:q8_0,q4_0,q4_0")
        for types in ("q9_9,q4_0", "q4_0,q9_9", "q4_0,q4_0+wht=64", "turboquant:3,f16"):
            wrong = next(t for t in types.split(",") if t not in ("q4_0", "f16"))
            self.fails(2, f"no cache type '{wrong}' that kvplan knows; expected one of f16, q8_0", *flags, "--as", "llamacpp:" + types)
        for types in ("q8_0,q4_0", "iq4_nl,q5_1"):
            self.fails(3, "multiple of 32", *flags, "--as", "llamacpp:" + types)


class SizeStacks(CliTest):
    def test_every_format_of_a_known_model(self):
        done = self.succeeds("size", "--stacks", "--arch", "llama-3.1-8b", "--context", 4096, "--gib", 40, "--json")
        rows = {(row["stack"], row["format"]): row for row in json.loads(done.stdout)["rows"]}
        heads = 32 * 8  # layers x KV heads, head_dim 128
        for key, slot in [(("any", "fp16"), 512), (("vllm", "fp8"), 256), (("vllm", "int8_per_token_head"), 264),
                          (("vllm", "int4_per_token_head"), 136), (("llamacpp:mainline", "q4_0"), 144),
                          (("llamacpp:mainline", "q8_0, q4_0"), 208), (("llamacpp:ik", "q6_0"), 208), (("lmdeploy", "int4"), 136)]:
            with self.subTest(key=key):
                self.assertEqual(rows[key]["bytes_per_token"], heads * slot)
                self.assertEqual(rows[key]["sequences"], (40 << 30) // (heads * slot * 4096))
        # TurboQuant leaves two layers at each end at 16 bits.
        self.assertEqual(rows["vllm", "turboquant_4bit_nc"]["bytes_per_token"], 8 * (28 * 134 + 4 * 512))

    def test_needs_a_model(self):
        self.fails(2, "--stacks", "size", "--stacks")
        self.fails(2, "excludes", "size", "--stacks", "--for", "q4_0", "--arch", "llama-3.1-8b")


if __name__ == "__main__":
    main()
