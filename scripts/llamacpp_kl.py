"""KL divergence that llama.cpp's quantised KV caches really cause: its logits with a cache of types (K, V) against those with an
f16 cache, on the windows that `kvplan validate` scores. Needs llama-cpp-python 0.3.36 (`pip install llama-cpp-python`, which
compiles llama.cpp); flash attention is on, every position is read back from the cache.

    scripts/llamacpp_kl.py TEXT --part 0.5:1 --windows 4 --out kl.json
    ... --f32 model-f32.gguf        with the weights in F32: llama.cpp rounds activations to 8 bits before it multiplies them with
                                    quantised weights, and any change of the cache reshuffles that rounding (about .004 nats here)
    LLAMA_ATTN_ROT_DISABLE=1 scripts/llamacpp_kl.py TEXT ...        without the Hadamard transform of quantised sides
"""
import argparse
import ctypes
import json
import os
import pathlib
import sys

import numpy as np
from llama_cpp import llama_cpp as llama

TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0, "q5_1": llama.GGML_TYPE_Q5_1,
         "q5_0": llama.GGML_TYPE_Q5_0, "q4_1": llama.GGML_TYPE_Q4_1, "q4_0": llama.GGML_TYPE_Q4_0, "iq4_nl": llama.GGML_TYPE_IQ4_NL}
CHUNK = 256  # tokens of a batch: bounds the logits that llama.cpp holds


class Model:
    def __init__(self, path, threads):
        llama.llama_backend_init()
        self.silent = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self.silent, ctypes.c_void_p())
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.vocab_size, self.threads = llama.llama_vocab_n_tokens(self.vocab), threads

    def tokenize(self, text):
        data = text.encode()
        ids = (llama.llama_token * len(data))()
        count = llama.llama_tokenize(self.vocab, data, len(data), ids, len(data), False, False)
        return ids[:count]

    def log_probabilities(self, tokens, first, types):
        """[len(tokens) - 1 - first, vocabulary] float32 of positions first .. len(tokens) - 2, or None where llama.cpp refuses the types."""
        p = llama.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = len(tokens), CHUNK, CHUNK, self.threads, self.threads
        p.type_k, p.type_v = (TYPES[t] for t in types)
        p.flash_attn_type, p.offload_kqv = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
        context = llama.llama_init_from_model(self.model, p)
        if not context:
            return None
        batch, rows = llama.llama_batch_init(CHUNK, 0, 1), []
        for begin in range(0, len(tokens) - 1, CHUNK):
            positions = range(begin, min(begin + CHUNK, len(tokens) - 1))
            batch.n_tokens = len(positions)
            for i, position in enumerate(positions):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = tokens[position], position, 1, 0
                batch.logits[i] = position >= first
            if llama.llama_decode(context, batch):
                raise SystemExit(f"llama.cpp failed on {types} at position {begin}")
            scored = sum(position >= first for position in positions)
            if scored:
                logits = llama.llama_get_logits(context)
                rows.append(np.ctypeslib.as_array(logits, (scored, self.vocab_size)).copy())
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        logits = np.concatenate(rows)
        for row in logits:
            row -= row.max()
            row -= np.log(np.exp(row).sum(dtype=np.float64))
        return logits


def write_f32_copy(source, copy):
    """The same GGUF with F32 weights (package gguf)."""
    import gguf
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(name, field.contents(), *field.types[:2])
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def divergence(reference, probability, other):
    """KL in nats of each row; `probability` is exp(reference)."""
    return np.einsum("ij,ij->i", probability, reference - other, dtype=np.float64)


def pairs(text):
    if text:
        return [tuple(pair.split(",")) for pair in text.split()]
    return [(k, v) for k in TYPES for v in TYPES if (k, v) != ("f16", "f16") and "iq4_nl" not in (k, v)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--model", default=".cache/model/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--f32", type=pathlib.Path, help="use this copy of the model with F32 weights; written if absent")
    parser.add_argument("--part", default="0.5:1", help="token fractions of the text")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--pairs", help="such as 'q8_0,q4_0 q4_0,q4_0'; default: all of f16 q8_0 q5_1 q5_0 q4_1 q4_0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=pathlib.Path)
    a = parser.parse_args()
    if a.f32 and not a.f32.exists():
        write_f32_copy(a.model, a.f32)
    model = Model(a.f32 or a.model, a.threads)
    tokens = model.tokenize(a.text.read_text())
    begin, end = (round(float(f) * len(tokens)) for f in a.part.split(":"))
    first = a.window // 4
    results = {pair: [] for pair in pairs(a.pairs)}
    nll = {pair: [] for pair in [("f16", "f16"), *results]}
    for number in range(a.windows):
        window = tokens[begin + number * a.window:begin + (number + 1) * a.window]
        if len(window) < a.window or begin + (number + 1) * a.window > end:
            raise SystemExit(f"{a.text}: the part holds {number} windows of {a.window} tokens, {a.windows} were asked for")
        labels = window[first + 1:]
        reference = model.log_probabilities(window, first, ("f16", "f16"))
        probability = np.exp(reference)
        nll["f16", "f16"].append(-np.mean(reference[np.arange(len(labels)), labels]))
        for pair in list(results):
            other = model.log_probabilities(window, first, pair)
            if other is None:
                del results[pair], nll[pair]
                continue
            results[pair].append(divergence(reference, probability, other).mean())
            print(number, *pair, results[pair][-1], file=sys.stderr, flush=True)
            nll[pair].append(-np.mean(other[np.arange(len(labels)), labels]))
    base = np.mean(nll["f16", "f16"])
    report = {"text": a.text.name, "part": a.part, "window": a.window, "windows": a.windows,
              "rotated": not os.environ.get("LLAMA_ATTN_ROT_DISABLE"), "perplexity_f16": float(np.exp(base)),
              "pairs": [{"k": k, "v": v, "kl": float(np.mean(kl)),
                         "standard_error": float(np.std(kl, ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None,
                         "perplexity_rise": float(np.expm1(np.mean(nll[k, v]) - base)), "by_window": [float(x) for x in kl]}
                        for (k, v), kl in results.items()]}
    text = json.dumps(report, indent=1) + "\n"
    a.out.write_text(text) if a.out else print(text, end="")


if __name__ == "__main__":
    main()
