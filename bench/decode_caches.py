"""What bench/decode.py times: packed caches of the runtime, and fp16 caches read by other attention kernels."""
import json
import math
import pathlib
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "python"))
from kvplan_runtime import Geometry, Runtime

DEVICE = "cuda"
PAGE_TOKENS = 64
FILL_BYTES = 128 << 20  # of one side of the chunks that fill a cache


@dataclass(frozen=True)
class Shape:
    """One token of each of `batch` sequences attends to `context` tokens."""
    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self):
        return f"{self.batch}x{self.context // 1024}k {self.query_heads}/{self.kv_heads} d{self.head_dim}"

    @property
    def fp16_bytes(self):
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim


def rotations(touched_bytes, l2_bytes):
    """Equal caches to read in turn so that more than three times the L2 cache lies between two reads of one."""
    return max(1, math.ceil(3 * l2_bytes / touched_bytes))


class PackedCache:
    """A runtime of a plan of one layer, for the sequences of a shape."""

    def __init__(self, library, plan, shape):
        self.shape = shape
        self.runtime = Runtime(library, plan, self.geometry(shape))

    @staticmethod
    def geometry(shape):
        return Geometry(query_heads=shape.query_heads, max_sequences=shape.batch, max_tokens=shape.context,
                        max_query_tokens=1)

    @staticmethod
    def stored_bytes(size, shape, sink_tokens):
        """Of the keys and values that one step reads: packed pages, fp16 sinks and open pages."""
        pages = (shape.context - sink_tokens) // PAGE_TOKENS
        plain = shape.context - pages * PAGE_TOKENS
        return shape.batch * (pages * size.block_bytes + plain * 4 * shape.kv_heads * shape.head_dim)

    def begin_step(self, tokens):
        batch = self.shape.batch
        self.runtime.begin_step(range(batch), [tokens] * batch, current_stream())

    def append(self, k, v):
        self.runtime.append(0, k.data_ptr(), v.data_ptr(), current_stream())

    def attend(self, q, out):
        self.runtime.attend(0, q.data_ptr(), out.data_ptr(), stream=current_stream())

    def fill(self, tokens):
        """Appends `tokens` random tokens to every sequence; the chunks repeat, the pages are their own."""
        s = self.shape
        chunk = max(1, min(tokens, FILL_BYTES // (2 * s.batch * s.kv_heads * s.head_dim)))
        k, v = random_vectors(2, s.batch * chunk, s.kv_heads, s.head_dim)
        for first in range(0, tokens, chunk):
            self.begin_step(min(chunk, tokens - first))
            self.append(k, v)

    def read_back(self, slot, count):
        """Keys and values [count, kv_heads, head_dim] as attention reads them."""
        k = torch.empty(count, self.shape.kv_heads, self.shape.head_dim, dtype=torch.float16, device=DEVICE)
        v = torch.empty_like(k)
        self.runtime.read_back(0, slot, 0, count, k.data_ptr(), v.data_ptr(), current_stream())
        return k, v

    def close(self):
        self.runtime.close()


def current_stream():
    return torch.cuda.current_stream().cuda_stream


def random_vectors(*sizes):
    """Of unit scale."""
    return torch.randn(*sizes, dtype=torch.float16, device=DEVICE)


def read_plan(folder):
    return json.loads((pathlib.Path(folder) / "plan.json").read_text())


def relative_error(library, plan, query_heads, contexts):
    """Largest error of kvplan_attend against attention in double over kvplan_read_back, of the norm of the output."""
    model = read_plan(plan)["model"]
    worst = 0.0
    for context in contexts:
        shape = Shape(2, context, query_heads, model["kv_heads"], model["head_dim"])
        cache = PackedCache(library, plan, shape)
        try:
            if context > 1:
                cache.fill(context - 1)
            cache.begin_step(1)
            cache.append(*random_vectors(2, shape.batch, shape.kv_heads, shape.head_dim))
            q = random_vectors(shape.batch, query_heads, shape.head_dim)
            out = torch.empty_like(q)
            cache.attend(q, out)
            for slot in range(shape.batch):
                k, v = (x.double().repeat_interleave(query_heads // shape.kv_heads, 1)
                        for x in cache.read_back(slot, context))
                scores = torch.einsum("hd,thd->ht", q[slot].double(), k) / math.sqrt(shape.head_dim)
                expected = torch.einsum("ht,thd->hd", scores.softmax(1), v)
                worst = max(worst, ((out[slot].double() - expected).norm() / expected.norm()).item())
        finally:
            cache.close()
    return worst


class Fp16Caches:
    """`copies` fp16 caches of a shape, and the attention kernels that read them with the query group as rows."""

    def __init__(self, shape, copies):
        self.shape = shape
        sizes = (copies, 2, shape.batch, shape.kv_heads, shape.context, shape.head_dim)
        self.kv = torch.empty(sizes, dtype=torch.float16, device=DEVICE)
        self.kv.view(-1, shape.context * shape.head_dim)[:] = random_vectors(shape.context * shape.head_dim)
        self.q = random_vectors(shape.batch, shape.kv_heads, shape.query_heads // shape.kv_heads, shape.head_dim)

    def sdpa(self, backend):
        def attend(i):
            k, v = self.kv[i % len(self.kv)]
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(self.q, k, v)

        return attend

    def flashinfer(self):
        """FlashInfer's paged decode over the same memory as pages of 64 tokens."""
        import flashinfer  # optional

        s = self.shape
        pages = s.context // PAGE_TOKENS
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE), kv_layout="HND", use_tensor_cores=True)
        wrapper.plan(
            torch.arange(s.batch + 1, dtype=torch.int32, device=DEVICE) * pages,
            torch.arange(s.batch * pages, dtype=torch.int32, device=DEVICE),
            torch.full((s.batch,), PAGE_TOKENS, dtype=torch.int32, device=DEVICE),
            s.query_heads, s.kv_heads, s.head_dim, PAGE_TOKENS, q_data_type=torch.float16)
        q = self.q.reshape(s.batch, s.query_heads, s.head_dim)
        out = torch.empty_like(q)
        paged = self.kv.view(len(self.kv), 2, s.batch * pages, s.kv_heads, PAGE_TOKENS, s.head_dim)

        def attend(i):
            k, v = paged[i % len(paged)]
            wrapper.run(q, (k, v), out=out)

        return attend

    def kernels(self):
        """Name -> maker of a call of the i-th cache."""
        return {"sdpa_flash": lambda: self.sdpa(SDPBackend.FLASH_ATTENTION),
                "sdpa_cudnn": lambda: self.sdpa(SDPBackend.CUDNN_ATTENTION),
                "sdpa_efficient": lambda: self.sdpa(SDPBackend.EFFICIENT_ATTENTION),
                "flashinfer": self.flashinfer}
