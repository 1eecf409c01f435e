"""Makes the model fixtures of the tests: tiny random checkpoints, what transformers computes from them, ggml blocks.

    python tests/make_fixtures.py OUTDIR

OUTDIR/{name}/                 Hugging Face folder (config.json, *.safetensors)
OUTDIR/{name}/oracle.safetensors
    ids [2,T] I64, logits [2,T,vocab] F32,
    layers.{l}.k_pre, layers.{l}.k (after rotary), layers.{l}.v [2,kv_heads,T,head_dim] F32,
    layers.{l}.inv_freq [rotary_dim/2] F32 (not for learned positions),
    short.*: the same of the first 12 tokens alone,
    greedy.prompts [2,P], greedy.tokens [2,16] I64: what generate() appends to the prompts with an fp16 cache and fp16 queries
OUTDIR/{name}[_q8_0].gguf      the same weights as llama.cpp's converter would write them
OUTDIR/dequantize.safetensors  {TYPE}.bytes U8, {TYPE}.values F32: random blocks of each ggml type

T = 40 is beyond the windows (16) and the original contexts (32) of the models that have them, 12 is not.
Deterministic. Needs torch, transformers, safetensors, gguf and numpy.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import unittest.mock
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GgmlType
from gguf_fixtures import write_gguf
from safetensors.numpy import load_file, save_file

TOKENS, SHORT_TOKENS = 40, 12
BATCH = 2
PROMPT_TOKENS, GREEDY_TOKENS = 12, 16
BLOCKS = 24  # of each ggml type
WINDOW, ORIGINAL_CONTEXT = 16, 32
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "phi2": "Phi",
    "phi3": "Phi3",
    "gpt2": "GPT2",
}
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT2_SIZES = dict(
    vocab_size=96,
    n_embd=64,
    n_layer=3,
    n_head=4,
    n_positions=256,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.01, 1.05, 1.1, 1.2, 1.25],
    long_factor=[1.0, 1.5, 2.0, 4.0, 7.0, 8.0],
    original_max_position_embeddings=ORIGINAL_CONTEXT,
    partial_rotary_factor=0.75,
)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)
# Caps that these small models reach.
GEMMA2 = dict(head_dim=32, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)


@dataclass
class Model:
    name: str
    family: str = "llama"
    config: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "10GB"
    legacy: bool = False  # config.json as transformers 4 wrote it
    bare_names: bool = False  # tensor names without the prefix of the model, and masks, as in the first GPT-2
    gguf: tuple = ()  # weight types of GGUF files


MODELS = [
    Model("llama_gqa", gguf=(GgmlType.F32, GgmlType.Q8_0)),
    Model("llama_tied", config=dict(tie_word_embeddings=True)),
    Model("llama_bias", config=dict(attention_bias=True), gguf=(GgmlType.F32,)),
    Model("llama_head_dim", config=dict(head_dim=24)),
    Model("llama_llama3", config=dict(rope_parameters=LLAMA3), gguf=(GgmlType.F32,)),
    Model(
        "llama_linear",
        config=dict(rope_parameters=dict(rope_type="linear", rope_theta=5000.0, factor=4.0)),
        legacy=True,
        gguf=(GgmlType.F32,),
    ),
    Model("llama_bf16_sharded", dtype=torch.bfloat16, shard_size="100KB"),
    Model("qwen2", family="qwen2", gguf=(GgmlType.F32,)),
    Model("qwen2_fp16_tied", family="qwen2", config=dict(tie_word_embeddings=True), dtype=torch.float16),
    Model(
        "llama_dynamic",
        config=dict(
            max_position_embeddings=ORIGINAL_CONTEXT,
            rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
        ),
    ),
    Model("llama_yarn", config=dict(rope_parameters=YARN), legacy=True, gguf=(GgmlType.F32,)),
    Model(
        "llama_yarn_scales",
        config=dict(
            rope_parameters=YARN
            | dict(mscale=0.7, mscale_all_dim=0.4, beta_fast=8.0, beta_slow=0.5, truncate=False)
        ),
    ),
    Model("mistral", family="mistral", config=dict(sliding_window=None), gguf=(GgmlType.F32,)),
    Model("mistral_window", family="mistral", config=dict(sliding_window=WINDOW, head_dim=24), legacy=True),
    Model(
        "qwen2_window",
        family="qwen2",
        config=dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        legacy=True,
    ),
    Model("qwen2_yarn", family="qwen2", config=dict(rope_parameters=YARN), gguf=(GgmlType.F32,)),
    Model("qwen3", family="qwen3", config=dict(head_dim=32), gguf=(GgmlType.F32,)),
    Model(
        "qwen3_window",
        family="qwen3",
        config=dict(
            head_dim=32, attention_bias=True, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
        ),
        shard_size="100KB",
    ),
    Model("gemma", family="gemma", config=dict(head_dim=32, num_key_value_heads=1), gguf=(GgmlType.F32,)),
    Model("gemma2", family="gemma2", config=GEMMA2 | dict(query_pre_attn_scalar=32), gguf=(GgmlType.F32,)),
    Model("gemma2_scalar", family="gemma2", config=GEMMA2 | dict(query_pre_attn_scalar=20), legacy=True),
    Model(
        "gemma3",
        family="gemma3",
        config=dict(
            num_hidden_layers=6,
            hidden_size=32,
            intermediate_size=48,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            rope_parameters=GEMMA3_ROPE,
        ),
        gguf=(GgmlType.F32,),
    ),
    Model(
        "gemma3_d256",
        family="gemma3",
        config=dict(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            head_dim=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            query_pre_attn_scalar=168,
            sliding_window=WINDOW,
            sliding_window_pattern=2,
            rope_parameters=GEMMA3_ROPE,
        ),
        legacy=True,
    ),
    Model("phi2", family="phi2", config=dict(intermediate_size=256, num_key_value_heads=4), gguf=(GgmlType.F32,)),
    Model("phi3", family="phi3", config=dict(sliding_window=WINDOW), gguf=(GgmlType.F32, GgmlType.Q8_0)),
    Model(
        "phi3_longrope",
        family="phi3",
        config=dict(rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL_CONTEXT),
        gguf=(GgmlType.F32,),
    ),
    Model("gpt2", family="gpt2", gguf=(GgmlType.F32,)),
    Model("gpt2_bare", family="gpt2", bare_names=True),
]


def classes(family: str):
    name = CLASSES[family]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return config, getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")


def build(model: Model):
    """A model with random weights, norms and biases included, rounded to its dtype."""
    make_config, make_model = classes(model.family)
    sizes = dict(GPT2_SIZES if model.family == "gpt2" else SIZES)
    if model.family == "phi2":
        sizes["layer_norm_eps"] = sizes.pop("rms_norm_eps")
    network = make_model(make_config(**(sizes | model.config)))
    centre = 0 if model.family.startswith("gemma") else 1  # of the weights of norms
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if name.endswith("bias"):
                weights.copy_(0.1 * torch.randn_like(weights))
            elif "norm" in name or ".ln_" in name:
                weights.copy_(centre + 0.1 * torch.randn_like(weights))
            elif model.family == "gemma3" and ("k_proj" in name or "q_proj" in name):
                weights.mul_(3)
    return network.to(model.dtype)


class HalfCache(transformers.DynamicCache):
    """Keys and values rounded to fp16, as kvplan's reference cache holds them."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)


def attention_of(network) -> list:
    body = network.transformer.h if hasattr(network, "transformer") else network.model.layers
    return [layer.attn if hasattr(layer, "attn") else layer.self_attn for layer in body]


@contextlib.contextmanager
def half_queries(network):
    """Queries of steps rounded to fp16, as kvplan generates."""
    module = sys.modules[type(attention_of(network)[0]).__module__]
    attend = module.eager_attention_forward

    def attend_in_steps(layer, query, key, *args, **kwargs):
        is_step = query.shape[2] < key.shape[2]
        return attend(layer, query.half().float() if is_step else query, key, *args, **kwargs)

    with unittest.mock.patch.object(module, "eager_attention_forward", attend_in_steps):
        yield


def keys_before_rotary(module, output, head_dim: int, kv_heads: int) -> torch.Tensor:
    """[batch, kv_heads, tokens, head_dim] from what the last module before rotary returns."""
    if output.ndim == 4:
        return output if output.shape[1] == kv_heads else output.transpose(1, 2)
    batch, tokens, width = output.shape
    if width != kv_heads * head_dim:  # fused: queries, keys, values
        queries = width - 2 * kv_heads * head_dim
        output = output[..., queries : queries + kv_heads * head_dim]
    return output.reshape(batch, tokens, kv_heads, head_dim).transpose(1, 2)


def rotary_of(network, index: int):
    """inv_freq and attention factor of a layer after a forward pass; None without rotary embedding."""
    rotary = getattr(getattr(network, "model", None), "rotary_emb", None)
    if rotary is None:
        return None, 1.0
    if hasattr(rotary, "inv_freq"):
        return rotary.inv_freq.clone(), rotary.attention_scaling
    kind = network.config.layer_types[index]
    return getattr(rotary, f"{kind}_inv_freq").clone(), getattr(rotary, f"{kind}_attention_scaling")


def forward(network, ids: torch.Tensor, prefix: str = "") -> dict:
    """Logits and caches of a float32 network."""
    config = network.config
    attention = attention_of(network)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    before, hooks = {}, []
    for index, module in enumerate(attention):
        name = next(name for name in ("k_norm", "k_proj", "qkv_proj", "c_attn") if hasattr(module, name))
        keep = lambda module, _inputs, output, index=index: before.__setitem__(
            index, keys_before_rotary(module, output, attention[index].head_dim, kv_heads)
        )
        hooks.append(getattr(module, name).register_forward_hook(keep))
    with torch.no_grad():
        # A cache that knows no windows keeps all positions.
        result = network(ids, use_cache=True, past_key_values=transformers.DynamicCache())
    for hook in hooks:
        hook.remove()
    tensors = {"ids": ids, "logits": result.logits}
    for index in range(len(attention)):
        cache = result.past_key_values.layers[index]
        inv_freq, factor = rotary_of(network, index)
        k_pre = before[index].clone()
        if inv_freq is not None:
            # kvplan counts the attention factor as part of the keys before rotary.
            k_pre[..., : 2 * len(inv_freq)] *= factor
            tensors[f"layers.{index}.inv_freq"] = inv_freq
        tensors[f"layers.{index}.k_pre"] = k_pre
        tensors[f"layers.{index}.k"] = cache.keys
        tensors[f"layers.{index}.v"] = cache.values
    return {prefix + name: tensor for name, tensor in tensors.items()}


def oracle(network) -> dict:
    ids = torch.randint(network.config.vocab_size, (BATCH, TOKENS))
    prompts = ids[:, :PROMPT_TOKENS]
    tensors = forward(network, ids) | forward(network, ids[:, :SHORT_TOKENS], "short.")
    network.generation_config.eos_token_id = None
    with half_queries(network):
        generated = network.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),  # token 0 is a token here, not padding
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            pad_token_id=0,
            past_key_values=HalfCache(),
        )
    tensors |= {"greedy.prompts": prompts, "greedy.tokens": generated[:, PROMPT_TOKENS:]}
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def use_legacy_config(config_file: pathlib.Path):
    """Rewrites rotary settings and windows as transformers 4 did: rope_theta, rope_scaling, no layer_types."""
    config = json.loads(config_file.read_text())
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config_file.write_text(json.dumps(config, indent=1))


def use_bare_names(folder: pathlib.Path):
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): values for name, values in load_file(file).items()}
    mask = np.tril(np.ones((1, 1, 8, 8), dtype=np.uint8)).astype(bool)
    save_file(tensors | {"h.0.attn.bias": mask}, file, metadata={"format": "pt"})


def make_models(out: pathlib.Path):
    for seed, model in enumerate(MODELS):
        torch.manual_seed(seed)
        folder = out / model.name
        build(model).save_pretrained(folder, max_shard_size=model.shard_size)
        # Read back: .to(dtype) rounds the rotary frequencies too, and loading computes them anew.
        network = classes(model.family)[1].from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        save_file(oracle(network), folder / "oracle.safetensors")
        if model.legacy:
            use_legacy_config(folder / "config.json")
        if model.bare_names:
            use_bare_names(folder)
        for weight_type in model.gguf:
            suffix = "" if weight_type == GgmlType.F32 else f"_{weight_type.name.lower()}"
            write_gguf(model.family, network, weight_type, out / f"{model.name}{suffix}.gguf")


# Byte offsets of the fp16 scales in a block; they get sane values, all other bytes are random.
HALF_OFFSETS = {
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.IQ4_NL: (0,),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
}


def special_halves() -> np.ndarray:
    """Zeroes, the smallest and largest subnormals, the smallest normal, the largest value, of both signs."""
    positive = np.array([0x0000, 0x0001, 0x03FF, 0x0400, 0x7BFF], dtype=np.uint16)
    return np.concatenate([positive, positive | 0x8000]).view(np.float16)


def make_dequantize(out: pathlib.Path):
    random = np.random.default_rng(7)
    tensors = {}
    for ggml_type, offsets in HALF_OFFSETS.items():
        block_bytes = gguf.GGML_QUANT_SIZES[ggml_type][1]
        blocks = random.integers(0, 256, (BLOCKS, block_bytes), dtype=np.uint8)
        for offset in offsets:
            scales = random.normal(0, 0.05, BLOCKS).astype(np.float16)
            scales[:4] = special_halves()[[0, 1, 7, 8]]
            blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(BLOCKS, 2)
        tensors[f"{ggml_type.name}.bytes"] = blocks
    halves = np.concatenate([special_halves(), random.normal(0, 1, 118).astype(np.float16)])
    tensors["F16.bytes"] = halves.view(np.uint8)
    floats = random.normal(0, 1, 128).astype(np.float32)
    tensors["F32.bytes"] = floats.view(np.uint8)
    tensors["BF16.bytes"] = gguf.quants.quantize(floats, GgmlType.BF16)
    for name in list(tensors):
        ggml_type = GgmlType[name.removesuffix(".bytes")]
        values = gguf.quants.dequantize(tensors[name], ggml_type)
        tensors[f"{ggml_type.name}.values"] = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        tensors[name] = np.ascontiguousarray(tensors[name]).reshape(-1)
    save_file(tensors, out / "dequantize.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    make_models(out)
    make_dequantize(out)


if __name__ == "__main__":
    main()
