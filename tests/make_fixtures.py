#!/usr/bin/env python3
"""Makes the model fixtures of the tests: tiny random checkpoints, what transformers computes from them, ggml blocks.

    python tests/make_fixtures.py OUTDIR

OUTDIR/{name}/                 Hugging Face folder (config.json, *.safetensors)
OUTDIR/{name}/oracle.safetensors
    ids [2,T] I64, logits [2,T,vocab] F32, inv_freq [head_dim/2] F32,
    layers.{l}.k_pre, layers.{l}.k (after rotary), layers.{l}.v [2,kv_heads,T,head_dim] F32,
    greedy.prompts [2,P], greedy.tokens [2,16] I64: what generate() appends to the prompts with an fp16 cache
OUTDIR/{name}[_q8_0].gguf      the same weights as llama.cpp's converter would write them
OUTDIR/dequantize.safetensors  {TYPE}.bytes U8, {TYPE}.values F32: random blocks of each ggml type

Deterministic. Needs torch, transformers, safetensors, gguf and numpy.
"""

import argparse
import json
import pathlib
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as GgmlType
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

TOKENS = 40
BATCH = 2
PROMPT_TOKENS, GREEDY_TOKENS = 12, 16
BLOCKS = 24  # of each ggml type
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
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
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


@dataclass
class Model:
    name: str
    family: str = "llama"
    config: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shard_size: str = "10GB"
    legacy_rope: bool = False  # config.json as transformers 4 wrote it
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
        legacy_rope=True,
        gguf=(GgmlType.F32,),
    ),
    Model("llama_bf16_sharded", dtype=torch.bfloat16, shard_size="100KB"),
    Model("qwen2", family="qwen2", gguf=(GgmlType.F32,)),
    Model("qwen2_fp16_tied", family="qwen2", config=dict(tie_word_embeddings=True), dtype=torch.float16),
]


def build(model: Model):
    """A model with random weights, norms and biases included, rounded to its dtype."""
    make_config, make_model = FAMILIES[model.family]
    network = make_model(make_config(**(SIZES | model.config)))
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if "norm" in name:
                weights.copy_(1 + 0.1 * torch.randn_like(weights))
            elif name.endswith("bias"):
                weights.copy_(0.1 * torch.randn_like(weights))
    return network.to(model.dtype)


class HalfCache(transformers.DynamicCache):
    """Keys and values rounded to fp16, as kvplan's reference cache holds them."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)


def oracle(network) -> dict:
    """What the forward pass of a float32 network gives for random tokens."""
    config = network.config
    layers = network.model.layers
    head_dim = layers[0].self_attn.head_dim
    projected = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output, index=index: projected.__setitem__(index, output)
        )
        for index, layer in enumerate(layers)
    ]
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS))
    with torch.no_grad():
        result = network(ids, use_cache=True)
    for hook in hooks:
        hook.remove()
    prompts = ids[:, :PROMPT_TOKENS]
    network.generation_config.eos_token_id = None
    generated = network.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),  # token 0 is a token here, not padding
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        pad_token_id=0,
        past_key_values=HalfCache(),
    )
    tensors = {
        "ids": ids,
        "logits": result.logits,
        "inv_freq": network.model.rotary_emb.inv_freq,
        "greedy.prompts": prompts,
        "greedy.tokens": generated[:, PROMPT_TOKENS:],
    }
    for index in range(len(layers)):
        cache = result.past_key_values.layers[index]
        k_pre = projected[index].view(BATCH, TOKENS, config.num_key_value_heads, head_dim)
        tensors[f"layers.{index}.k_pre"] = k_pre.transpose(1, 2)
        tensors[f"layers.{index}.k"] = cache.keys
        tensors[f"layers.{index}.v"] = cache.values
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def use_legacy_rope(config_file: pathlib.Path):
    """Rewrites rope_parameters as transformers 4 did: rope_theta and rope_scaling."""
    config = json.loads(config_file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config_file.write_text(json.dumps(config, indent=1))


# Names of llama.cpp's converter.
GGUF_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in GGUF_MODEL_NAMES:
        return GGUF_MODEL_NAMES[name]
    _model, _layers, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[part]}.{kind}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: Model, network, weight_type: GgmlType, path: pathlib.Path):
    config = network.config
    head_dim = network.model.layers[0].self_attn.head_dim
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, model.family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if model.family == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        factors = plain / network.model.rotary_emb.inv_freq.double()
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if model.family == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        if model.family == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        values = np.ascontiguousarray(values)
        if values.ndim == 1 or weight_type == GgmlType.F32:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, weight_type), raw_dtype=weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_models(out: pathlib.Path):
    for seed, model in enumerate(MODELS):
        torch.manual_seed(seed)
        folder = out / model.name
        build(model).save_pretrained(folder, max_shard_size=model.shard_size)
        if model.legacy_rope:
            use_legacy_rope(folder / "config.json")
        # Read back: .to(dtype) rounds the rotary frequencies too, and loading computes them anew.
        network = FAMILIES[model.family][1].from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        save_file(oracle(network), folder / "oracle.safetensors")
        for weight_type in model.gguf:
            suffix = "" if weight_type == GgmlType.F32 else f"_{weight_type.name.lower()}"
            write_gguf(model, network, weight_type, out / f"{model.name}{suffix}.gguf")


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
