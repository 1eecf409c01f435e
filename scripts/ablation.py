#!/usr/bin/env python3
"""Measures what each ingredient of the default plan is worth, and prints the table of docs/ablation.md as Markdown.

  ablation.py TEXT [--kvplan build/release/cli/kvplan] [--model M.gguf] [--work .cache/ablation] [--tokens 65536] [--windows 24]
              [--window 1024] [--bits 2.25,3.25,4.25] [--code-text FILE]

TEXT: WikiText-2 test (wiki.test.raw); calibrates on the first half, evaluates on the second, as scripts/results.py does. Every row is the
default plan with one ingredient removed or replaced, at equal effective bits, on the same windows. --code-text adds the table of
calibration mixtures: plans from prose, from that text and from weighted mixtures, measured on both. Finished steps in --work are kept.
"""
import argparse
import json
import pathlib
import subprocess

EVERYTHING = {"--code": "tcq", "--group-size": 8}
VARIANTS = [  # (row, what replaces or joins the flags of EVERYTHING)
    ("everything: trellis, groups of 8", {}),
    ("scalar code", {"--code": "scalar"}),
    ("groups of 16", {"--group-size": 16}),
    ("scalar code, groups of 16 (the default)", {"--code": "scalar", "--group-size": 16}),
    ("norm in fp16 instead of 8 logarithmic bits", {"--norm": "fp16"}),
    ("least-squares scale instead of unbiased", {"--scale-rule": "biased"}),
    ("norm-corrected scale", {"--scale-rule": "norm_corrected"}),
    ("no centring", {"--no-centre": None}),
    ("incoherent cost of width 0", {"--no-coherent": None}),
    ("no mixing of equal widths", {"--no-mixing": None}),
    ("identity in place of the Fisher matrix", {"--fisher-shrinkage": 1}),
    ("no shrinkage", {"--fisher-shrinkage": 0, "--moment-shrinkage": 0}),
    ("one width per tensor", {"--merge": "tensor"}),
    ("one width everywhere", {"--policy": "uniform"}),
]


def run(kvplan, *args):
    subprocess.run([kvplan, *map(str, args)], check=True, stdout=subprocess.DEVNULL)


class Ablation:
    def __init__(self, a):
        self.a, self.bits, self.work = a, [float(b) for b in a.bits.split(",")], pathlib.Path(a.work)
        self.work.mkdir(parents=True, exist_ok=True)

    def profile(self, name, text, tokens):
        folder = self.work / f"profile-{name}"
        if not (folder / "profile.json").exists():
            run(self.a.kvplan, "profile", "--model", self.a.model, "--text", text, "--part", "0:0.5", "--tokens", tokens, "--window",
                self.a.window, "--out", folder)
        return folder

    def plan(self, name, profile, bits, changes):
        folder = self.work / f"{name}-{bits:g}"
        flags = [x for pair in {**EVERYTHING, **changes}.items() for x in pair if x is not None]
        if not (folder / "plan.json").exists():
            run(self.a.kvplan, "plan", "--profile", profile, "--bits", bits, "--context", self.a.window, *flags, "--out", folder)
        return folder

    def validate(self, name, text, plans, baselines="none"):
        """Candidates by plan folder (or baseline name)."""
        out = self.work / f"{name}.json"
        if not out.exists():
            run(self.a.kvplan, "validate", "--model", self.a.model, "--text", text, "--part", "0.5:1", "--windows", self.a.windows,
                "--window", self.a.window, "--baselines", baselines, "--out", out, "--plan", *plans)
        found = {c["name"]: c for c in json.loads(out.read_text())["candidates"]}
        return {(plans[0] if n == "plan" else self.work / n if (self.work / n).exists() else n): c for n, c in found.items()}

    def ingredients(self):
        profile = self.profile("prose", self.a.text, self.a.tokens)
        plans = {(row, b): self.plan(f"v{i}", profile, b, changes) for i, (row, changes) in enumerate(VARIANTS) for b in self.bits}
        found = self.validate("ingredients", self.a.text, list(plans.values()), ",".join(f"turboquant:{round(b - .25)}" for b in self.bits))
        print(f"KL in nats per token, {self.a.windows} windows of {self.a.window} tokens, {self.a.tokens} calibration tokens:\n")
        header = ["plan"]
        for b in self.bits:
            header += [f"{b:g} bits", "predicted", "x"]
        rows = []
        for row, _ in VARIANTS:
            cells = [row]
            for b in self.bits:
                c, full = found[plans[row, b]], found[plans[VARIANTS[0][0], b]]
                cells += [f"{c['kl']['mean']:.4f} ± {c['kl']['standard_error']:.4f}", f"{c['predicted_kl']:.4f}",
                          f"{c['kl']['mean'] / full['kl']['mean']:.2f}"]
            rows.append(cells)
        cells = ["TurboQuant"]
        for b in self.bits:
            c, full = found[f"turboquant:{round(b - .25)}"], found[plans[VARIANTS[0][0], b]]
            cells += [f"{c['kl']['mean']:.4f} ± {c['kl']['standard_error']:.4f}", "", f"{c['kl']['mean'] / full['kl']['mean']:.2f}"]
        self.print(header, rows + [cells])

    def mixtures(self):
        prose, code = self.profile("prose", self.a.text, self.a.tokens), self.profile("code", self.a.code_text, self.a.tokens)
        sources = {"prose": prose, "code": code}
        for name, weights in (("prose + code, 1 : 1", (1, 1)), ("prose + code, 3 : 1", (3, 1))):
            folder = self.work / f"profile-{weights[0]}-{weights[1]}"
            if not (folder / "profile.json").exists():
                run(self.a.kvplan, "merge", prose, code, "--weight", *weights, "--out", folder)
            sources[name] = folder
        plans = {name: self.plan(f"mix{i}", p, 3.25, {}) for i, (name, p) in enumerate(sources.items())}
        on = {t: self.validate(f"mixtures-{t}", text, list(plans.values())) for t, text in (("prose", self.a.text), ("code", self.a.code_text))}
        print(f"\nCalibration mixtures at 3.25 bits, {self.a.tokens} tokens of each text, KL on held-out prose and code:\n")
        self.print(["calibrated on", "KL on prose", "KL on code"],
                   [[name, *(f"{on[t][p]['kl']['mean']:.4f} ± {on[t][p]['kl']['standard_error']:.4f}" for t in ("prose", "code"))]
                    for name, p in plans.items()])

    @staticmethod
    def print(header, rows):
        print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
        for row in rows:
            print("| " + " | ".join(row) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text")
    p.add_argument("--code-text")
    p.add_argument("--kvplan", default="build/release/cli/kvplan")
    p.add_argument("--model", default=".cache/model/SmolLM2-135M-Instruct.Q4_1.gguf")
    p.add_argument("--work", default=".cache/ablation")
    p.add_argument("--bits", default="2.25,3.25,4.25")
    for name, value in [("tokens", 65536), ("windows", 24), ("window", 1024)]:
        p.add_argument(f"--{name}", type=int, default=value)
    a = Ablation(p.parse_args())
    a.ingredients()
    if a.a.code_text:
        a.mixtures()


if __name__ == "__main__":
    main()
