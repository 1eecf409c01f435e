#!/usr/bin/env python3
"""Markdown tables of runs of decode.py.

  decode_report.py RUN.json... [--rows REGEX]

Rows of several runs on one GPU are put together; of a row measured twice the last run's counts.
"""
import argparse
import json
import pathlib
import re
import sys

# At least 1 GB of fp16 keys and values, head_dim 128 (docs/performance.md): ratio to the best fp16 of the run.
LARGE_BYTES = 1e9
FLOORS = {"bits8": 1.85, "bits4": 3.6, "bits3": 4.2, "bits2": 5.6, "mixed8": 4.0, "mixed16": 4.0}
LONG_ROW, LONG_FLOOR = ("1x32k 32/8 d128", "bits4"), 2.8
APPEND_CEILING = 0.05

NAMES = {"bits2": "2 bits", "bits3": "3 bits", "bits4": "4 bits", "bits8": "8 bits", "k4v2": "K 4, V 2 bits",
         "k3v2": "K 3, V 2 bits", "mixed8": "mixed, groups of 8", "mixed16": "mixed, groups of 16",
         "trellis8": "trellis, groups of 8", "fp16": "fp16"}


def table(header, rows):
    """Markdown; figures to the right, the first two columns to the left."""
    lines = [header, ["---" if i < 2 else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def cells(row):
    attend = row["attend"]
    return [row["shape"], NAMES[row["plan"]], f"{row['effective_bits']:.2f}", f"{attend['median_us']:.1f}",
            f"{100 * attend['spread']:.1f} %", f"{row['terabytes_per_second']:.2f}", f"{row['of_copy']:.2f}",
            f"{row['fp16'][row['fp16_best']]['median_us']:.1f}", row["fp16_best"].removeprefix("sdpa_"),
            f"{row['ratio']:.2f}x", f"{row['append_us']:.1f}", f"{100 * row['append_share']:.1f} %"]


HEADER = ["shape", "plan", "bits", "µs", "spread", "TB/s", "of copy", "fp16 µs", "fp16 kernel", "ratio", "append µs",
          "share"]


def shortfalls(rows):
    """Sentences on rows that miss what the project asks of them."""
    for row in rows:
        name, ratio = f"{row['shape']}, {NAMES[row['plan']]}", row["ratio"]
        large = row["fp16_bytes"] >= LARGE_BYTES and row["head_dim"] == 128
        floor = FLOORS.get(row["plan"], 1.0) if large else 1.0
        if (row["shape"], row["plan"]) == LONG_ROW:
            floor = LONG_FLOOR
        if row["plan"] != "fp16" and ratio < floor:
            yield f"{name}: {ratio:.2f}x, asked for {floor:g}x"
        if row["append_share"] > APPEND_CEILING:
            yield f"{name}: append takes {100 * row['append_share']:.1f} % of attention, asked for {APPEND_CEILING:.0%}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=pathlib.Path)
    p.add_argument("--rows", type=re.compile, default=re.compile(""), help="regular expression on 'SHAPE PLAN'")
    options = p.parse_args()
    runs = [json.loads(path.read_text()) for path in options.runs]
    if len({run["gpu"] for run in runs}) != 1:
        sys.exit("the runs are of different GPUs: " + ", ".join(run["gpu"] for run in runs))
    for run in runs:
        print(f"{run['gpu']}, driver {run['driver']}, torch {run['torch']}, cuDNN {run['cudnn']}, revision "
              f"{run['revision']}; copy {run['copy_terabytes_per_second']:.2f} TB/s; SM, memory and highest SM clock, "
              f"power, temperature: {run['clocks_before']} before, {run.get('clocks_after')} after; "
              f"median of {run['repeats']}; `{' '.join(run['flags'])}`\n")
        if "check" in run:
            print(f"Largest relative error of the {len(run['check'])} plans checked: "
                  f"{max(run['check'].values()):.1e}\n")
    latest = {(row["shape"], row["plan"]): row for run in runs for row in run["rows"]}
    rows = [row for (shape, plan), row in latest.items() if options.rows.search(f"{shape} {plan}")]
    print(table(HEADER, [cells(row) for row in rows]))
    missed = list(shortfalls(rows))
    print("\nShort of the targets:\n\n" + "\n".join(f"- {line}" for line in missed)
          if missed else "\nEvery row reaches its target.")
    left = [item for run in runs for item in run["left_out"]
            if (item["shape"], item["plan"]) not in latest and not
            (item["plan"] == "" and any(shape == item["shape"] for shape, _ in latest))]
    if left:
        print("\nNot measured: " + "; ".join(f"{i['shape']} {i['plan']}".strip() + f" ({i['why']})" for i in left))


if __name__ == "__main__":
    main()
