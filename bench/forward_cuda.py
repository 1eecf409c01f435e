#!/usr/bin/env python3
"""Tokens per second of kvplan's forward pass and profile on a GPU, beside PyTorch on the same shapes.

  bench/forward_cuda.py --forward-bench build/release/bench/forward_bench --model M.gguf --text T [--windows 128] [--batch 8]
                        [--dtype fp32] [--out F.json]

The other side is transformers' LlamaForCausalLM with scaled_dot_product_attention when transformers is installed, else the same model
written in plain PyTorch below (the output says which). Its weights are random: speed depends on shapes alone. Forward computes the
logits of every position; the counterpart of a profile is a forward with gradients of sampled labels with respect to keys and values.
TF32 is off on both sides. Medians of --rounds after a warm-up.
"""
import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

# SmolLM2-135M.
SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)


class PlainLlama(torch.nn.Module):
    """The forward pass of a llama in a few lines."""

    def __init__(self, vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads):
        super().__init__()
        self.heads, self.kv_heads, self.dim = num_attention_heads, num_key_value_heads, hidden_size // num_attention_heads
        shapes = dict(q=(hidden_size, hidden_size), k=(self.kv_heads * self.dim, hidden_size), v=(self.kv_heads * self.dim, hidden_size),
                      o=(hidden_size, hidden_size), gate=(intermediate_size, hidden_size), up=(intermediate_size, hidden_size),
                      down=(hidden_size, intermediate_size))
        self.embedding = torch.nn.Parameter(torch.randn(vocab_size, hidden_size) * 0.02)
        self.layers = torch.nn.ModuleList([torch.nn.ParameterDict({
            **{name: torch.nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()},
            **{name: torch.nn.Parameter(torch.ones(hidden_size)) for name in ("norm1", "norm2")}}) for _ in range(num_hidden_layers)])
        self.norm = torch.nn.Parameter(torch.ones(hidden_size))

    def embed(self, ids):
        return F.embedding(ids, self.embedding)

    def forward(self, x):
        batch, tokens, hidden = x.shape
        angles = torch.outer(torch.arange(tokens, device=x.device), 1e4 ** (-torch.arange(0, self.dim, 2, device=x.device) / self.dim))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotate(y):
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        for w in self.layers:
            h = F.rms_norm(x, (hidden,), w["norm1"])
            q, k, v = (F.linear(h, w[n]).view(batch, tokens, -1, self.dim).transpose(1, 2) for n in "qkv")
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (rotate(k), v))
            y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, tokens, -1), w["o"])
            h = F.rms_norm(x, (hidden,), w["norm2"])
            x = x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
        return F.linear(F.rms_norm(x, (hidden,), self.norm), self.embedding)


def baseline(dtype, device):
    """(name, ids -> embeddings, embeddings -> logits); no gradients of weights."""
    if importlib.util.find_spec("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=8192, tie_word_embeddings=True,
                                             attn_implementation="sdpa")).to(device, dtype).requires_grad_(False)
        return "transformers", model.model.embed_tokens, lambda x: model(inputs_embeds=x, use_cache=False).logits
    model = PlainLlama(**SHAPE).to(device, dtype).requires_grad_(False)
    return "plain PyTorch", model.embed, model


def seconds(work, rounds, device):
    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def measure_baseline(args, dtype, device):
    torch.manual_seed(0)
    name, embed, model = baseline(dtype, device)
    batches = [torch.randint(SHAPE["vocab_size"], (args.batch, args.window), device=device) for _ in range(math.ceil(args.windows / args.batch))]
    tokens = len(batches) * args.batch * args.window

    @torch.no_grad()
    def forward():
        for ids in batches:
            model(embed(ids)).float().log_softmax(-1).mean()

    def backward():
        """The gradients reach every layer's keys and values on their way to the embeddings."""
        for ids in batches:
            logits = model(embed(ids).requires_grad_())
            with torch.no_grad():
                labels = torch.distributions.Categorical(logits=logits.float()).sample()
            F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum").backward()

    return {"baseline": name, "forward_tokens_per_second": tokens / seconds(forward, args.rounds, device),
            "backward_tokens_per_second": tokens / seconds(backward, args.rounds, device)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward-bench", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="SmolLM2-135M")
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command = [args.forward_bench, args.model, args.text, "--windows", args.windows, "--window", args.window, "--batch", args.batch,
               "--rounds", args.rounds, "--dtype", args.dtype, "--profile", "--threads", args.threads or torch.get_num_threads()]
    if device.type == "cuda":
        command += ["--gpu", 0]
    ours = json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout)
    theirs = measure_baseline(args, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype], device)
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__, "dtype": args.dtype,
             "tokens": ours["tokens"], "perplexity": ours["perplexity"], "profile_seconds": ours["profile_seconds"],
             "kvplan_forward_tokens_per_second": ours["forward_tokens_per_second"],
             "kvplan_profile_tokens_per_second": ours["tokens"] / ours["profile_seconds"],
             **{f"baseline_{key}" if key != "baseline" else key: value for key, value in theirs.items()}}
    found["forward_ratio"] = found["kvplan_forward_tokens_per_second"] / found["baseline_forward_tokens_per_second"]
    found["profile_ratio"] = found["kvplan_profile_tokens_per_second"] / found["baseline_backward_tokens_per_second"]
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
