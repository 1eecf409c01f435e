#!/usr/bin/env python3
"""Measures the results tables of README.md and docs/results.md, and prints them as Markdown.

  results.py TEXT [--kvplan build/release/cli/kvplan] [--model M.gguf] [--work .cache/results] [--jobs 1] [--tokens 65536] [--windows 24]
             [--window 1024] [--bits 2.25,3.25,4.25] [--seeds 3] [--long-window 4096] [--long-windows 6]

TEXT: WikiText-2 test (wiki.test.raw). Calibrates on the first half, evaluates on the second: consecutive windows without BOS,
positions from a quarter of the window on, every cached vector but 4 sinks quantised as it is produced (mode worst).
Finished steps in --work are kept, so an interrupted run continues.
"""
import statistics

from measurement import Measurement, kl, parser, print_table

PRODUCTS = {"trellis, groups of 8": ["--code", "tcq", "--group-size", 8], "scalar, groups of 16 (default)": []}
UNIFORM = ["--policy", "uniform"]
FORMATS = ["fp8_e4m3", "q8_0", "q5_1", "q4_1", "iq4_nl", "q4_0", "nvfp4", "mxfp4", "int:4+g32", "kivi:4", "kivi:2", "turboquant:3+nc",
           "turboquant:3+rht", "turboquant:4+prod", "turboquant:3+prod"]


def main_tables(m):
    a, profile = m.a, m.profile("prose", m.a.text)
    context = ["--context", a.window]
    wanted = {(p, b, s): (f"plan{i}-{b:g}-seed{s}", b, [*flags, *context, "--seed", s])
              for i, (p, flags) in enumerate(PRODUCTS.items()) for b in m.bits for s in range(a.seeds)}
    wanted |= {("uniform", b, 0): (f"uniform-{b:g}", b, [*UNIFORM, *context]) for b in m.bits}
    plans = m.plans(profile, wanted)
    turbo = {b: f"turboquant:{round(b - .25)}" for b in m.bits}
    found = m.validate("main", a.text, plans.values(), [*turbo.values(), *FORMATS])
    print(f"KL(fp16 cache || quantised cache) in nats per token, mode worst, {a.windows} windows of {a.window} tokens, {a.tokens} calibration "
          f"tokens, mean of {a.seeds} mixing seeds (± standard error over windows):\n")
    rows = []
    for b in m.bits:
        base = found[turbo[b]]
        for product in PRODUCTS:
            seeds = [found[plans[product, b, s]] for s in range(a.seeds)]
            values = [c["kl"]["mean"] for c in seeds]
            rows.append([f"{b:g}", product, f"{statistics.mean(values):.4f} ± {seeds[0]['kl']['standard_error']:.4f}",
                         f"{max(values) - min(values):.4f}", f"{statistics.mean(c['predicted_kl'] for c in seeds):.4f}",
                         f"{base['kl']['mean'] / statistics.mean(values):.1f}x",
                         f"{100 * statistics.mean(c['perplexity_rise'] for c in seeds):+.2f} %"])
        rows.append([f"{b:g}", "calibrated, one width everywhere", kl(found[plans["uniform", b, 0]]), "", "", "",
                     f"{100 * found[plans['uniform', b, 0]]['perplexity_rise']:+.2f} %"])
        rows.append([f"{b:g}", "TurboQuant", kl(base), "", "", "1x", f"{100 * base['perplexity_rise']:+.2f} %"])
    print_table(["bits", "cache", "KL", "seed range", "predicted", "TurboQuant's KL is", "perplexity"], rows)
    print("\nOther formats on the same windows:\n")
    print_table(["format", "bits", "KL", "p99", "same top-1", "perplexity"],
                [[n, f"{c['effective_bits']:.3f}", kl(c, 5), f"{c['kl']['p99']:.4f}", f"{100 * c['same_top1']:.1f} %",
                  f"{100 * c['perplexity_rise']:+.2f} %"] for n in FORMATS for c in [found[n]]])


def long_context_table(m):
    a, profile = m.a, m.profile("prose", m.a.text)
    plans = m.plans(profile, {c: (f"context-{c}", 3.25, ["--code", "tcq", "--group-size", 8, "--context", c])
                              for c in (a.window, a.long_window)})
    found = m.validate("long", a.text, plans.values(), ["turboquant:3"], a.long_window, a.long_windows)
    print(f"\nWindows of {a.long_window} tokens ({a.long_windows} of them), 3.25 bits, profile made on windows of {a.window}:\n")
    print_table(["plan", "KL", "perplexity"],
                [[label, kl(c), f"{100 * c['perplexity_rise']:+.2f} %"]
                 for label, c in [*((f"--context {c}", found[p]) for c, p in plans.items()), ("TurboQuant", found["turboquant:3"])]])


def main():
    p = parser(__doc__, ".cache/results")
    for name, value in [("seeds", 3), ("long-window", 4096), ("long-windows", 6)]:
        p.add_argument(f"--{name}", type=int, default=value)
    m = Measurement(p.parse_args())
    main_tables(m)
    long_context_table(m)


if __name__ == "__main__":
    main()
