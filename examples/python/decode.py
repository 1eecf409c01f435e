"""Decode steps on the CUDA runtime from Python: random vectors go into a cache that a plan lays out;
attention from its packed pages is compared with torch over the de-quantised vectors.

  python decode.py --library build/kernels/libkvplan_runtime.so --plan PLAN [--tokens 1000] [--steps 20]
"""

import argparse
import json
import sys
from pathlib import Path

from kvplan_runtime import Error, Geometry, Library, Runtime

TOLERANCE = 5e-3  # relative, fp16 outputs


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--library", required=True, help="path of libkvplan_runtime.so")
    parser.add_argument("--plan", required=True, help="a plan's folder")
    parser.add_argument("--tokens", type=int, default=1000, help="of each sequence before the steps")
    parser.add_argument("--steps", type=int, default=20, help="of one token per sequence")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--queries-per-kv", type=int, default=4)
    return parser.parse_args()


def attention(torch, q, k, v):
    """q [query_heads, d], k and v [tokens, kv_heads, d] -> [query_heads, d], in double."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q.double(), k) / q.shape[1] ** 0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def main():
    options = parse()
    library = Library(options.library)
    device = library.device()
    import torch  # only once there is a GPU to use it with

    print(f"{device.name.decode()}, {device.multiprocessors} multiprocessors")
    plan = Path(options.plan)
    model = json.loads((plan / "plan.json" if plan.is_dir() else plan).read_text())["model"]
    geometry = Geometry(query_heads=model["kv_heads"] * options.queries_per_kv,
                        max_sequences=options.sequences,
                        max_tokens=options.tokens + options.steps, max_query_tokens=1)

    torch.manual_seed(0)
    worst = 0.0
    with Runtime(library, plan, geometry) as runtime:
        shape, size = runtime.shape(), runtime.size()
        for name, _ in size._fields_:
            print(f"  {name:12} {getattr(size, name):14,} bytes")
        stream = torch.cuda.current_stream().cuda_stream

        def random(rows, heads):
            return torch.randn(rows, heads, shape.head_dim, device="cuda").half()

        slots = list(range(options.sequences))
        for step in range(options.steps + 1):
            tokens = options.tokens if step == 0 else 1  # the first fills the cache
            rows = tokens * len(slots)
            runtime.begin_step(slots, [tokens] * len(slots), stream)
            for layer in range(shape.num_layers):
                k, v = random(rows, shape.kv_heads), random(rows, shape.kv_heads)
                runtime.append(layer, k.data_ptr(), v.data_ptr(), stream)
                if step == 0:
                    continue
                q = random(rows, shape.query_heads)
                out = torch.empty_like(q)
                runtime.attend(layer, q.data_ptr(), out.data_ptr(), stream=stream)
                if layer > 0 and step < options.steps:
                    continue
                for i, slot in enumerate(slots):
                    length = runtime.length(slot)
                    stored = torch.empty(2, length, shape.kv_heads, shape.head_dim, device="cuda",
                                         dtype=torch.half)
                    runtime.read_back(layer, slot, 0, length, stored[0].data_ptr(),
                                      stored[1].data_ptr(), stream)
                    expected = attention(torch, q[i], stored[0], stored[1])
                    worst = max(worst, ((out[i] - expected).norm() / expected.norm()).item())
        print(f"{options.steps} steps, {shape.num_layers} layers, {runtime.length(0)} tokens: largest "
              f"relative difference to torch {worst:.2e}, {runtime.free_blocks()} blocks free")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Error as error:
        sys.exit(f"{error.status}: {error}")
