#!/usr/bin/env python3
"""Profiles a checkpoint that is larger than the memory it is given, beside the same run with all weights in memory.

  bench/streaming.py --kvplan build/release/cli/kvplan [--limit-mib 384] [--windows 8] [--window 256] [--layers 32] [--folder DIR]

Makes a random llama whose weights take four times the limit as kvplan holds them (float32; the file is bfloat16, half of that),
profiles the same text with and without --memory, and prints for both: seconds, peak anonymous memory (sampled: what the process
has allocated), peak resident memory (VmHWM: with pages of shared libraries and of the model's file, which the kernel may take back at
any time), and whether the profiles have the same bytes. Needs torch, safetensors, tokenizers.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HEAD_DIM, KV_HEADS, VOCABULARY = 64, 2, 400


def layer_parameters(hidden):
    inner, kv = 2 * hidden, KV_HEADS * HEAD_DIM
    return 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden


def hidden_size(weight_bytes, layers):
    """The smallest width with so many bytes of float32 weights; query heads are a multiple of KV heads."""
    hidden = KV_HEADS * HEAD_DIM
    while 4 * layers * layer_parameters(hidden) < weight_bytes:
        hidden += KV_HEADS * HEAD_DIM
    return hidden


def make_text(path, repeats):
    """Prose of a few repeated words in a different order each time; what it says does not matter here."""
    words = pathlib.Path(__file__).read_text().split()
    path.write_text("\n".join(" ".join(words[i % 7::1 + i % 3]) for i in range(repeats)))


def make_checkpoint(folder, text, layers, hidden):
    """A random llama in bfloat16, with a byte-level BPE tokenizer of the text. Returns the bytes of its weights in float32."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                     show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    inner, kv = 2 * hidden, KV_HEADS * HEAD_DIM
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True}))
    torch.manual_seed(0)
    total = 0

    def matrix(rows, columns):
        nonlocal total
        total += 4 * rows * columns
        return (torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16)

    index = {}
    for layer in range(-1, layers):  # one file per layer, so that no more than a layer is in memory here either
        tensors = {}
        if layer < 0:
            tensors = {"model.embed_tokens.weight": matrix(tokenizer.get_vocab_size(), hidden),
                       "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
        else:
            prefix = f"model.layers.{layer}."
            for name, rows, columns in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden),
                                        ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, hidden),
                                        ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner)):
                tensors[f"{prefix}{name}.weight"] = matrix(rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index.update({name: file for name in tensors})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def status_kib(pid, *names):
    """Fields of /proc/PID/status; None when the process has ended."""
    try:
        lines = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        return [int(lines[name].split()[0]) for name in names]
    except (OSError, KeyError):
        return None


def measure(command, environment=None):
    """Runs a command; seconds, peak memory in MiB. stderr is shown when it fails."""
    start, anonymous, resident = time.monotonic(), 0, 0
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, **(environment or {})})
    while process.poll() is None:
        found = status_kib(process.pid, "RssAnon", "VmHWM")
        if found:
            anonymous, resident = max(anonymous, found[0]), found[1]
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(process.stderr.read())
    return {"seconds": time.monotonic() - start, "peak_anonymous_mib": anonymous / 1024, "peak_resident_mib": resident / 1024}


def compare(kvplan, folder, limit_mib, layers, windows, window, batch=1, threads=0):
    """Both runs on a model of four times the limit."""
    text, model = folder / "text.txt", folder / "model"
    make_text(text, 40 + windows * window // 100)
    weights = make_checkpoint(model, text, layers, hidden_size(4 * (limit_mib << 20), layers))
    common = [kvplan, "profile", "--model", model, "--text", text, "--window", window, "--tokens", windows * window, "--coherent", 1,
              "--batch", batch, "--threads", threads, "--quiet"]
    runs = {name: measure([*common, "--out", folder / name, *more])
            for name, more in (("in memory", []), ("streamed", ["--memory", f"{limit_mib}MiB"]))}
    same = len({(folder / name / "profile.safetensors").read_bytes() for name in runs}) == 1
    return {"limit_mib": limit_mib, "weights_mib": weights / 2**20, "layers": layers, "windows": windows, "window": window,
            "runs": runs, "time_ratio": runs["streamed"]["seconds"] / runs["in memory"]["seconds"], "same_bytes": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvplan", type=pathlib.Path, required=True)
    parser.add_argument("--limit-mib", type=int, default=384)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="where to work; removed afterwards")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder, prefix="kvplan-streaming-"))
    try:
        found = compare(args.kvplan, folder, args.limit_mib, args.layers, args.windows, args.window, args.batch, args.threads)
    finally:
        shutil.rmtree(folder)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['weights_mib']:.0f} MiB of weights in {args.layers} layers, --memory {args.limit_mib}MiB, "
          f"{args.windows} windows of {args.window} tokens")
    print("| run | seconds | peak anonymous MiB | peak resident MiB |\n|---|---:|---:|---:|")
    for name, run in found["runs"].items():
        print(f"| {name} | {run['seconds']:.1f} | {run['peak_anonymous_mib']:.0f} | {run['peak_resident_mib']:.0f} |")
    print(f"time ratio {found['time_ratio']:.2f}; profiles {'have the same bytes' if found['same_bytes'] else 'DIFFER'}")
    sys.exit(0 if found["same_bytes"] else 1)


if __name__ == "__main__":
    main()
