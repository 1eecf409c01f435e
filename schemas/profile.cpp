#include "schemas/profile.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"
#include "schemas/model_json.h"
#include "schemas/profile_tensors.h"
#include "schemas/safetensors.h"
#include "schemas/sha256.h"
#include "schemas/source_json.h"

namespace kvplan {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "kvplan.profile";
constexpr std::int64_t kVersion = 1;
constexpr const char* kDocumentFile = "profile.json";
constexpr const char* kTensorsFile = "profile.safetensors";
constexpr int kMaxCoherentWindows = 1 << 16;
constexpr std::int64_t kWindowColumns = 3;  // global index, tokens, source

json summary_to_json(const LayerSummary& layer, std::size_t index) {
  return {{"index", index},
          {"key_norm", layer.key_norm},
          {"value_norm", layer.value_norm},
          {"norm_ratio", layer.norm_ratio},
          {"mean_share", {{"k", layer.mean_share_k}, {"v", layer.mean_share_v}}},
          {"outlier_channels", {{"k", layer.outlier_channels_k}, {"v", layer.outlier_channels_v}}},
          {"sensitivity", {{"k", layer.sensitivity_k}, {"v", layer.sensitivity_v}}},
          {"weight_mse", layer.weight_mse}};
}

json profile_to_json(const Profile& profile) {
  json sources = json::array(), layers = json::array();
  for (const ProfileSource& source : profile.sources) sources.push_back(source_to_json(source));
  for (const LayerSummary& layer : profile.summary)
    layers.push_back(summary_to_json(layer, layers.size()));
  return {{"format", kFormat},
          {"version", kVersion},
          {"model", model_to_json(profile.model)},
          {"tokens", profile.tokens},
          {"fisher_tokens", profile.fisher_tokens},
          {"window", profile.window},
          {"sink_tokens", profile.sink_tokens},
          {"coherent_windows", profile.coherent_windows},
          {"seed", profile.seed},
          {"sources", sources},
          {"program", profile.program},
          {"layers", layers}};
}

/// Reads {"k":..,"v":..} with the same getter for both.
template <class T, class Get>
void read_sides(JsonObject object, T& k, T& v, const Get& get) {
  k = get(object, "k");
  v = get(object, "v");
  object.finish();
}

LayerSummary summary_from_json(JsonObject object, int index, const ModelSpec& model) {
  const auto number = [](JsonObject& o, const char* name) { return o.number(name); };
  const auto channels = [&](JsonObject& o, const char* name) {
    return o.integers(name, 0, model.kv_heads * model.head_dim - 1);
  };
  LayerSummary layer;
  object.small_integer("index", index, index);
  layer.key_norm = object.number("key_norm", 0);
  layer.value_norm = object.number("value_norm", 0);
  layer.norm_ratio = object.number("norm_ratio", 0);
  read_sides(object.object("mean_share"), layer.mean_share_k, layer.mean_share_v, number);
  read_sides(object.object("outlier_channels"), layer.outlier_channels_k, layer.outlier_channels_v,
             channels);
  read_sides(object.object("sensitivity"), layer.sensitivity_k, layer.sensitivity_v, number);
  layer.weight_mse = object.number("weight_mse", 0);
  object.finish();
  return layer;
}

struct ProfileDocument {
  Profile profile;  // without tensors
  std::string tensors_sha256;
};

ProfileDocument profile_from_json(const json& document, const std::string& file) {
  JsonObject object(document, file);
  object.require_format(kFormat, kVersion);
  ProfileDocument out;
  Profile& profile = out.profile;
  profile.model = model_from_json(object.object("model"));
  profile.tokens = object.integer("tokens");
  profile.fisher_tokens = object.integer("fisher_tokens");
  profile.window = object.small_integer("window", 1);
  profile.sink_tokens = object.small_integer("sink_tokens", 0, profile.window - 1);
  profile.coherent_windows = object.small_integer("coherent_windows", 0, kMaxCoherentWindows);
  profile.seed = object.unsigned_integer("seed");
  for (JsonObject& source : object.objects("sources"))
    profile.sources.push_back(source_from_json(std::move(source)));
  profile.program = object.text("program");
  for (JsonObject& layer : object.objects("layers")) {
    profile.summary.push_back(summary_from_json(
        std::move(layer), static_cast<int>(profile.summary.size()), profile.model));
  }
  if (!profile.summary.empty() &&
      profile.summary.size() != static_cast<std::size_t>(profile.model.num_layers)) {
    object.refuse("layers", "expected " + std::to_string(profile.model.num_layers) +
                                " layers or none, found " + std::to_string(profile.summary.size()));
  }
  JsonObject tensors = object.object("tensors");
  constexpr std::array<std::string_view, 1> kFiles = {
      kTensorsFile};  // a fixed name cannot lead out of the folder
  tensors.choice("file", kFiles);
  out.tensors_sha256 = tensors.sha256("sha256");
  tensors.finish();
  object.finish();
  return out;
}

void check_windows(const Profile& profile, const std::string& file) {
  std::set<std::pair<std::int64_t, std::int64_t>> seen;
  std::int64_t previous = 0;
  for (const ProfileWindow& window : profile.windows) {
    const std::string name = "window " + std::to_string(window.index);
    if (window.index < previous)
      throw InputError(file, "windows", name + ": expected ascending indices from 0");
    previous = window.index;
    if (window.tokens < 1 || window.tokens > profile.window) {
      throw InputError(file, "windows",
                       name + ": expected 1.." + std::to_string(profile.window) +
                           " tokens, found " + std::to_string(window.tokens));
    }
    if (window.source < 0 || window.source >= static_cast<std::int64_t>(profile.sources.size())) {
      throw InputError(file, "windows",
                       name + ": source " + std::to_string(window.source) + " is none of the " +
                           std::to_string(profile.sources.size()) + " sources");
    }
    if (!seen.emplace(window.index, window.source).second)
      throw InputError(file, "windows", name + " is listed twice");
  }
}

template <class Values>
void require_finite(const std::string& file, const std::string& name, const Values& values) {
  const auto bad =
      std::find_if(values.begin(), values.end(), [](auto value) { return !std::isfinite(value); });
  if (bad == values.end()) return;
  throw InputError(file, name,
                   "expected finite values, found NaN or infinity at element " +
                       std::to_string(bad - values.begin()));
}

void require_geometry(const LayerProfile& layer, std::size_t index, const ModelSpec& model) {
  if (layer.kv_heads == model.kv_heads && layer.head_dim == model.head_dim &&
      layer.rotary_dim == model.rotary_dim)
    return;
  throw InternalError("profile layer " + std::to_string(index) + " has kv_heads " +
                      std::to_string(layer.kv_heads) + ", head_dim " +
                      std::to_string(layer.head_dim) + ", rotary_dim " +
                      std::to_string(layer.rotary_dim) + ", its model other ones");
}

/// Everything in `profile` by name, large arrays borrowed. What the reader would refuse is never
/// written: InternalError.
SafetensorsWriter collect_tensors(const Profile& profile) {
  if (profile.layers.size() != static_cast<std::size_t>(profile.model.num_layers)) {
    throw InternalError("profile of " + std::to_string(profile.model.num_layers) +
                        " layers holds " + std::to_string(profile.layers.size()));
  }
  SafetensorsWriter writer;
  const auto add = [&](const std::string& name, const auto& array,
                       const std::vector<std::int64_t>& shape) {
    if (array.shape != shape)
      throw InternalError("profile tensor " + name + " has another shape than its model");
    require_finite(kTensorsFile, name, array.data);
    writer.add_view(name, array);
  };
  Array<double> weight_mse({static_cast<std::int64_t>(profile.layers.size())});
  for (std::size_t l = 0; l < profile.layers.size(); ++l) {
    const LayerProfile& layer = profile.layers[l];
    require_geometry(layer, l, profile.model);
    for_each_layer_tensor(layer, l, profile.model, coherent_count(profile), add);
    Array<double> inv_freq({profile.model.rotary_dim / 2});
    if (layer.inv_freq.size() != inv_freq.data.size()) {
      throw InternalError("profile layer " + std::to_string(l) + " has " +
                          std::to_string(layer.inv_freq.size()) + " rotary frequencies, expected " +
                          std::to_string(inv_freq.data.size()));
    }
    inv_freq.data = layer.inv_freq;
    require_finite(kTensorsFile, profile_layer_prefix(l) + "inv_freq", inv_freq.data);
    writer.add(profile_layer_prefix(l) + "inv_freq", std::move(inv_freq));
    weight_mse.data[l] = layer.weight_mse;
  }
  require_finite(kTensorsFile, "weight_mse", weight_mse.data);
  writer.add("weight_mse", std::move(weight_mse));

  check_windows(profile, kTensorsFile);
  Array<std::int64_t> windows({static_cast<std::int64_t>(profile.windows.size()), kWindowColumns});
  for (std::size_t i = 0; i < profile.windows.size(); ++i) {
    const ProfileWindow& window = profile.windows[i];
    std::copy_n(std::array{window.index, window.tokens, window.source}.begin(), kWindowColumns,
                windows.row(i).begin());
  }
  writer.add("windows", std::move(windows));
  return writer;
}

/// Reads tensors and remembers their names, so that any other is refused.
class TensorReader {
 public:
  TensorReader(const std::filesystem::path& file, const std::string& expected_sha256)
      : container_(file) {
    const std::string found = sha256(container_.file().bytes());
    if (found == expected_sha256) return;
    throw InputError(file.string(), "",
                     "SHA-256 differs from the one in profile.json: expected " + expected_sha256 +
                         ", found " + found +
                         "; the two files do not belong together or one is damaged");
  }

  void read(const std::string& name, Array<double>& array, const std::vector<std::int64_t>& shape) {
    array = container_.f64(name, shape);
    accept(name, array.data);
  }
  void read(const std::string& name, Array<float>& array, const std::vector<std::int64_t>& shape) {
    array = container_.f32(name, shape);
    accept(name, array.data);
  }
  std::vector<ProfileWindow> windows() {
    known_.insert("windows");
    const Array<std::int64_t> array = container_.i64("windows");
    if (array.shape.size() != 2 || array.shape[1] != kWindowColumns) {
      throw InputError(file(), "windows", "expected shape [windows,3]");
    }
    std::vector<ProfileWindow> windows;
    for (std::size_t i = 0; i < static_cast<std::size_t>(array.shape[0]); ++i) {
      const auto row = array.row(i);
      windows.push_back({row[0], row[1], row[2]});
    }
    return windows;
  }
  void finish() const {
    for (const auto& [name, entry] : container_.entries()) {
      if (!known_.contains(name)) throw InputError(file(), name, "unknown tensor");
    }
  }
  std::string file() const { return container_.file().path().string(); }

 private:
  template <class Values>
  void accept(const std::string& name, const Values& values) {
    known_.insert(name);
    require_finite(file(), name, values);
    container_.file().drop_pages(container_.at(name).data);
  }

  SafetensorsFile container_;
  std::set<std::string> known_;
};

void read_tensors(Profile& profile, TensorReader& reader) {
  profile.windows = reader.windows();
  check_windows(profile, reader.file());
  const ModelSpec& model = profile.model;
  profile.layers.resize(static_cast<std::size_t>(model.num_layers));
  Array<double> weight_mse;
  reader.read("weight_mse", weight_mse, {model.num_layers});
  for (std::size_t l = 0; l < profile.layers.size(); ++l) {
    LayerProfile& layer = profile.layers[l];
    layer.kv_heads = model.kv_heads;
    layer.head_dim = model.head_dim;
    layer.rotary_dim = model.rotary_dim;
    layer.weight_mse = weight_mse.data[l];
    for_each_layer_tensor(
        layer, l, model, coherent_count(profile),
        [&](const std::string& name, auto& array, const std::vector<std::int64_t>& shape) {
          reader.read(name, array, shape);
        });
    Array<double> inv_freq;
    reader.read(profile_layer_prefix(l) + "inv_freq", inv_freq, {model.rotary_dim / 2});
    layer.inv_freq = std::move(inv_freq.data);
  }
  reader.finish();
}

}  // namespace

std::string profile_json(const Profile& profile) { return document_text(profile_to_json(profile)); }

void write_profile(const Profile& profile, const std::filesystem::path& folder) {
  json document = profile_to_json(profile);
  try {
    const SafetensorsWriter tensors = collect_tensors(profile);
    document["tensors"] = {{"file", kTensorsFile}, {"sha256", tensors.sha256()}};
    profile_from_json(document, kDocumentFile);
    make_folder(folder);
    tensors.write(folder / kTensorsFile);
  } catch (const InputError& error) {
    throw InternalError(std::string("profile not written: ") + error.what());
  }
  write_file_atomically(folder / kDocumentFile, document_text(document));
}

Profile read_profile(const std::filesystem::path& folder) {
  const std::string file = (folder / kDocumentFile).string();
  if (!std::filesystem::exists(file) && std::filesystem::is_directory(folder))
    throw InputError(
        folder.string(), "",
        "expected the folder of a profile, which holds profile.json; found " +
            std::string(std::filesystem::exists(folder / "plan.json") ? "a plan"
                        : std::filesystem::exists(folder / "checkpoint")
                            ? "an unfinished one: the same profile command continues it"
                            : "none"));
  ProfileDocument document = profile_from_json(read_document(file), file);
  TensorReader reader(folder / kTensorsFile, document.tensors_sha256);
  read_tensors(document.profile, reader);
  return std::move(document.profile);
}

std::string profile_sha256(const std::filesystem::path& folder) {
  return sha256_file(folder / kDocumentFile);
}

}  // namespace kvplan
