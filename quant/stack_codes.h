#pragma once
// What serving stacks store of a vector, to the bit, as vector codes. Read in their sources: vLLM
// 0.33.0, LMDeploy 0.18.0, and the builder that `export hf` writes. Private to quant.

#include <memory>

#include "quant/vector_code.h"

namespace kvplan::quant {

/// y = H x over tiles of `tile` coordinates, H the Sylvester Hadamard matrix without signs and
/// without its factor 1/sqrt(tile). `tile` is a power of two that divides x.size().
void hadamard_tiles(std::span<float> x, std::size_t tile);

/// vLLM int8_per_token_head: codes, then the fp32 scale absmax / 127.
std::unique_ptr<VectorCode> make_vllm_int8_code(std::size_t size);

/// vLLM int4_per_token_head: signs and Hadamard transform over the largest power of two that
/// divides size, then codes 0..15 in nibbles (even coordinate low) and the fp32 scale, whose lowest
/// four mantissa bits hold the zero point. The transform is taken in fp32, as vLLM does without a
/// GPU (there it passes through 16 bits).
std::unique_ptr<VectorCode> make_vllm_int4_code(std::size_t size);

/// vLLM TurboQuant keys: codes of the coordinates of H x / |x|, then the fp16 norm; read with the
/// levels scaled to norm 1. 3 or 4 bits; size a power of two.
std::unique_ptr<VectorCode> make_vllm_turbo_key_code(std::size_t size, int bits);

/// vLLM TurboQuant values: codes between minimum and maximum, then fp16 scale, fp16 minimum. 3 or 4
/// bits.
std::unique_ptr<VectorCode> make_vllm_turbo_value_code(std::size_t size, int bits);

/// LMDeploy int8 and int4: codes (int4: coordinates i and i + size/2 share a byte), then fp16 scale
/// and fp16 zero point, which is no whole number. A constant vector, which LMDeploy reads back as
/// NaN, is read as 0.
std::unique_ptr<VectorCode> make_lmdeploy_code(std::size_t size, int bits);

/// LMDeploy turbo_quant, size a power of two. Keys: Hadamard transform, 3-bit level and the sign of
/// what it leaves in a nibble, fp16 norm, fp16 root mean square of what is left. Values: the same
/// transform, 2-bit levels, fp16 norm.
std::unique_ptr<VectorCode> make_lmdeploy_turbo_key_code(std::size_t size);
std::unique_ptr<VectorCode> make_lmdeploy_turbo_value_code(std::size_t size);

/// The builder of `export hf`: groups of codes, fp32 step, fp32 minimum. Its codes fill bytes in
/// memory; here they are packed. The last group of a vector takes what is left.
std::unique_ptr<VectorCode> make_hf_code(std::size_t size, int bits, std::size_t group);

}  // namespace kvplan::quant
