#pragma once
// The formats of each stack: bytes, widths, names and the versions that they were read in
// (docs/serving/). Private to exporters.

#include <array>
#include <initializer_list>
#include <string_view>
#include <vector>

#include "exporters/stack.h"

namespace kvplan::exporters {

inline constexpr const char* kVllmVersion = "0.33.0";
inline constexpr const char* kSglangVersion = "0.5.23";
inline constexpr const char* kModelOptVersion = "schema v1 (Model-Optimizer #2272)";
inline constexpr const char* kMainlineVersion = "b11434";
inline constexpr const char* kIkVersion = "8337e4cd";
inline constexpr const char* kThetomVersion = "69d8e4be";
inline constexpr const char* kBuunVersion = "08233508";
inline constexpr const char* kKvTunerVersion = "babe7753";
inline constexpr const char* kTransformersVersion = "5.23.0";
inline constexpr const char* kLmDeployVersion = "0.18.0";

/// Architectures whose classes in SGLang read K/V scales; others raise.
inline constexpr std::array<std::string_view, 11> kSglangModels = {
    "llama",   "qwen2",   "qwen3", "glm4",  "mimo",   "opt",
    "exaone4", "hunyuan", "solar", "arcee", "apertus"};

inline constexpr std::array<int, 4> kNvfp4HeadDims = {64, 128, 256, 512};

/// A --kv-cache-dtype of vLLM. Source: vllm/model_executor/layers/quantization/turboquant/config.py
/// and the kv_cache_interface of vLLM 0.33.0.
struct VllmDtype {
  std::string_view name;
  bool turboquant = false;
  int k_bits = 0, v_bits = 0;
};
inline constexpr std::array<VllmDtype, 8> kVllmDtypes = {{{"fp8", false, 8, 8},
                                                          {"int8_per_token_head", false, 8, 8},
                                                          {"int4_per_token_head", false, 4, 4},
                                                          {"nvfp4", false, 4, 4},
                                                          {"turboquant_k8v4", true, 8, 4},
                                                          {"turboquant_4bit_nc", true, 4, 4},
                                                          {"turboquant_k3v4_nc", true, 3, 4},
                                                          {"turboquant_3bit_nc", true, 3, 3}}};

Format plain_format(std::string_view name);
Format fp8_format(std::string_view codec);
Format nvfp4_format();
Format vllm_format(const VllmDtype& dtype, Side side);
/// Types of ggml (mainline, ik) and of TheTom's fork (turbo*) by name.
std::vector<Format> ggml_formats(std::initializer_list<std::string_view> names);
/// Tiers of buun's schedule, by the type that -ctk takes.
std::vector<Format> buun_formats();
/// "t4" of "turbo4".
std::string_view buun_tier(std::string_view type);
/// scheme kivi: groups of 32 channels or tokens; pertoken: one scale and minimum per vector.
Format kvtuner_format(int width, std::string_view scheme);
/// Tokens that KVTuner's kivi scheme keeps at 16 bits.
inline constexpr int kKiviWindow = 32;
/// Largest divisor of all head dims that is at most 64.
int hf_group(const CacheShape& shape);
Format hf_format(int width, int group);
/// turbo_quant K, turbo_quant V, int4, then int8 or fp8.
std::vector<Format> lmdeploy_formats(bool fp8);

}  // namespace kvplan::exporters
