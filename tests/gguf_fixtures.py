"""Writes models of transformers as GGUF files with the keys, tensor names and layouts of llama.cpp's convert_hf_to_gguf.py."""

import math
import pathlib

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

# llama.cpp has no architecture of Mistral's own.
ARCHITECTURES = {"mistral": "llama"}
LAYER_NORM = {"gpt2", "phi2"}
POST_NORMS = {"gemma2", "gemma3"}

MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def tensor_name(family: str, name: str) -> str:
    part, kind = name.rsplit(".", 1)
    if part in MODEL_NAMES:
        return f"{MODEL_NAMES[part]}.{kind}"
    _model, _layers, layer, rest = part.split(".", 3)
    if family in POST_NORMS and rest == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_sizes(writer: gguf.GGUFWriter, family: str, config, head_dim: int):
    inner = 4 * config.hidden_size if family in LAYER_NORM else config.intermediate_size
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if family in LAYER_NORM:
        writer.add_layer_norm_eps(config.layer_norm_epsilon if family == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family != "gpt2":
        writer.add_head_count_kv(config.num_key_value_heads)
    if family in ("qwen3", "gemma", "gemma2", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("llama", "mistral"):
        writer.add_vocab_size(config.vocab_size)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)


def write_rope(writer: gguf.GGUFWriter, family: str, config, head_dim: int, inv_freq):
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope = rope["full_attention"]
    if not family in ("gemma", "gemma2"):  # which rely on the default
        writer.add_rope_freq_base(rope["rope_theta"])
    if family in ("llama", "mistral", "phi2", "phi3"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / inv_freq.double()).float().numpy())
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def write_gguf(family: str, network, weight_type: GgmlType, path: pathlib.Path):
    config = network.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    write_sizes(writer, family, config, head_dim)
    if family != "gpt2":
        write_rope(writer, family, config, head_dim, getattr(network.model.rotary_emb, "inv_freq", None))
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        values = np.ascontiguousarray(values)
        gguf_name = tensor_name(family, name)
        if values.ndim == 1 or weight_type == GgmlType.F32:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, weight_type), raw_dtype=weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
