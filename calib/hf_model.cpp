// Configuration and tensors of a Hugging Face folder: config.json and safetensors.

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "calib/families.h"
#include "calib/file_model.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"

namespace kvplan::calib {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxJsonBytes = std::size_t{64} << 20;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

json parse_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.size() > kMaxJsonBytes) {
    throw InputError(path.string(), "",
                     "expected at most " + std::to_string(kMaxJsonBytes) +
                         " bytes of JSON, found " + std::to_string(bytes.size()));
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  try {
    return json::parse(text, text + bytes.size());
  } catch (const json::exception& e) {
    throw InputError(path.string(), "", std::string("no valid JSON: ") + e.what());
  }
}

/// One object of config.json; null counts as absent, as it does in transformers.
class Fields {
 public:
  Fields(const json& object, std::string file, std::string pointer = "")
      : object_(object), file_(std::move(file)), pointer_(std::move(pointer)) {
    if (!object.is_object()) {
      throw InputError(file_, pointer_,
                       std::string("expected an object, found ") + object.type_name());
    }
  }

  const json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  int size(const char* name, std::int64_t max) const {
    return checked_size(name, required(name), max);
  }
  int size_or(const char* name, int otherwise, std::int64_t max) const {
    const auto* value = find(name);
    return value ? checked_size(name, *value, max) : otherwise;
  }
  double number(const char* name) const { return checked_number(name, required(name)); }
  double number_or(const char* name, double otherwise) const {
    const auto* value = find(name);
    return value ? checked_number(name, *value) : otherwise;
  }
  std::string text(const char* name) const {
    const auto& value = required(name);
    if (!value.is_string()) fail_type(name, "a string", value);
    return value.get<std::string>();
  }
  bool flag_or(const char* name, bool otherwise) const {
    const auto* value = find(name);
    if (value && !value->is_boolean()) fail_type(name, "true or false", *value);
    return value ? value->get<bool>() : otherwise;
  }
  Fields object(const char* name) const { return {required(name), file_, pointer_ + "/" + name}; }

  [[noreturn]] void fail(const char* name, const std::string& message) const {
    throw InputError(file_, pointer_ + "/" + name, message);
  }

 private:
  const json& required(const char* name) const {
    const auto* value = find(name);
    if (!value) fail(name, "the field is missing");
    return *value;
  }
  [[noreturn]] void fail_type(const char* name, const char* expected, const json& found) const {
    fail(name, std::string("expected ") + expected + ", found " + found.type_name());
  }
  int checked_size(const char* name, const json& value, std::int64_t max) const {
    if (!value.is_number_integer()) fail_type(name, "a whole number", value);
    // An unsigned value beyond int64 would wrap to a negative one, which is refused as well.
    const auto n = value.get<std::int64_t>();
    if (n < 1 || n > max) {
      fail(name, "expected 1 to " + std::to_string(max) + ", found " + value.dump());
    }
    return static_cast<int>(n);
  }
  double checked_number(const char* name, const json& value) const {
    if (!value.is_number()) fail_type(name, "a number", value);
    return value.get<double>();
  }

  const json& object_;
  std::string file_, pointer_;
};

void check_fixed(const Fields& fields, std::span<const HfFixed> all) {
  for (const auto& [field, required] : all) {
    const auto* found = fields.find(field);
    if (!found || *found == json::parse(required)) continue;
    // The start of a large object says enough.
    fields.fail(field, std::string("only ") + required + " is supported, found " +
                           found->dump().substr(0, 80));
  }
}

/// transformers 5 lists the kind of every layer.
void check_layer_types(const Fields& fields) {
  const auto* types = fields.find("layer_types");
  if (!types) return;
  const bool all_full = types->is_array() && std::ranges::all_of(*types, [](const json& type) {
                          return type == "full_attention";
                        });
  if (!all_full) fields.fail("layer_types", "only \"full_attention\" is supported");
}

RopeScaling read_llama3(const Fields& rope) {
  RopeScaling scaling{
      .type = "llama3",
      .factor = rope.number("factor"),
      .low_freq_factor = rope.number("low_freq_factor"),
      .high_freq_factor = rope.number("high_freq_factor"),
      .original_context = rope.size("original_max_position_embeddings", kMaxContext)};
  if (!(scaling.low_freq_factor > 0 && scaling.high_freq_factor > scaling.low_freq_factor)) {
    rope.fail("high_freq_factor", "expected a value above low_freq_factor, and that above 0");
  }
  return scaling;
}

/// `rope`: the object rope_parameters (transformers 5) or rope_scaling (before).
std::optional<RopeScaling> read_scaling(const Fields& rope) {
  const char* name = rope.find("rope_type") ? "rope_type" : "type";
  const auto type = rope.text(name);
  std::optional<RopeScaling> scaling;
  if (type == "default") return std::nullopt;
  if (type == "linear") {
    scaling = RopeScaling{.type = type, .factor = rope.number("factor")};
  } else if (type == "llama3") {
    scaling = read_llama3(rope);
  } else {
    rope.fail(name, "the rotary scaling \"" + type +
                        "\" is not supported; supported are default, linear and llama3");
  }
  if (!(std::isfinite(scaling->factor) && scaling->factor > 0))
    rope.fail("factor", "expected a factor above 0");
  return scaling;
}

RopeSpec read_rope(const Fields& fields) {
  if (fields.find("rope_scaling") && fields.find("rope_parameters")) {
    fields.fail("rope_scaling", "expected this or rope_parameters, found both");
  }
  RopeSpec rope;
  rope.base = fields.number_or("rope_theta", rope.base);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    if (!fields.find(name)) continue;
    const auto parameters = fields.object(name);
    constexpr HfFixed kWholeHead[] = {{"partial_rotary_factor", "1"}};
    check_fixed(parameters, kWholeHead);
    rope.base = parameters.number_or("rope_theta", rope.base);
    rope.scaling = read_scaling(parameters);
  }
  return rope;
}

ModelConfig read_config(const Fields& fields, const Family& family) {
  check_fixed(fields, common_hf_fixed());
  check_fixed(fields, family.hf_fixed);
  check_layer_types(fields);

  ModelConfig c;
  c.architecture = family.name;
  c.container = "hf";
  c.num_layers = fields.size("num_hidden_layers", kMaxLayers);
  c.hidden_size = fields.size("hidden_size", kMaxWidth);
  c.intermediate_size = fields.size("intermediate_size", kMaxWidth);
  c.vocab_size = fields.size("vocab_size", kMaxWidth);
  c.query_heads = fields.size("num_attention_heads", kMaxWidth);
  c.kv_heads = fields.size_or("num_key_value_heads", c.query_heads, kMaxWidth);
  if (!fields.find("head_dim") && c.hidden_size % c.query_heads != 0) {
    fields.fail("num_attention_heads",
                "the hidden size " + std::to_string(c.hidden_size) + " is no multiple of the " +
                    std::to_string(c.query_heads) + " heads, and there is no head_dim");
  }
  c.head_dim = fields.size_or("head_dim", c.hidden_size / c.query_heads, kMaxWidth);
  c.rotary_dim = c.head_dim;
  c.rope = read_rope(fields);
  c.norm_epsilon = fields.number("rms_norm_eps");
  c.max_context = fields.size("max_position_embeddings", kMaxContext);
  c.tied_embeddings = fields.flag_or("tie_word_embeddings", false);
  c.output_bias = family.optional_bias && fields.flag_or("attention_bias", false);
  c.qkv_bias = family.qkv_bias || c.output_bias;
  return c;
}

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
  explicit TensorCollector(const ModelConfig& config) : config_(config) {
    for (const auto& [name, shape] : expected_tensors(config))
      gguf_names_[hf_tensor_name(name)] = name;
  }

  void add(const std::shared_ptr<const SafetensorsFile>& shard) {
    const std::shared_ptr<const MappedFile> file(shard, &shard->file());
    const auto path = file->path().string();
    for (const auto& [name, entry] : shard->entries()) {
      // A tied head is the embedding, whatever the file holds; old checkpoints keep the frequencies
      // that follow from config.json.
      const bool tied = config_.tied_embeddings && name == "lm_head.weight";
      if (tied || name.ends_with("rotary_emb.inv_freq")) continue;
      const auto known = gguf_names_.find(name);
      if (known == gguf_names_.end()) refuse_tensor(*file, name, config_);
      const StoredTensor tensor{.stored_name = name,
                                .file = file,
                                .type = element_type(entry, path, name),
                                .shape = entry.shape,
                                .data = entry.data};
      if (!tensors_.try_emplace(known->second, tensor).second) {
        throw InputError(path, name, "the tensor is in two shards");
      }
    }
  }
  StoredTensors take() { return std::move(tensors_); }

 private:
  const ModelConfig& config_;
  std::map<std::string, std::string> gguf_names_;  // by Hugging Face name
  StoredTensors tensors_;
};

/// Opens every shard that the index names, each once, and checks that it holds what the index says.
void add_shards(const std::filesystem::path& index, TensorCollector& collector) {
  const json document = parse_file(index);
  const Fields root(document, index.string());
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
  const auto config_path = folder / "config.json";
  const json document = parse_file(config_path);
  const Fields fields(document, config_path.string());
  const auto& family = find_family(fields.text("model_type"), config_path.string(), "/model_type");

  StoredModel model{.path = folder, .config = read_config(fields, family), .tensors = {}};
  TensorCollector collector(model.config);
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
  return model;
}

}  // namespace kvplan::calib
