#!/usr/bin/env python3
"""What profiling and validating a large model takes on many GPUs: memory, traffic and time from formulas, as Markdown.

  scripts/scaling.py [--gpus 64] [--tokens 131072] [--window 1024]

Every formula is in this file, its inputs are the configurations below and the machine's figures; docs/scaling.md has the output.
"""
import argparse
import dataclasses

GIB = 2**30


@dataclasses.dataclass
class Model:
    name: str
    layers: int
    hidden: int
    inner: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def layer_parameters(self):
        projections = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return projections + 3 * self.hidden * self.inner

    @property
    def parameters(self):
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden

    @property
    def cache_bytes_per_token(self):
        """fp16 keys and values."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


# config.json of meta-llama/Llama-3.1-{8B,70B,405B}.
MODELS = [Model("8B", 32, 4096, 14336, 32, 8, 128, 128256),
          Model("70B", 80, 8192, 28672, 64, 8, 128, 128256),
          Model("405B", 126, 16384, 53248, 128, 8, 128, 128256)]


@dataclasses.dataclass
class Machine:
    """One GPU of an H200 host and its share of the host: vendor's figures, and shares of them that are taken to be reached."""
    memory: float = 141e9
    bf16_flops: float = 989e12 * 0.4      # dense tensor cores
    fp32_flops: float = 67e12 * 0.6
    fp64_flops: float = 67e12 * 0.3
    host_to_gpu: float = 55e9 * 0.8       # PCIe 5 x16
    disk: float = 3e9                     # NVMe, per GPU
    network: float = 50e9 * 0.5           # 400 Gb/s per GPU


def sums_bytes(m):
    """F64 sums of one tree node: outer and fisher [d, d], vectors, both sides."""
    d = m.head_dim
    return m.layers * m.kv_heads * 2 * (2 * d * d + 4 * d) * 8


def coherent_bytes(m):
    """F32 rows of one window: cross [d, d], phase [d, d + 1] and [d, 1]."""
    d = m.head_dim
    return m.layers * m.kv_heads * (2 * d * d + d * (d + 1) + d) * 4


def forward_flops(m, tokens, window):
    """Two per parameter and token, and causal attention: 4 d per head, query and visible key."""
    return tokens * (2 * (m.parameters - m.vocabulary * m.hidden) + 4 * m.layers * m.query_heads * m.head_dim * (window / 2))


def fisher_flops(m, tokens, window):
    """Forward, the same again with a graph, backward twice that; the head's gradient once more instead of twice."""
    return 4 * forward_flops(m, tokens, window)


def statistics_flops(m, tokens):
    """Outer products in F64: moments and fisher of both sides (cross and phase of coherent windows left out)."""
    return tokens * m.layers * m.kv_heads * 4 * 2 * m.head_dim**2


def streamed_bytes(m, bytes_per_weight):
    """Two layers, or one and the head, which stays float32."""
    layer = m.layer_parameters * bytes_per_weight
    return layer + max(layer, 4 * m.vocabulary * m.hidden)


def boundary_bytes(m, tokens):
    """Float32 inputs of all layers and the output of the last."""
    return 4 * tokens * m.hidden * (m.layers + 1)


def graph_bytes(m, tokens):
    """forward/memory_plan.cpp, layer_bytes with gradients."""
    heads = (m.query_heads + 2 * m.kv_heads) * m.head_dim
    return 4 * (tokens * (12 * m.hidden + 6 * heads) + min(tokens, 4096) * 6 * m.inner)


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def gib(n):
    return f"{n / GIB:.2f}" if n < 10 * GIB else f"{n / GIB:.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--long-window", type=int, default=131072)
    args = parser.parse_args()
    g, machine = args.gpus, Machine()
    windows = args.tokens // args.window
    per_gpu = -(-windows // g)  # lockstep waits for the one with most
    tokens = per_gpu * args.window

    print(f"### Memory (GiB): weights in bf16, one window of {args.window} tokens at a time\n")
    table(["model", "all weights", "streamed weights", "graph of a layer", "boundaries of a window", "sums of a window", "64 coherent rows",
           "one H200 holds all"],
          [[m.name, gib(2 * m.parameters), gib(streamed_bytes(m, 2)), gib(graph_bytes(m, args.window)),
            gib(boundary_bytes(m, args.window)), gib(sums_bytes(m)), gib(64 * coherent_bytes(m)),
            "yes" if 2 * m.parameters + 4 * m.vocabulary * m.hidden * 2 < 0.9 * machine.memory else "no"] for m in MODELS])

    print(f"### Time of a profile: {args.tokens} tokens, windows of {args.window}, {g} GPUs, {per_gpu} windows each\n")
    rows = []
    for m in MODELS:
        compute = fisher_flops(m, tokens, args.window) / machine.bf16_flops + statistics_flops(m, tokens) / machine.fp64_flops
        weights = 2 * (m.parameters - m.vocabulary * m.hidden)
        resident = 2 * m.parameters < 0.9 * machine.memory
        # All windows of a GPU are one group, read twice (up and down); reading overlaps with work on the layer before.
        disk = weights / machine.disk if resident else 2 * weights / machine.disk
        link = weights / machine.host_to_gpu if resident else 2 * weights / machine.host_to_gpu
        total = compute + disk if resident else max(compute, disk, link)
        rows.append([m.name, duration(compute), duration(disk), duration(link), duration(total),
                     f"{g * per_gpu * args.window / total:.0f}", f"{max(disk, link) / compute:.1f}"])
    table(["model", "work", "reading the file", "over PCIe", "in all", "tokens/s", "reading / work"], rows)

    print(f"### Traffic to rank 0 of {g}: each sends the nodes of its tree once\n")
    rows = []
    for m in MODELS:
        nodes = 2 if per_gpu & (per_gpu - 1) else 1  # windows in aligned powers of two are one node
        coherent = 64 * coherent_bytes(m)
        amount = (g - 1) * nodes * sums_bytes(m) + coherent
        rows.append([m.name, gib(nodes * sums_bytes(m)), gib(coherent), gib(amount), duration(amount / machine.network)])
    table(["model", "GiB from each", "coherent rows, GiB", "GiB in all", "time"], rows)

    window = args.long_window
    print(f"### One window of {window} tokens: profile and validation of context\n")
    rows = []
    for m in MODELS:
        compute = fisher_flops(m, window, window) / machine.bf16_flops
        rows.append([m.name, gib(graph_bytes(m, window)), gib(boundary_bytes(m, window)), gib(window * m.cache_bytes_per_token),
                     gib(2 * 4 * window * m.hidden), duration(compute), duration(forward_flops(m, window, window) / machine.bf16_flops)])
    table(["model", "graph of a layer", "boundaries (spilled)", "fp16 cache", "streams of validate, per pass", "profile, one GPU",
           "forward, one GPU"], rows)
    print(f"{g} GPUs take {g} such windows in the same time.")


if __name__ == "__main__":
    main()
