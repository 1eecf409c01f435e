#!/usr/bin/env python3
"""Forward speed and perplexity beside llama.cpp: same GGUF, tokens, machine and run, the two in turn.

  forward_vs_llama_cpp.py FORWARD_BENCH MODEL.gguf TEXT [--windows 6] [--window 512] [--threads 2] [--rounds 3]

Needs llama-cpp-python (PyPI). Both compute the logits of every position. Prints a Markdown table.
"""
import argparse
import json
import statistics
import subprocess
import time

import numpy as np
from llama_cpp import Llama


def llama_round(llm, windows):
    """Seconds and total negative log-likelihood over all windows."""
    start, nll = time.perf_counter(), 0.0
    for ids in windows:
        llm.reset()
        llm.eval(ids)
        logits = llm.scores[:len(ids) - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    return time.perf_counter() - start, nll


def llama_seconds(llm, windows):
    """Seconds of the evaluation alone, without our numpy perplexity."""
    start = time.perf_counter()
    for ids in windows:
        llm.reset()
        llm.eval(ids)
    return time.perf_counter() - start


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("forward_bench"), a.add_argument("model"), a.add_argument("text")
    a.add_argument("--windows", type=int, default=6), a.add_argument("--window", type=int, default=512)
    a.add_argument("--threads", type=int, default=2), a.add_argument("--rounds", type=int, default=3)
    a = a.parse_args()
    llm = Llama(a.model, n_ctx=a.window, n_batch=a.window, n_ubatch=a.window, n_threads=a.threads, n_threads_batch=a.threads,
                logits_all=True, verbose=False)
    ids = llm.tokenize(open(a.text, "rb").read()[:8 * a.windows * a.window], add_bos=False, special=False)
    windows = [ids[i * a.window:(i + 1) * a.window] for i in range(a.windows)]
    _, nll = llama_round(llm, windows)
    theirs, ours, perplexity = [], [], 0
    for _ in range(a.rounds):
        theirs.append(llama_seconds(llm, windows))
        out = subprocess.run([a.forward_bench, a.model, a.text, "--windows", str(a.windows), "--window", str(a.window),
                              "--threads", str(a.threads), "--rounds", "1"], check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(out.stdout)
        ours.append(result["forward_seconds"])
        perplexity = result["perplexity"]
    tokens = a.windows * a.window
    ratio = statistics.median(t / o for t, o in zip(theirs, ours))
    print(f"| {a.windows} windows of {a.window}, {a.threads} threads | tokens/s | perplexity |\n|---|---:|---:|")
    print(f"| kvplan (fp32) | {tokens / statistics.median(ours):.0f} | {perplexity:.3f} |")
    print(f"| llama.cpp (8-bit activations) | {tokens / statistics.median(theirs):.0f} | "
          f"{np.exp(nll / (a.windows * (a.window - 1))):.3f} |")
    print(f"\nspeed ratio kvplan / llama.cpp, median of {a.rounds} pairs: {ratio:.2f}")


if __name__ == "__main__":
    main()
