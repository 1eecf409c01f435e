#!/usr/bin/env python3
"""Tables of docs/serving/results.md: plans under a stack's constraints against plans made freely and rounded by `export`, and what
our codecs predict against what llama.cpp measures.

  serving.py TEXT --profile FOLDER               the first table; calibrated on the first half of TEXT
  serving.py TEXT --llamacpp kl.json             the second, beside the output of llamacpp_kl.py with --f32

For each stack a free plan (calibrated codec, --bits) is exported and what the stack then does is measured (`validate --as`); a plan
made with `plan --for` at most as many bytes per token is measured on the same windows.
"""
import json
import pathlib
import subprocess

from measurement import kl, parser, print_table

STACKS = ["vllm", "llamacpp", "llamacpp:ik", "lmdeploy", "modelopt", "kvtuner", "hf"]


class Serving:
    def __init__(self, a):
        self.a, self.work = a, pathlib.Path(a.work)
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, *args):
        done = subprocess.run([self.a.kvplan, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def plan(self, name, *flags):
        out = self.work / name.replace(":", "_")
        if not (out / "plan.json").exists():
            self.run("plan", "--profile", self.a.profile, "--context", self.a.window, *flags, "--out", out)
        return out

    def validate(self, name, plans, *flags):
        out = self.work / f"{name}.json"
        if not out.exists():
            self.run("validate", "--model", self.a.model, "--text", self.a.text, "--part", "0.5:1", "--window", self.a.window,
                     "--windows", self.a.windows, "--baselines", "none", *sum((["--plan", p] for p in plans), []), *flags, "--out", out)
        return {c["name"]: c for c in json.loads(out.read_text())["candidates"]}

    def constraints(self, bits):
        free = self.plan(f"free-{bits}", "--bits", bits)
        rounded, plans = {}, [free]
        for stack in self.a.stacks:
            target, _, detail = stack.partition(":")
            dialect = ["--dialect", detail] if target == "llamacpp" and detail else []
            report = json.loads(self.run("export", target, "--plan", free, *dialect, "--dry-run", "--json", "--out", self.work / "none",
                                         *(["--model", self.a.hf] if self.a.hf else [])))
            rounded[stack] = report["bytes_per_token"]
            plans.append(self.plan(f"for-{stack}-{bits}", "--for", stack, "--bytes-per-token", report["bytes_per_token"]))
        rows = self.validate(f"constraints-{bits}", plans, *sum((["--as", s] for s in self.a.stacks), []))
        for stack, out in zip(self.a.stacks, plans[1:]):
            own = json.loads((out / "plan.json").read_text())
            a, b = rows[stack], rows[out.name]
            low, high = b["kl"]["mean"] - a["kl"]["mean"], (a["kl"]["standard_error"] ** 2 + b["kl"]["standard_error"] ** 2) ** .5
            yield [stack, str(bits), str(rounded[stack]), kl(a), str(own["bytes_per_token"]), kl(b), f"{low:+.4f} ± {high:.4f}"]

    def llamacpp(self, path):
        measured = json.loads(pathlib.Path(path).read_text())
        names = [f"llamacpp:{p['k']},{p['v']}" + ("" if measured["rotated"] else ",unrotated") for p in measured["pairs"]]
        free = self.plan("free-4", "--bits", 4)
        rows = self.validate("llamacpp", [free], *sum((["--as", name] for name in names), []))
        pairs = sorted(zip(names, measured["pairs"]), key=lambda pair: (rows[pair[0]]["effective_bits"], pair[1]["kl"]))
        for name, pair in pairs:
            ours = rows[name]["kl"]["mean"]
            yield [f"{pair['k']}, {pair['v']}", f"{rows[name]['effective_bits']:.2f}", f"{pair['kl']:.5f}", f"{ours:.5f}",
                   f"{ours / pair['kl'] - 1:+.1%}", f"{pair['perplexity_rise']:+.2%}"]


def main():
    p = parser(__doc__, ".cache/serving")
    p.add_argument("--profile", help="profile of the first half of TEXT")
    p.add_argument("--hf", help="Hugging Face folder of the model, which modelopt's export needs")
    p.add_argument("--stacks", type=lambda text: text.split(","), default=STACKS)
    p.add_argument("--llamacpp", help="output of llamacpp_kl.py on the same windows")
    a = p.parse_args()
    serving = Serving(a)
    if a.llamacpp:
        print_table(["K, V", "bits", "measured by llama.cpp", "our codecs", "difference", "perplexity rise"], list(serving.llamacpp(a.llamacpp)))
    else:
        rows = [row for bits in a.bits.split(",") for row in serving.constraints(bits)]
        print_table(["stack", "free plan, bits", "bytes, rounded", "KL, rounded", "bytes, `--for`", "KL, `--for`", "difference"], rows)


if __name__ == "__main__":
    main()
