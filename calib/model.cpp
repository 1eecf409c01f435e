#include "calib/model.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "calib/dequantize.h"
#include "calib/families.h"
#include "calib/file_model.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::calib {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const auto n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
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
  require(c.head_dim % 2 == 0,
          "rotary embedding needs an even head size, found " + std::to_string(c.head_dim));
  require(c.rotary_dim == c.head_dim,
          "expected rotary embedding of all " + std::to_string(c.head_dim) +
              " channels of a head, found " + std::to_string(c.rotary_dim));
  require(std::isfinite(c.norm_epsilon) && c.norm_epsilon > 0,
          "the epsilon of the norms must be above 0, found " + std::to_string(c.norm_epsilon));
  require(std::isfinite(c.rope.base) && c.rope.base > 1,
          "the rotary base must be above 1, found " + std::to_string(c.rope.base));
}

void check_tensors(const StoredModel& model) {
  const auto expected = expected_tensors(model.config);
  for (const auto& [name, shape] : expected) {
    const auto found = model.tensors.find(name);
    if (found == model.tensors.end()) {
      throw InputError(
          model.path.string(), model.config.container == "hf" ? hf_tensor_name(name) : name,
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
    for (const char* part : {"attn_k", "attn_v"}) {
      const auto& tensor =
          model.tensors.at("blk." + std::to_string(layer) + "." + part + ".weight");
      hash.update(tensor.data);
      tensor.file->drop_pages(tensor.data);
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
          .kv_weights_sha256 = hash.finish()};
}

/// Where a stored row goes: inside a head, rotary pair j is stored as rows 2j, 2j+1 and read as
/// rows j, j + head_dim/2.
std::size_t half_split_row(std::size_t row, std::size_t head_dim) {
  const std::size_t head = row / head_dim, within = row % head_dim;
  return head * head_dim + within % 2 * (head_dim / 2) + within / 2;
}

class FileModel final : public ModelReader {
 public:
  explicit FileModel(StoredModel model) : model_(std::move(model)) {
    check_config(model_.config, model_.path.string());
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
    // Vectors are one row, except where rows move: then each element is a row.
    const bool one_row = tensor.shape.size() == 1 && tensor.interleaved_heads == 0;
    const auto rows = one_row ? 1 : static_cast<std::size_t>(tensor.shape.front());
    std::size_t elements = 1;
    for (const auto n : tensor.shape) elements *= static_cast<std::size_t>(n);
    if (out.size() != elements) {
      throw ArgumentError("tensor " + std::string(name) + " has " + std::to_string(elements) +
                          " elements, the buffer " + std::to_string(out.size()));
    }
    const std::size_t columns = elements / rows, row_bytes = tensor.data.size() / rows;
    const std::size_t head_dim =
        tensor.interleaved_heads ? rows / static_cast<std::size_t>(tensor.interleaved_heads) : 0;
    for (std::size_t row = 0; row < rows; ++row) {
      const auto to =
          out.subspan((head_dim ? half_split_row(row, head_dim) : row) * columns, columns);
      dequantize(tensor.type, tensor.data.subspan(row * row_bytes, row_bytes), to);
      if (const auto bad = first_non_finite(to); bad < columns) {
        throw InputError(tensor.file->path().string(), tensor.stored_name,
                         "expected finite weights, found " + std::to_string(to[bad]) +
                             " at element " + std::to_string(row * columns + bad) + " of " +
                             shape_text(tensor.shape));
      }
    }
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

/// Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend
/// between. Source: Hugging Face transformers, modeling_rope_utils.py, _compute_llama3_parameters.
double llama3_frequency(double frequency, const RopeScaling& s) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const auto context = static_cast<double>(s.original_context);
  if (wavelength < context / s.high_freq_factor) return frequency;
  if (wavelength > context / s.low_freq_factor) return frequency / s.factor;
  const double smooth =
      (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * frequency / s.factor + smooth * frequency;
}

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

std::vector<double> rotary_frequencies(const ModelConfig& config) {
  std::vector<double> frequencies(static_cast<std::size_t>(config.rotary_dim / 2));
  for (std::size_t j = 0; j < frequencies.size(); ++j) {
    const double exponent = 2 * static_cast<double>(j) / config.rotary_dim;
    const double plain = 1 / std::pow(config.rope.base, exponent);
    const auto& scaling = config.rope.scaling;
    if (!scaling) {
      frequencies[j] = plain;
    } else if (scaling->type == "linear") {
      frequencies[j] = plain / scaling->factor;
    } else if (scaling->type == "llama3") {
      frequencies[j] = llama3_frequency(plain, *scaling);
    } else {
      throw InternalError("unknown rotary scaling " + scaling->type);
    }
  }
  return frequencies;
}

const char* weight_type_name(WeightType type) {
  return type == WeightType::kFloat32 ? "fp32" : type == WeightType::kBFloat16 ? "bf16" : "fp16";
}

}  // namespace kvplan::calib
