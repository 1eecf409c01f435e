#!/usr/bin/env python3
"""Runs the GGUF fixtures through llama.cpp itself and compares its logits with those of transformers.

    python scripts/check_gguf_fixtures.py FIXTURES        (output folder of tests/make_fixtures.py)

So what tests/gguf_fixtures.py writes is what llama.cpp reads. Needs llama-cpp-python (checked with 0.3.16) beside what make_fixtures.py
needs. Expected: about 1e-6 of the largest logit; up to 2e-3 with GELU, which llama.cpp looks up in a table of fp16; no agreement for phi3
beyond its window, which llama.cpp does not apply.
"""
import argparse
import ctypes
import pathlib
import sys
import tempfile

import gguf
import numpy as np
import torch
from llama_cpp import llama_cpp
from safetensors.numpy import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import gguf_fixtures
import make_fixtures

CONTEXTS = {"": 256, "short.": make_fixtures.ORIGINAL_CONTEXT}  # llama.cpp chooses LongRoPE's factors by the size of its cache


class Writer(gguf.GGUFWriter):
    """Adds what llama.cpp asks for where there is no tokenizer."""

    def write_header_to_file(self, *args, **kwargs):
        self.add_string("tokenizer.ggml.model", "no_vocab")
        if not any(key.endswith(".vocab_size") for data in self.kv_data for key in data):
            self.add_vocab_size(make_fixtures.SIZES["vocab_size"])
        super().write_header_to_file(*args, **kwargs)


def logits_of(model, ids: np.ndarray, context: int, vocabulary: int) -> np.ndarray:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch, parameters.n_threads = context, 64, 64, 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    state = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position], batch.logits[position] = int(token), position, 1
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
    if llama_cpp.llama_decode(state, batch):
        raise RuntimeError("llama_decode failed")
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(state), shape=(len(ids), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(state)
    return found


@llama_cpp.llama_log_callback
def no_log(_level, _text, _data):
    pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fixtures", type=pathlib.Path)
    fixtures = parser.parse_args().fixtures
    llama_cpp.llama_log_set(no_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    gguf.GGUFWriter = Writer
    vocabulary = make_fixtures.SIZES["vocab_size"]
    for fixture in (fixture for fixture in make_fixtures.MODELS if fixture.gguf):
        folder = fixtures / fixture.name
        network = make_fixtures.classes(fixture.family)[1].from_pretrained(folder, dtype=torch.float32)
        oracle = load_file(folder / "oracle.safetensors")
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            gguf_fixtures.write_gguf(fixture.family, network, gguf.GGMLQuantizationType.F32, pathlib.Path(file.name))
            model = llama_cpp.llama_model_load_from_file(file.name.encode(), llama_cpp.llama_model_default_params())
            for prefix, context in CONTEXTS.items():
                expected = oracle[f"{prefix}logits"][0]
                found = logits_of(model, oracle[f"{prefix}ids"][0], context, vocabulary)
                difference = np.abs(found - expected).max() / np.abs(expected).max()
                print(f"{fixture.name:16} {len(expected):3} tokens: {difference:.1e} of the largest logit")
            llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()
