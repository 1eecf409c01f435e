#include "exporters/stack.h"

#include <algorithm>
#include <bit>
#include <span>

#include "exporters/stack_tables.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

constexpr LayerFormat kNoCache = {LayerFormat::kNone, LayerFormat::kNone};
constexpr int kGgmlBlock = 32;     // values of a ggml block
constexpr int kMainlineTile = 64;  // mainline rotates tiles of 64 * 2^j
constexpr int kHadamardMin = 64,
              kHadamardMax = 512;    // ik's tiles of heads that are no power of two
constexpr int kTurboTile = 128;      // thetom's and buun's blocks
constexpr int kThetomMinLayers = 8;  // below, its modes do nothing

/// What a refusal needs to name.
struct Refusal {
  std::string file;
  [[noreturn]] void operator()(int layer, const std::string& field,
                               const std::string& message) const {
    throw InputError(file, "/layers/" + std::to_string(layer) + field, message);
  }
};

bool power_of_two(int n) { return n > 0 && std::has_single_bit(static_cast<unsigned>(n)); }

/// The same choices for every cached layer.
std::vector<std::vector<LayerFormat>> everywhere(const CacheShape& shape,
                                                 const std::vector<LayerFormat>& choices) {
  std::vector<std::vector<LayerFormat>> out;
  for (const LayerShape& layer : shape.layers)
    out.push_back(layer.cached() ? choices : std::vector{kNoCache});
  return out;
}

std::vector<LayerFormat> all_pairs(const Stack& stack) {
  std::vector<LayerFormat> pairs;
  const int n = static_cast<int>(stack.formats.size());
  for (int k = 0; k < n; ++k)
    for (int v = 0; v < n; ++v) pairs.push_back({k, v});
  return pairs;
}

void refuse_hybrid(const Stack& stack, const CacheShape& shape, const Refusal& refuse) {
  for (int l = 0; l < shape.num_layers(); ++l)
    if (shape.layers[static_cast<std::size_t>(l)].kind != "full")
      refuse(l, "/kind",
             stack.name + " takes models of full attention alone, found \"" +
                 shape.layers[static_cast<std::size_t>(l)].kind + "\"; choose another target");
}

// vLLM ------------------------------------------------------------------------------------------

/// Why a dtype cannot serve this cache; empty if it can.
std::string vllm_objection(const VllmDtype& dtype, const CacheShape& shape) {
  for (int l = 0; l < shape.num_layers(); ++l) {
    const LayerShape& layer = shape.layers[static_cast<std::size_t>(l)];
    if (!layer.cached()) continue;
    for (const int d : layer.head_dim) {
      const std::string found = ", layer " + std::to_string(l) + " has " + std::to_string(d);
      if (dtype.turboquant && !power_of_two(d))
        return "needs a head_dim that is a power of two" + found;
      if (dtype.name == "nvfp4" && std::ranges::find(kNvfp4HeadDims, d) == kNvfp4HeadDims.end())
        return "needs a head_dim of 64, 128, 256 or 512" + found;
      if (dtype.name == "int4_per_token_head" && d == 96)
        return "fails at a head_dim of 96" + found;
    }
  }
  if (dtype.turboquant && !shape.uniform_head_dim())
    return "needs one head_dim for K and V of all layers";
  return {};
}

void add_vllm(Stack& stack, const CacheShape& shape, const StackOptions& options,
              const std::string& file) {
  stack.even_slots = true;
  stack.formats.push_back(plain_format("auto"));
  for (const VllmDtype& dtype : kVllmDtypes) {
    stack.formats.push_back(vllm_format(dtype, Side::kKey));
    stack.formats.push_back(vllm_format(dtype, Side::kValue));
  }
  std::vector<std::string> names = options.dtypes;
  if (names.empty())
    for (const VllmDtype& dtype : kVllmDtypes)
      if (dtype.name != "nvfp4") names.emplace_back(dtype.name);
  for (const std::string& name : names)
    if (std::ranges::find(kVllmDtypes, name, &VllmDtype::name) == kVllmDtypes.end()) {
      std::string known;
      for (const VllmDtype& dtype : kVllmDtypes) known += " " + std::string(dtype.name);
      throw ArgumentError("vLLM dtype '" + name + "' is not one of" + known);
    }
  std::string objections;
  for (std::size_t i = 0; i < kVllmDtypes.size(); ++i) {
    const VllmDtype& dtype = kVllmDtypes[i];
    if (std::ranges::find(names, dtype.name) == names.end()) continue;
    if (const std::string objection = vllm_objection(dtype, shape); !objection.empty()) {
      objections += "\n  " + std::string(dtype.name) + " " + objection;
      continue;
    }
    const int k = 1 + 2 * static_cast<int>(i);
    Setting setting{.name = std::string(dtype.name),
                    .choices = everywhere(shape, {{k, k + 1}, {0, 0}})};
    const int layers = shape.num_layers();
    const int boundary = dtype.turboquant && !shape.hybrid() ? std::min(2, layers / 2) : 0;
    for (int l = 0; l < layers; ++l) {
      const bool sliding =
          dtype.turboquant && shape.layers[static_cast<std::size_t>(l)].kind == "sliding";
      const bool forced = l < boundary || l >= layers - boundary;
      if (!sliding && !forced) continue;
      setting.choices[static_cast<std::size_t>(l)] = {{0, 0}};
      (sliding ? setting.unverified16 : setting.forced16).push_back(l);
    }
    stack.settings.push_back(std::move(setting));
  }
  if (stack.settings.empty())
    throw InputError(file, "/model/head_dim", "vLLM has no dtype for this cache:" + objections);
}

// fp8 with static scales, ModelOpt ----------------------------------------------------------------

void add_fp8(Stack& stack, const CacheShape& shape, bool skips) {
  stack.formats = {fp8_format("fp8_e4m3+tensor"), plain_format("auto")};
  std::vector<LayerFormat> choices = {{0, 0}};
  if (skips) choices.push_back({1, 1});
  stack.settings = {{.name = "fp8", .choices = everywhere(shape, choices)}};
}

void add_modelopt(Stack& stack, const CacheShape& shape) {
  stack.formats = {nvfp4_format(), fp8_format("fp8_e4m3+tensor"), plain_format("none")};
  Setting setting{.choices = everywhere(shape, {{0, 0}, {1, 0}, {1, 1}, {2, 2}})};
  for (std::size_t l = 0; l < shape.layers.size(); ++l) {
    const LayerShape& layer = shape.layers[l];
    if (layer.cached() && layer.head_dim[0] != layer.head_dim[1])
      std::erase(setting.choices[l], LayerFormat{1, 0});  // FP8_K_NVFP4_V needs K as wide as V
  }
  stack.settings.push_back(std::move(setting));
}

// llama.cpp ---------------------------------------------------------------------------------------

void add_uniform_pairs(Stack& stack, const CacheShape& shape) {
  for (const LayerFormat& pair : all_pairs(stack))
    stack.settings.push_back({.choices = everywhere(shape, {pair})});
}

void add_thetom(Stack& stack, const CacheShape& shape) {
  for (const LayerFormat& pair : all_pairs(stack))
    stack.settings.push_back({.name = "mode 0", .choices = everywhere(shape, {pair})});
  const int layers = shape.num_layers();
  if (layers < kThetomMinLayers) return;
  const int q8 = stack.format_index("q8_0"), turbo2 = stack.format_index("turbo2"),
            turbo4 = stack.format_index("turbo4");
  const auto is_turbo = [&](int format) {
    return stack.formats[static_cast<std::size_t>(format)].name.starts_with("turbo");
  };
  const auto at_ends = [&](int l, int n) { return l < n || l >= layers - n; };
  const auto add = [&](int mode, const auto& layer_format) {
    Setting setting{.name = "mode " + std::to_string(mode), .number = mode};
    for (int l = 0; l < layers; ++l)
      setting.choices.push_back(
          {shape.layers[static_cast<std::size_t>(l)].cached() ? layer_format(l) : kNoCache});
    stack.settings.push_back(std::move(setting));
  };
  const int count = static_cast<int>(stack.formats.size());
  for (const LayerFormat& pair : all_pairs(stack)) {
    if (!is_turbo(pair.k)) continue;
    const LayerFormat kept = {q8, q8};
    add(1, [&](int l) { return at_ends(l, 4) ? kept : pair; });
    add(2, [&](int l) { return l >= layers - 8 ? kept : pair; });
  }
  for (int k = 0; k < count; ++k) {
    add(5, [&](int l) { return LayerFormat{k, at_ends(l, 2) ? turbo4 : turbo2}; });
    add(6, [&](int l) { return LayerFormat{k, l >= layers - 8 ? turbo4 : turbo2}; });
    add(7, [&](int l) { return LayerFormat{k, at_ends(l, 2) ? q8 : turbo2}; });
  }
}

void add_llamacpp(Stack& stack, const CacheShape& shape, const StackOptions& options,
                  const Refusal& refuse) {
  for (int l = 0; l < shape.num_layers(); ++l) {
    const LayerShape& layer = shape.layers[static_cast<std::size_t>(l)];
    for (const Side side : kSides)
      if (layer.cached() && layer.head_dim_of(side) % kGgmlBlock != 0)
        refuse(l, "/head_dim",
               "llama.cpp quantises heads whose dimension is a multiple of 32, found " +
                   std::to_string(layer.head_dim_of(side)) + "; choose another target");
  }
  stack.dialect = options.dialect;
  if (options.dialect == "mainline") {
    stack.version = kMainlineVersion;
    stack.formats = ggml_formats({"q4_0", "q5_0", "q8_0", "f16"});
    add_uniform_pairs(stack, shape);
  } else if (options.dialect == "ik") {
    stack.version = kIkVersion;
    stack.formats = ggml_formats({"q4_0", "q5_0", "q6_0", "q8_0", "f16"});
    stack.segments = true;
  } else if (options.dialect == "thetom") {
    stack.version = kThetomVersion;
    stack.formats = ggml_formats({"turbo2", "turbo3", "turbo4", "q4_0", "q5_0", "q8_0", "f16"});
    add_thetom(stack, shape);
  } else if (options.dialect == "buun") {
    stack.version = kBuunVersion;
    stack.formats = buun_formats();
    stack.settings = {{.choices = everywhere(shape, all_pairs(stack))}};
  } else {
    throw ArgumentError("--dialect: expected mainline, ik, thetom or buun, found '" +
                        options.dialect + "'");
  }
}

// KVTuner, transformers, LMDeploy
// -------------------------------------------------------------------

void add_kvtuner(Stack& stack, const CacheShape& shape, const StackOptions& options,
                 const Refusal& refuse) {
  refuse_hybrid(stack, shape, refuse);
  std::vector<int> widths;
  if (options.backend == "vanilla")
    widths = {2, 3, 4, 5, 6, 7, 8};
  else if (options.backend == "hqq")
    widths = {1, 2, 3, 4, 8};
  else
    throw ArgumentError("--backend: expected vanilla or hqq, found '" + options.backend + "'");
  if (options.scheme != "kivi" && options.scheme != "pertoken")
    throw ArgumentError("--scheme: expected kivi or pertoken, found '" + options.scheme + "'");
  for (const int width : widths) stack.formats.push_back(kvtuner_format(width, options.scheme));
  stack.settings = {{.name = options.backend, .choices = everywhere(shape, all_pairs(stack))}};
}

void add_hf(Stack& stack, const CacheShape& shape, const Refusal& refuse) {
  for (int l = 0; l < shape.num_layers(); ++l)
    if (!shape.layers[static_cast<std::size_t>(l)].cached())
      refuse(l, "/kind", "the builder has no cache for linear layers; choose another target");
  const int group = hf_group(shape);
  for (int width = 1; width <= 8; ++width) stack.formats.push_back(hf_format(width, group));
  stack.formats.push_back(plain_format("fp16"));
  Setting setting{.choices = everywhere(shape, all_pairs(stack))};
  const int plain = static_cast<int>(stack.formats.size()) - 1;
  for (int l = 0; l < shape.num_layers(); ++l) {
    if (shape.layers[static_cast<std::size_t>(l)].kind != "sliding") continue;
    setting.choices[static_cast<std::size_t>(l)] = {{plain, plain}};
    setting.forced16.push_back(l);
  }
  stack.settings.push_back(std::move(setting));
}

void add_lmdeploy(Stack& stack, const CacheShape& shape, const StackOptions& options) {
  stack.formats = lmdeploy_formats(options.fp8);
  const auto powers_of_two = std::ranges::all_of(shape.layers, [](const LayerShape& layer) {
    return !layer.cached() || (power_of_two(layer.head_dim[0]) && power_of_two(layer.head_dim[1]));
  });
  const auto add = [&](const char* name, int policy, int k, int v) {
    stack.settings.push_back(
        {.name = name, .number = policy, .choices = everywhere(shape, {{k, v}})});
  };
  if (powers_of_two) add("turbo_quant", 42, 0, 1);
  add("int4", 4, 2, 2);
  options.fp8 ? add("fp8", 16, 3, 3) : add("int8", 8, 3, 3);
}

}  // namespace

std::int64_t Format::bytes(int head_dim) const {
  return std::int64_t{(head_dim + block - 1) / block} * block_bytes + vector_bytes;
}

int Stack::format_index(std::string_view name_) const {
  const auto found = std::ranges::find(formats, name_, &Format::name);
  if (found != formats.end()) return static_cast<int>(found - formats.begin());
  std::string known;
  for (const Format& format : formats) known += " " + format.name;
  throw ArgumentError(name + " has no format '" + std::string(name_) + "', only" + known);
}

std::int64_t Stack::bytes(const LayerShape& layer, const LayerFormat& chosen) const {
  if (!layer.cached()) return 0;
  std::int64_t slot = 0;
  for (const Side side : kSides) slot += format(chosen, side).bytes(layer.head_dim_of(side));
  if (even_slots) slot += slot % 2;
  return slot * layer.kv_heads;
}

std::string target_names() {
  std::string names;
  for (const std::string_view& name : kTargets)
    names.append(&name == kTargets                 ? ""
                 : &name + 1 == std::end(kTargets) ? " or "
                                                   : ", ")
        .append(name);
  return names;
}

Stack make_stack(std::string_view target, const CacheShape& shape, std::string_view architecture,
                 const StackOptions& options, const std::string& file) {
  const Refusal refuse{file};
  for (int l = 0; l < shape.num_layers(); ++l)
    if (shape.layers[static_cast<std::size_t>(l)].kind == "mla")
      refuse(l, "/kind", "latent attention (mla) has no keys and values of heads to quantise");
  Stack stack{.name = std::string(target)};
  if (target == "vllm") {
    stack.version = kVllmVersion;
    add_vllm(stack, shape, options, file);
  } else if (target == "kv-scales") {
    stack.version = kVllmVersion;
    add_fp8(stack, shape, true);
  } else if (target == "sglang") {
    stack.version = kSglangVersion;
    refuse_hybrid(stack, shape, refuse);
    if (std::ranges::find(kSglangModels, architecture) == kSglangModels.end())
      throw InputError(file, "/model/architecture",
                       "SGLang reads K/V scales for llama, qwen2, qwen3, glm4, mimo, opt, exaone4, "
                       "hunyuan, solar, arcee and apertus alone, found " +
                           std::string(architecture) + "; use --target kv-scales with vLLM");
    add_fp8(stack, shape, false);
  } else if (target == "modelopt") {
    stack.version = kModelOptVersion;
    add_modelopt(stack, shape);
  } else if (target == "llamacpp") {
    add_llamacpp(stack, shape, options, refuse);
  } else if (target == "kvtuner") {
    stack.version = kKvTunerVersion;
    add_kvtuner(stack, shape, options, refuse);
  } else if (target == "hf") {
    stack.version = kTransformersVersion;
    add_hf(stack, shape, refuse);
  } else if (target == "lmdeploy") {
    stack.version = kLmDeployVersion;
    add_lmdeploy(stack, shape, options);
  } else {
    throw ArgumentError("unknown target '" + std::string(target) + "': expected " + target_names());
  }
  return stack;
}

StackName parse_stack(std::string_view text) {
  const auto colon = text.find(':');
  StackName out{.target = std::string(text.substr(0, colon)), .options = {}};
  if (std::ranges::find(kTargets, out.target) == std::end(kTargets))
    throw ArgumentError("unknown stack '" + std::string(text) + "': expected " + target_names() +
                        ", perhaps with :DTYPE (vllm), :DIALECT (llamacpp), :BACKEND "
                        "(kvtuner) or :fp8 (lmdeploy)");
  if (colon == std::string_view::npos) return out;
  const std::string detail(text.substr(colon + 1));
  if (out.target == "vllm") {
    out.options.dtypes = {detail};
  } else if (out.target == "llamacpp") {
    out.options.dialect = detail;
  } else if (out.target == "kvtuner") {
    out.options.backend = detail;
  } else if (out.target == "lmdeploy" && detail == "fp8") {
    out.options.fp8 = true;
  } else {
    throw ArgumentError("stack '" + std::string(text) + "': " + out.target + " has no variant '" +
                        detail + "'");
  }
  return out;
}

StackRotation stack_rotation(const Stack& stack, const Format& format, const CacheShape& shape,
                             int layer, Side side, std::string_view sides) {
  if (format.plain()) return {};
  const int d = shape.layers[static_cast<std::size_t>(layer)].head_dim_of(side);
  const auto largest_tile = [d](int least, int most) {
    int tile = 0;
    for (int t = least; t <= most; t *= 2)
      if (d % t == 0) tile = t;
    return tile;
  };
  const auto hadamard = [](int tile) {
    return tile > 0 ? StackRotation{"hadamard", tile} : StackRotation{};
  };
  if (stack.name == "vllm" && format.name.starts_with("turboquant") && side == Side::kKey &&
      format.width < 8)
    return hadamard(d);
  if (stack.name == "lmdeploy" && format.name.starts_with("turbo_quant")) return hadamard(d);
  if (stack.dialect == "mainline") {
    if (sides.empty() || !shape.uniform_head_dim() || d % kMainlineTile != 0) return {};
    return hadamard(side == Side::kKey ? largest_tile(kMainlineTile, d) : kMainlineTile);
  }
  if (stack.dialect == "ik") {
    if (sides.find(side_name(side)) == std::string_view::npos) return {};
    return hadamard(power_of_two(d) ? d : largest_tile(kHadamardMin, kHadamardMax));
  }
  if (format.name.starts_with("turbo")) return {"fixed_signs", kTurboTile};
  return {};
}

}  // namespace kvplan::exporters
