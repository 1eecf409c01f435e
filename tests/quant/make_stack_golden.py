"""Prints the golden bytes of StackCodecs.MatchTheStacks: one head of 64 values as serving stacks store it, by numpy and torch
re-implementations of their kernels (vLLM 0.33.0, LMDeploy 0.18.0, KVTuner), and by the package `gguf` for llama.cpp's types.
With --signs it prints vLLM's sign flips (quant/stack_codes.cpp, kFlipped). pip install gguf numpy torch"""
import math
import sys

import gguf
import numpy as np
import torch

D = 64
f16, f32 = np.float16, np.float32


def pack(codes, bits):
    """Bit fields, lowest bit first."""
    stream = np.concatenate([[(int(c) >> b) & 1 for b in range(bits)] for c in codes])
    return np.packbits(stream.astype(np.uint8), bitorder="little").tobytes()


def hadamard(d):
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return h


def half_away(x):
    return np.trunc(np.where(x >= 0, x + f32(.5), x - f32(.5)))


def vllm_signs(d):
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return (2 * torch.bernoulli(torch.full((d,), .5), generator=generator) - 1).numpy()


def vllm_int8(x):
    scale = max(f32(np.abs(x).max() / f32(127)), f32(1e-6))
    codes = np.clip(np.where(x * (f32(1) / scale) >= 0, x * (f32(1) / scale) + f32(.5), x * (f32(1) / scale) - f32(.5)), -128, 127)
    return np.trunc(codes).astype(np.int8).tobytes() + f32(scale).tobytes()


def vllm_int4(x):
    y = (hadamard(D) @ (x * vllm_signs(D))).astype(f32)
    scale = max(f32((y.max() - y.min()) / f32(15)), f32(1e-6))
    zero = np.clip(half_away(-y.min() / scale), 0, 15)
    codes = np.clip(half_away(y * (f32(1) / scale) + zero), 0, 15)
    word = (f32(scale).view(np.uint32) & 0xFFFFFFF0) | np.uint32(zero)
    return pack(codes, 4) + np.uint32(word).tobytes()


def vllm_centroids(d, bits):
    sigma2 = 1 / d
    pdf = lambda t: 1 / math.sqrt(2 * math.pi * sigma2) * math.exp(-t * t / (2 * sigma2))

    def trapezoids(f, a, b):
        h = (b - a) / 200
        return (.5 * (f(a) + f(b)) + sum(f(a + i * h) for i in range(1, 200))) * h
    low, high, n = -3.5 * math.sqrt(sigma2), 3.5 * math.sqrt(sigma2), 2 ** bits
    levels = [low + (high - low) * (i + .5) / n for i in range(n)]
    for _ in range(200):
        edges = [3 * low] + [(a + b) / 2 for a, b in zip(levels, levels[1:])] + [3 * high]
        masses = [trapezoids(pdf, a, b) for a, b in zip(edges, edges[1:])]
        new = [trapezoids(lambda t: t * pdf(t), a, b) / m if m > 1e-15 else c for a, b, m, c in zip(edges, edges[1:], masses, levels)]
        if max(abs(a - b) for a, b in zip(new, levels)) < 1e-10:
            break
        levels = new
    return np.array(levels, f32)


def vllm_turbo_key(x, bits):
    levels = vllm_centroids(D, bits)
    norm = np.linalg.norm(x)
    y = (x / (norm + 1e-8)) @ (hadamard(D) / math.sqrt(D))
    return pack(np.searchsorted((levels[:-1] + levels[1:]) / 2, y, side="right"), bits) + f16(norm).tobytes()


def vllm_turbo_value(x, bits):
    top = 2 ** bits - 1
    scale = max(f32((x.max() - x.min()) / f32(top)), f32(1e-8))
    codes = np.clip(np.trunc((x - x.min()) / scale + f32(.5)), 0, top)
    return pack(codes, bits) + f16(scale).tobytes() + f16(x.min()).tobytes()


def lmdeploy(x, bits):
    if bits == 8:
        x = x.astype(f16)
        scale = f16((x.max() - x.min()) / f16(255))
        zero = f16(-x.min() / scale)
        codes = ((x / scale).astype(f16) + zero).astype(f16) + f16(.5)
        return np.trunc(codes).astype(np.uint8).tobytes() + scale.tobytes() + zero.tobytes()
    scale = f32((x.max() - x.min()) / f32(15))
    zero = f32(-x.min() / scale)
    codes = np.trunc(x / scale + zero + f32(.5)).astype(np.uint8)
    return (codes[:D // 2] | codes[D // 2:] << 4).tobytes() + f16(scale).tobytes() + f16(zero).tobytes()


def lmdeploy_turbo(x, key):
    levels, edges = {True: ([-2.1519456, -1.3439093, -.7560052, -.2450942, .2450942, .7560052, 1.3439093, 2.1519456],
                            [-1.7479274, -1.0499573, -.5005497, 0, .5005497, 1.0499573, 1.7479274]),
                     False: ([-1.5104176, -.4527808, .4527808, 1.5104176], [-.9815992, 0, .9815992])}[key]
    y = (x @ (hadamard(D) / math.sqrt(D))).astype(f16).astype(np.float64)
    norm = math.sqrt((y * y).sum() + 1e-8)
    u = y / norm
    codes = np.searchsorted(np.array(edges) / math.sqrt(D), u, side="left")
    if not key:
        fields = codes.reshape(4, D // 4)
        return (fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6).astype(np.uint8).tobytes() + f16(norm).tobytes()
    left = u - np.array(levels)[codes] / math.sqrt(D)
    fields = (codes | (left >= 0) * 8).reshape(2, D // 2)
    return ((fields[0] | fields[1] << 4).astype(np.uint8).tobytes() + f16(norm).tobytes()
            + f16(math.sqrt((left * left).sum() + 1e-8) / math.sqrt(D)).tobytes())


def kvtuner(x, bits):
    """One group of 32 values: torch in half precision, as the original."""
    out, low = b"", -2 ** (bits - 1)
    for group in torch.tensor(x).half().reshape(-1, 32):
        scale = (group.max() - group.min()).clamp(min=1e-5).div(2 ** bits - 1)
        zero = (group.min() / scale).round() - low
        codes = torch.round(group / scale - zero).clip(low, -low - 1)
        out += scale.numpy().tobytes() + zero.numpy().tobytes() + pack(codes.int().numpy() - low, bits)
    return out


def hf(x, bits, group):
    out = b""
    for part in torch.tensor(x).reshape(-1, group):
        step = ((part.max() - part.min()) / (2 ** bits - 1)).clamp_min(1e-8)
        out += pack(((part - part.min()) / step).round().int().numpy(), bits) + step.numpy().tobytes() + part.min().numpy().tobytes()
    return out


def q6_0(x):
    """quantize_row_q6_0_ref of ik_llama.cpp; gguf knows no such type."""
    out = b""
    for block in x.reshape(-1, 32):
        scale = f32(block[np.argmax(np.abs(block))] / f32(-32))
        codes = np.minimum(63, np.trunc(block * (f32(1) / scale) + f32(32.5))).astype(np.uint8)
        high = np.zeros(8, np.uint8)
        for j in range(16):
            high[j % 8] |= (codes[j] >> 4 | codes[j + 16] >> 4 << 2) << 4 * (j // 8)
        out += f16(scale).tobytes() + high.tobytes() + (codes[:16] & 15 | (codes[16:] & 15) << 4).tobytes()
    return out


def wht(x, tile):
    return (x.reshape(-1, tile) @ (hadamard(tile) / math.sqrt(tile))).astype(f32).reshape(-1)


def ggml(x, name):
    return gguf.quants.quantize(x.reshape(1, -1), gguf.GGMLQuantizationType[name.upper()]).tobytes()


if "--signs" in sys.argv:
    flips = "".join("1" if s < 0 else "0" for s in vllm_signs(512))
    print(", ".join(f"0x{int(flips[i:i + 32][::-1], 2):08x}" for i in range(0, 512, 32)))
    sys.exit()
x = np.array([(i * 37 % 101 - 50) / 16 for i in range(D)], f32)
rows = [("int8_per_token_head", vllm_int8(x), None), ("int4_per_token_head", vllm_int4(x), None),
        ("turboquant_4bit_nc", vllm_turbo_key(x, 4), vllm_turbo_value(x, 4)),
        ("turboquant_3bit_nc", vllm_turbo_key(x, 3), vllm_turbo_value(x, 3)),
        ("lmdeploy_int8", lmdeploy(x, 8), None), ("lmdeploy_int4", lmdeploy(x, 4), None),
        ("lmdeploy_turbo", lmdeploy_turbo(x, True), lmdeploy_turbo(x, False)),
        ("kvtuner:2+pertoken", kvtuner(x, 2), None), ("kvtuner:4+pertoken", kvtuner(x, 4), None),
        ("hf:3+g64", hf(x, 3, 64), None), ("hf:4+g32", hf(x, 4, 32), None), ("q6_0", q6_0(x), None),
        ("q4_0+wht=64", ggml(wht(x, 64), "q4_0"), None), ("q8_0+wht=16", ggml(wht(x, 16), "q8_0"), None),
        ("q5_1+wht=64", ggml(wht(x, 64), "q5_1"), None)]
for name, key, value in rows:
    print(name, key.hex(), (value or key).hex())
