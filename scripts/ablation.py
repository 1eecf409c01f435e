#!/usr/bin/env python3
"""Measures what each ingredient of the best plan is worth, and prints the tables of docs/ablation.md as Markdown.

  ablation.py TEXT [--code-text FILE] [--kvplan build/release/cli/kvplan] [--model M.gguf] [--work .cache/ablation] [--jobs 1]
              [--tokens 65536] [--windows 24] [--window 1024] [--bits 2.25,3.25,4.25]

TEXT: WikiText-2 test (wiki.test.raw); calibrates on the first half, evaluates on the second, as scripts/results.py does. Every row is the
best plan with one ingredient removed or replaced, at equal effective bits, on the same windows. --code-text adds the table of calibration
mixtures: plans from prose, from that text and from weighted mixtures, measured on both. Finished steps in --work are kept.
"""
from measurement import Measurement, kl, parser, print_table

EVERYTHING = {"--code": "tcq", "--group-size": 8}
VARIANTS = [  # (row, what replaces or joins the flags of EVERYTHING)
    ("everything: trellis code, groups of 8", {}),
    ("scalar code", {"--code": "scalar"}),
    ("groups of 16", {"--group-size": 16}),
    ("norm in fp16 instead of 8 logarithmic bits", {"--norm": "fp16"}),
    ("least-squares scale instead of unbiased", {"--scale-rule": "biased"}),
    ("no centring", {"--no-centre": None}),
    ("incoherent cost of width 0", {"--no-coherent": None}),
    ("no mixing of equal widths", {"--no-mixing": None}),
    ("identity in place of the Fisher matrix", {"--fisher-shrinkage": 1}),
    ("no shrinkage", {"--fisher-shrinkage": 0, "--moment-shrinkage": 0}),
    ("one width per tensor", {"--merge": "tensor"}),
]


def flags(changes, window):
    return ["--context", window, *(x for pair in {**EVERYTHING, **changes}.items() for x in pair if x is not None)]


def ingredients(m):
    profile = m.profile("prose", m.a.text)
    plans = m.plans(profile, {(row, b): (f"variant{i}-{b:g}", b, flags(changes, m.a.window))
                              for i, (row, changes) in enumerate(VARIANTS) for b in m.bits})
    found = m.validate("ingredients", m.a.text, plans.values())
    print(f"KL in nats per token, {m.a.windows} windows of {m.a.window} tokens, {m.a.tokens} calibration tokens; x: against the first row\n")
    rows = []
    for row, _ in VARIANTS:
        cells = [row]
        for b in m.bits:
            c, full = found[plans[row, b]], found[plans[VARIANTS[0][0], b]]
            cells += [kl(c), f"{c['predicted_kl']:.4f}", f"{c['kl']['mean'] / full['kl']['mean']:.2f}"]
        rows.append(cells)
    print_table(["plan", *(h for b in m.bits for h in (f"{b:g} bits", "predicted", "x"))], rows)


def mixtures(m):
    sources = {"prose": m.profile("prose", m.a.text), "code": m.profile("code", m.a.code_text)}
    for weights in ((1, 1), (3, 1)):
        folder = m.work / "profile-prose-{}-code-{}".format(*weights)
        if not (folder / "profile.json").exists():
            m.run("merge", sources["prose"], sources["code"], "--weight", *weights, "--out", folder)
        sources["prose and code, {} : {}".format(*weights)] = folder
    plans = {}
    for name, profile in sources.items():
        plans |= m.plans(profile, {name: (f"of-{profile.name}", 3.25, flags({}, m.a.window))})
    on = {t: m.validate(f"mixtures-{t}", text, plans.values()) for t, text in (("prose", m.a.text), ("code", m.a.code_text))}
    print(f"\nCalibration mixtures at 3.25 bits, {m.a.tokens} tokens of each text at most:\n")
    print_table(["calibrated on", "KL on held-out prose", "KL on held-out code"],
                [[name, *(kl(on[t][p]) for t in ("prose", "code"))] for name, p in plans.items()])


def main():
    p = parser(__doc__, ".cache/ablation")
    p.add_argument("--code-text")
    m = Measurement(p.parse_args())
    ingredients(m)
    if m.a.code_text:
        mixtures(m)


if __name__ == "__main__":
    main()
