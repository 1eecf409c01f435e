// Weights of a Hugging Face folder: safetensors, one file or shards.

#include <algorithm>
#include <map>
#include <utility>

#include "models/families.h"
#include "models/file_model.h"
#include "models/hf_config.h"
#include "models/hf_fields.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"

namespace kvplan::models {
namespace {

using nlohmann::json;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

GgmlType element_type(const SafetensorsEntry& entry, const std::string& file,
                      const std::string& name) {
  for (const auto& [dtype, type] :
       {std::pair{"F32", GgmlType::kF32}, {"F16", GgmlType::kF16}, {"BF16", GgmlType::kBF16}}) {
    if (entry.dtype == dtype) return type;
  }
  throw InputError(file, name, "expected weights of type F32, F16 or BF16, found " + entry.dtype);
}

/// Collects the tensors of safetensors files under their GGUF names.
class TensorCollector {
 public:
  TensorCollector(const Family& family, const ModelConfig& config)
      : family_(family), config_(config) {
    for (const auto& [gguf, hf] : hf_tensor_names(family, config)) gguf_names_[hf] = gguf;
  }

  void add(const std::shared_ptr<const SafetensorsFile>& shard) {
    const std::shared_ptr<const MappedFile> file(shard, &shard->file());
    const auto path = file->path().string();
    for (const auto& [name, entry] : shard->entries()) {
      // A tied head is the embedding, whatever the file holds.
      if ((config_.tied_embeddings && name == "lm_head.weight") || is_ignored(name)) continue;
      const auto known = gguf_names_.find(without_prefix(name));
      if (known == gguf_names_.end()) refuse_tensor(*file, name, config_);
      StoredTensor tensor{.stored_name = name,
                          .file = file,
                          .type = element_type(entry, path, name),
                          .shape = entry.shape,
                          .data = entry.data};
      if (family_.hf_transposed && known->second.starts_with("blk.") && tensor.shape.size() == 2) {
        std::swap(tensor.shape[0], tensor.shape[1]);
        tensor.stored_columns = tensor.shape[0];
      }
      if (known->second.ends_with("norm.weight")) tensor.offset = family_.hf_norm_offset;
      if (!tensors_.try_emplace(known->second, tensor).second) {
        throw InputError(path, name, "the tensor is in two shards");
      }
    }
  }
  StoredTensors take() { return std::move(tensors_); }

 private:
  bool is_ignored(std::string_view name) const {
    return std::ranges::any_of(family_.hf_tensors->ignored,
                               [&](const char* end) { return name.ends_with(end); });
  }
  std::string without_prefix(const std::string& name) const {
    const std::string_view prefix = family_.hf_tensors->optional_prefix;
    return name.starts_with(prefix) ? name.substr(prefix.size()) : name;
  }

  const Family& family_;
  const ModelConfig& config_;
  std::map<std::string, std::string> gguf_names_;  // by Hugging Face name
  StoredTensors tensors_;
};

/// Opens every shard that the index names, each once, and checks that it holds what the index says.
void add_shards(const std::filesystem::path& index, TensorCollector& collector) {
  const json document = parse_hf_json(index);
  const HfObject root(document, index.string());
  if (!root.find("weight_map") || !root.find("weight_map")->is_object()) {
    root.fail("weight_map", "expected an object of tensor names and files");
  }
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> shards;
  for (const auto& [name, value] : root.find("weight_map")->items()) {
    const auto field = "/weight_map/" + name;
    const auto shard_name = value.is_string() ? value.get<std::string>() : std::string();
    if (shard_name.empty() || std::filesystem::path(shard_name).filename() != shard_name ||
        shard_name == "..") {
      throw InputError(index.string(), field,
                       "expected the name of a file in the same folder, found " + value.dump());
    }
    auto& shard = shards[shard_name];
    if (!shard) {
      shard = std::make_shared<const SafetensorsFile>(index.parent_path() / shard_name);
      collector.add(shard);
    }
    if (!shard->has(name)) {
      throw InputError(index.string(), field, "the shard " + shard_name + " has no such tensor");
    }
  }
}

}  // namespace

StoredModel read_hf_model(const std::filesystem::path& folder) {
  auto [family, config] = read_hf_config(folder / "config.json");
  StoredModel model{.path = folder, .config = std::move(config), .tensors = {}};
  TensorCollector collector(*family, model.config);
  if (std::filesystem::exists(folder / kSingleFile)) {
    collector.add(std::make_shared<const SafetensorsFile>(folder / kSingleFile));
  } else if (std::filesystem::exists(folder / kIndexFile)) {
    add_shards(folder / kIndexFile, collector);
  } else {
    throw InputError(folder.string(), "",
                     std::string("expected weights in ") + kSingleFile + " or " + kIndexFile +
                         ", found neither; save the model with safe_serialization");
  }
  model.tensors = collector.take();
  for (const auto& [gguf, hf] : hf_tensor_names(*family, model.config)) {
    model.stored_names[gguf] = hf;
    for (const auto& [fused, parts] : fused_tensors())
      if (const auto at = gguf.find(fused); at != std::string::npos)
        for (const char* part : parts)
          model.stored_names[std::string(gguf).replace(at, std::string_view(fused).size(), part)] =
              hf;
  }
  return model;
}

}  // namespace kvplan::models
