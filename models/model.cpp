#include "models/model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "models/families.h"
#include "models/file_model.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::models {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const auto n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

void check_rope(const ModelConfig& c, const RopeSpec& rope, const std::string& file) {
  const auto require = [&](bool holds, const std::string& message) {
    if (!holds) throw InputError(file, "", message);
  };
  require(std::isfinite(rope.base) && rope.base > 1,
          "the rotary base must be above 1, found " + std::to_string(rope.base));
  if (!rope.scaling) return;
  const RopeScaling& s = *rope.scaling;
  require(s.type != "dynamic" || c.rotary_dim > 2,
          "dynamic rotary scaling needs more than 2 rotary channels");
  require(std::isfinite(s.attention_factor) && s.attention_factor > 0,
          "the attention factor of the rotary scaling must be above 0, found " +
              std::to_string(s.attention_factor));
  for (const auto& factors : {s.short_factors, s.long_factors}) {
    if (s.type != "longrope") break;
    require(std::ssize(factors) == c.rotary_dim / 2 &&
                std::ranges::all_of(factors, [](double f) { return std::isfinite(f) && f > 0; }),
            "longrope needs " + std::to_string(c.rotary_dim / 2) +
                " positive factors for short and for long sequences, found " +
                std::to_string(factors.size()));
  }
}

/// Relations between fields that both containers must keep.
void check_config(const ModelConfig& c, const std::string& file) {
  const auto require = [&](bool holds, const std::string& message) {
    if (!holds) throw InputError(file, "", message);
  };
  require(c.query_heads % c.kv_heads == 0,
          "the number of query heads, " + std::to_string(c.query_heads) +
              ", must be a multiple of the number of key/value heads, " +
              std::to_string(c.kv_heads));
  require(c.rotary_dim % 2 == 0 && c.rotary_dim <= c.head_dim,
          "expected rotary embedding of an even number of channels, at most the " +
              std::to_string(c.head_dim) + " of a head, found " + std::to_string(c.rotary_dim));
  require(std::isfinite(c.norm_epsilon) && c.norm_epsilon > 0,
          "the epsilon of the norms must be above 0, found " + std::to_string(c.norm_epsilon));
  for (const double cap : {c.attention_soft_cap, c.logit_soft_cap})
    require(std::isfinite(cap) && cap >= 0,
            "a soft cap must be above 0, found " + std::to_string(cap));
  require(
      std::isfinite(c.attention_scale) && c.attention_scale >= 0,
      "the scale of attention scores must be above 0, found " + std::to_string(c.attention_scale));
  check_rope(c, c.rope, file);
  if (c.local_rope) check_rope(c, *c.local_rope, file);
}

void check_tensors(const StoredModel& model) {
  const auto expected = expected_tensors(model.config);
  for (const auto& [name, shape] : expected) {
    const auto found = model.tensors.find(name);
    if (found == model.tensors.end()) {
      const auto stored = model.stored_names.find(name);
      throw InputError(
          model.path.string(), stored == model.stored_names.end() ? name : stored->second,
          "expected a tensor of shape " + shape_text(shape) + ", found none of this name");
    }
    if (found->second.shape != shape) {
      throw InputError(
          found->second.file->path().string(), found->second.stored_name,
          "expected the shape " + shape_text(shape) + ", found " + shape_text(found->second.shape));
    }
  }
  if (model.tensors.size() == expected.size()) return;
  for (const auto& [name, tensor] : model.tensors) {
    if (std::ranges::none_of(expected, [&](const auto& e) { return e.first == name; })) {
      refuse_tensor(*tensor.file, tensor.stored_name, model.config);
    }
  }
}

ModelSpec make_spec(const StoredModel& model) {
  const auto& c = model.config;
  Sha256 hash;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const void* fused = nullptr;  // goes in once
    for (const char* part : {"attn_k", "attn_v"}) {
      const auto& tensor =
          model.tensors.at("blk." + std::to_string(layer) + "." + part + ".weight");
      if (tensor.whole.data() == fused) continue;
      fused = tensor.whole.data();
      hash.update(tensor.whole);
      tensor.file->drop_pages(tensor.whole);
    }
  }
  return {.architecture = c.architecture,
          .num_layers = c.num_layers,
          .query_heads = c.query_heads,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .rotary_dim = c.rotary_dim,
          .rope = c.rope,
          .container = c.container,
          .kv_weights_sha256 = hash.finish(),
          .windows = c.windows,
          .local_rope = c.local_rope};
}

class FileModel final : public ModelReader {
 public:
  explicit FileModel(StoredModel model) : model_(std::move(model)) {
    check_config(model_.config, model_.path.string());
    split_fused_tensors(model_);
    check_tensors(model_);
    spec_ = make_spec(model_);
  }

  const ModelConfig& config() const override { return model_.config; }
  const ModelSpec& spec() const override { return spec_; }
  std::filesystem::path path() const override { return model_.path; }
  bool has(std::string_view name) const override { return model_.tensors.contains(name); }
  std::vector<std::int64_t> shape(std::string_view name) const override { return at(name).shape; }

  void read(std::string_view name, std::span<float> out) const override {
    const auto& tensor = at(name);
    std::size_t elements = 1;
    for (const auto n : tensor.shape) elements *= static_cast<std::size_t>(n);
    if (out.size() != elements) {
      throw ArgumentError("tensor " + std::string(name) + " has " + std::to_string(elements) +
                          " elements, the buffer " + std::to_string(out.size()));
    }
    read_values(tensor, out);
    tensor.file->drop_pages(tensor.data);
  }

 private:
  const StoredTensor& at(std::string_view name) const {
    const auto found = model_.tensors.find(name);
    if (found == model_.tensors.end()) {
      throw InputError(model_.path.string(), std::string(name), "the model has no such tensor");
    }
    return found->second;
  }

  StoredModel model_;
  ModelSpec spec_;
};

}  // namespace

void refuse_tensor(const MappedFile& file, const std::string& stored_name,
                   const ModelConfig& config) {
  throw InputError(
      file.path().string(), stored_name,
      "a " + config.architecture + " model of " + std::to_string(config.num_layers) +
          " layers has no place for this tensor; the model is of a variant that is not supported");
}

std::unique_ptr<ModelReader> open_model(const std::filesystem::path& path) {
  return std::make_unique<FileModel>(std::filesystem::is_directory(path) ? read_hf_model(path)
                                                                         : read_gguf_model(path));
}

}  // namespace kvplan::models
