#!/usr/bin/env python3
"""Measures the results tables of README.md and docs/results.md, and prints them as Markdown.

  results.py TEXT [--kvplan build/release/cli/kvplan] [--model M.gguf] [--work .cache/results]
             [--tokens 65536] [--windows 24] [--window 1024] [--bits 2.25,3.25,4.25] [--seeds 3] [--context 1024]
             [--long-window 4096] [--long-windows 6]

TEXT: WikiText-2 test (wiki.test.raw). Calibrates on the first half, evaluates on the second: consecutive windows without BOS,
positions from a quarter of the window on, every cached vector but 4 sinks quantised as it is produced (mode worst).
Finished steps in --work are kept, so an interrupted run continues.
"""
import argparse
import json
import pathlib
import statistics
import subprocess


def run(kvplan, *args):
    subprocess.run([kvplan, *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def candidates(validation):
    return {c["name"]: c for c in json.loads(validation.read_text())["candidates"]}


def mean_and_error(values):
    return statistics.mean(values), (statistics.stdev(values) / len(values) ** .5 if len(values) > 1 else 0)


class Measurement:
    def __init__(self, a):
        self.a, self.bits = a, [float(b) for b in a.bits.split(",")]
        self.work = pathlib.Path(a.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.profile = self.work / "profile"
        if not (self.profile / "profile.json").exists():
            run(a.kvplan, "profile", "--model", a.model, "--text", a.text, "--part", "0:0.5", "--tokens", a.tokens,
                "--window", a.window, "--out", self.profile)

    def plan(self, bits, seed, context, *more):
        folder = self.work / "-".join(["plan", f"{bits:g}", f"seed{seed}", f"ctx{context}", *[m.strip("-") for m in more]])
        if not (folder / "plan.json").exists():
            run(self.a.kvplan, "plan", "--profile", self.profile, "--bits", bits, "--context", context, "--seed", seed, *more,
                "--out", folder)
        return folder

    def validate(self, name, plans, baselines, window, windows):
        out = self.work / f"{name}.json"
        if not out.exists():
            run(self.a.kvplan, "validate", "--model", self.a.model, "--text", self.a.text, "--part", "0.5:1", "--windows", windows,
                "--window", window, "--baselines", ",".join(baselines) or "none", "--out", out, "--plan", *plans)
        return candidates(out)

    def main_table(self):
        a = self.a
        plans = {(b, s): self.plan(b, s, a.context) for b in self.bits for s in range(a.seeds)}
        coarse = {b: self.plan(b, 0, a.context, "--policy", "uniform") for b in self.bits}
        turbo = {b: f"turboquant:{round(b - .25)}" for b in self.bits}
        found = self.validate("main", [*plans.values(), *coarse.values()], [*turbo.values(), "q8_0", "q4_0", "kivi:4", "kivi:2"],
                              a.window, a.windows)
        first = next(iter(plans))
        of = lambda key: found["plan" if key == first else plans[key].name]
        rows = []
        for b in self.bits:
            seeds = [of((b, s)) for s in range(a.seeds)]
            kl, _ = mean_and_error([c["kl"]["mean"] for c in seeds])
            spread = max(c["kl"]["mean"] for c in seeds) - min(c["kl"]["mean"] for c in seeds)
            base = found[turbo[b]]
            rows.append([f"{b:g}", f"{kl:.4f} ± {seeds[0]['kl']['standard_error']:.4f}", f"{spread:.4f}",
                         f"{statistics.mean(c['predicted_kl'] for c in seeds):.4f}", f"{base['kl']['mean']:.4f}",
                         f"{base['kl']['mean'] / kl:.1f}x", f"{100 * statistics.mean(c['perplexity_rise'] for c in seeds):+.2f} %",
                         f"{100 * base['perplexity_rise']:+.2f} %", f"{found[coarse[b].name]['kl']['mean']:.4f}"])
        print(f"KL(fp16 cache || quantised cache) in nats per token, mode worst, {a.windows} windows of {a.window} tokens, "
              f"{a.tokens} calibration tokens, mean of {a.seeds} mixing seeds (± standard error over windows):\n")
        header = ["bits", "kvplan KL", "seed range", "predicted", "TurboQuant KL", "ratio", "kvplan ppl", "TurboQuant ppl",
                  "one width everywhere"]
        self.print(header, rows)
        print("\nOther formats on the same windows:\n")
        self.print(["format", "bits", "KL", "± s.e.", "p99", "same top-1", "perplexity rise"],
                   [[n, f"{c['effective_bits']:.3f}", f"{c['kl']['mean']:.5f}", f"{c['kl']['standard_error']:.5f}",
                     f"{c['kl']['p99']:.4f}", f"{100 * c['same_top1']:.1f} %", f"{100 * c['perplexity_rise']:+.2f} %"]
                    for n, c in found.items() if n in ("q8_0", "q4_0", "kivi:4", "kivi:2")])

    def long_context_table(self):
        a = self.a
        contexts = [self.plan(3.25, 0, c) for c in (a.window, a.long_window)]
        found = self.validate("long", contexts, ["turboquant:3"], a.long_window, a.long_windows)
        print(f"\nWindows of {a.long_window} tokens ({a.long_windows} of them), 3.25 bits, profile made on windows of {a.window}:\n")
        self.print(["plan", "KL", "± s.e.", "perplexity rise"],
                   [[label, f"{c['kl']['mean']:.4f}", f"{c['kl']['standard_error']:.4f}", f"{100 * c['perplexity_rise']:+.2f} %"]
                    for label, c in [(f"--context {a.window}", found["plan"]), (f"--context {a.long_window}", found[contexts[1].name]),
                                     ("TurboQuant", found["turboquant:3"])]])

    @staticmethod
    def print(header, rows):
        print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
        for row in rows:
            print("| " + " | ".join(row) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text")
    p.add_argument("--kvplan", default="build/release/cli/kvplan")
    p.add_argument("--model", default=".cache/model/SmolLM2-135M-Instruct.Q4_1.gguf")
    p.add_argument("--work", default=".cache/results")
    p.add_argument("--bits", default="2.25,3.25,4.25")
    for name, value in [("tokens", 65536), ("windows", 24), ("window", 1024), ("seeds", 3), ("context", 1024), ("long-window", 4096),
                        ("long-windows", 6)]:
        p.add_argument(f"--{name}", type=int, default=value)
    m = Measurement(p.parse_args())
    m.main_table()
    m.long_context_table()


if __name__ == "__main__":
    main()
