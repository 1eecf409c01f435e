// KVTuner presets: a map from layer to widths, or from layer to KV head to widths. Read as events,
// so that a hostile file can neither nest nor repeat itself into memory.

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <array>
#include <charconv>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include "exporters/import_plan.h"
#include "exporters/stack_tables.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

constexpr int kMaxDepth = 3;  // layer, head, field
constexpr int kMaxWidth = 8;
constexpr int kMaxIndex = 1 << 16;

struct Widths {
  std::array<std::optional<int>, 2> bits;  // K, V
};
/// By layer and KV head; head -1 stands for all of them.
using Preset = std::map<int, std::map<int, Widths>>;

std::string place(const YAML::Mark& mark) {
  return "line " + std::to_string(mark.line + 1) + ", column " + std::to_string(mark.column + 1);
}

class PresetReader : public YAML::EventHandler {
 public:
  explicit PresetReader(std::string file) : file_(std::move(file)) {}
  Preset take() {
    if (preset_.empty()) throw InputError(file_, "", "expected a map of layers, found nothing");
    return std::move(preset_);
  }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) refuse(mark, "expected one document");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "expected a map or a width, found nothing");
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "aliases are not read");
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {
    refuse(mark, "expected a map, found a list");
  }
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    if (anchor != 0) refuse(mark, "anchors are not read");
    if (!levels_.empty() && !levels_.back().key)
      refuse(mark, "expected a name or a number as key, found a map");
    if (static_cast<int>(levels_.size()) == kMaxDepth)
      refuse(mark, "expected a width, found a map");
    levels_.emplace_back();
  }
  void OnMapEnd() override {
    levels_.pop_back();
    if (!levels_.empty()) levels_.back().key.reset();
  }
  void OnScalar(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                const std::string& value) override {
    if (anchor != 0) refuse(mark, "anchors are not read");
    if (levels_.empty()) refuse(mark, "expected a map of layers, found a scalar");
    Level& level = levels_.back();
    if (!level.key) {
      if (!level.seen.insert(value).second) refuse(mark, "\"" + value + "\" stands here twice");
      level.key = value;
      return;
    }
    add(mark, value);
    level.key.reset();
  }

 private:
  struct Level {
    std::optional<std::string> key;
    std::set<std::string> seen;
  };

  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& message) const {
    throw InputError(file_, place(mark), message);
  }

  int integer(const YAML::Mark& mark, const std::string& text, int least, int most,
              const char* what) const {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
      refuse(mark, std::string("expected ") + what + " of " + std::to_string(least) + ".." +
                       std::to_string(most) + ", found \"" + text.substr(0, 40) + "\"");
    return value;
  }

  void add(const YAML::Mark& mark, const std::string& value) {
    if (levels_.size() < 2) refuse(mark, "expected widths of the layer, found a scalar");
    const int layer = integer(mark, *levels_[0].key, 0, kMaxIndex, "a layer");
    const int head =
        levels_.size() == 3 ? integer(mark, *levels_[1].key, 0, kMaxIndex, "a KV head") : -1;
    const std::string& field = *levels_.back().key;
    if (field != "nbits_key" && field != "nbits_value")
      refuse(mark, "expected nbits_key and nbits_value, found \"" + field.substr(0, 40) + "\"");
    preset_[layer][head].bits[field == "nbits_key" ? 0 : 1] =
        integer(mark, value, 1, kMaxWidth, "a width");
  }

  std::string file_;
  int documents_ = 0;
  std::vector<Level> levels_;
  Preset preset_;
};

Preset read_preset(std::string_view text, const std::string& file) {
  std::istringstream in{std::string(text)};
  PresetReader reader(file);
  try {
    YAML::Parser parser(in);
    while (parser.HandleNextDocument(reader)) {
    }
  } catch (const YAML::Exception& error) {
    throw InputError(file, place(error.mark), "expected YAML: " + error.msg);
  }
  return reader.take();
}

/// "kivi" or "pertoken" of <model>_<scheme>_KVTuner<bits>_<n>.yaml.
std::string scheme_of(const std::string& file, const std::string& given) {
  if (!given.empty()) {
    if (given != "kivi" && given != "pertoken")
      throw ArgumentError("--scheme: expected kivi or pertoken, found '" + given + "'");
    return given;
  }
  const std::string stem = std::filesystem::path(file).stem().string() + "_";
  const bool kivi = stem.find("_kivi_") != std::string::npos;
  const bool per_token = stem.find("_pertoken_") != std::string::npos;
  if (kivi == per_token)
    throw InputError(file, "",
                     "expected a name such as MODEL_kivi_KVTuner4_0.yaml or "
                     "MODEL_pertoken_KVTuner4_0.yaml, which tells the codec; give --scheme");
  return kivi ? "kivi" : "pertoken";
}

}  // namespace

PlanBundle import_kvtuner(std::string_view text, const std::string& file,
                          const ImportOptions& options) {
  const std::string scheme = scheme_of(file, options.scheme);
  const Preset preset = read_preset(text, file);
  PlanBundle bundle = empty_import("kvtuner", "KVTuner", text, options);
  Plan& plan = bundle.plan;
  const int layers = plan.model.num_layers, heads = plan.model.kv_heads;
  if (std::ssize(preset) != layers || preset.rbegin()->first != layers - 1)
    throw InputError(file, "",
                     "expected widths of the layers 0.." + std::to_string(layers - 1) +
                         " of the model, each once, found " + std::to_string(preset.size()) +
                         " layers up to " + std::to_string(preset.rbegin()->first));
  std::int64_t bytes = 0;
  for (const auto& [l, by_head] : preset) {
    const std::string where = std::to_string(l);
    const bool shared = by_head.begin()->first < 0;
    if (shared ? by_head.size() != 1
               : std::ssize(by_head) != heads || by_head.rbegin()->first != heads - 1)
      throw InputError(
          file, where,
          "expected one pair of widths, or one for each of " + std::to_string(heads) + " KV heads");
    for (const Side side : kSides) {
      std::vector<Format> formats;
      for (int h = 0; h < heads; ++h) {
        const Widths& widths = by_head.at(shared ? -1 : h);
        const auto bits = widths.bits[static_cast<std::size_t>(side)];
        if (!bits)
          throw InputError(file, where,
                           side == Side::kKey ? "nbits_key is missing" : "nbits_value is missing");
        formats.push_back(kvtuner_format(*bits, scheme));
      }
      bytes += fill_side(formats, plan.layers[static_cast<std::size_t>(l)].side(side),
                         plan.model.head_dim);
    }
  }
  if (scheme == "kivi") plan.window = kKiviWindow;
  set_sizes(bytes, plan);
  return bundle;
}

}  // namespace kvplan::exporters
