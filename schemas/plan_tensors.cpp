#include "schemas/plan_tensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <set>
#include <utility>

#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan {
namespace {

constexpr int kMaxLevelBits = 8;
constexpr int kMaxTrellisBits = 4;
constexpr std::size_t kTrellisStates = 256;

using Shape = std::vector<std::int64_t>;

std::string layer_prefix(std::size_t layer) { return "layers." + std::to_string(layer) + "."; }

std::string levels_name(int width) { return "levels." + std::to_string(width); }
std::string trellis_name(int width) { return "lut." + std::to_string(width); }

using Half = _Float16;
static_assert(sizeof(Half) == sizeof(std::uint16_t));

std::vector<float> from_half(const std::vector<std::uint16_t>& bits) {
  std::vector<float> values;
  for (const std::uint16_t half : bits)
    values.push_back(static_cast<float>(std::bit_cast<Half>(half)));
  return values;
}

Array<std::uint16_t> to_half(const std::vector<float>& values) {
  Array<std::uint16_t> bits;
  bits.shape = {static_cast<std::int64_t>(values.size())};
  for (const float value : values)
    bits.data.push_back(std::bit_cast<std::uint16_t>(static_cast<Half>(value)));
  return bits;
}

/// Calls visit(name, array, shape) for each tensor that a side may have; the one list of names and
/// shapes.
template <class Tensors, class Visit>
void for_each_tensor(Tensors& side, Side which, std::size_t layer, const ModelSpec& model,
                     const Visit& visit) {
  const std::int64_t heads = model.kv_heads, d = model.head_dim;
  const std::string prefix = layer_prefix(layer) + side_name(which) + ".";
  visit(prefix + "analysis", side.analysis, Shape{heads, d, d});
  visit(prefix + "synthesis", side.synthesis, Shape{heads, d, d});
  visit(prefix + "lambda", side.lambda, Shape{heads, d});
  visit(prefix + "mean", side.mean, Shape{heads, d});
  if (which == Side::kKey) visit(prefix + "mean_rotated", side.mean_rotated, Shape{heads, d});
  visit(prefix + "absmax", side.absmax, Shape{heads});
}

template <class Values>
bool all_finite(const Values& values) {
  return std::all_of(values.begin(), values.end(), [](auto value) { return std::isfinite(value); });
}

/// Finds what is wrong with tensors that have the right shapes; the caller chooses the type of
/// error.
class ContentCheck {
 public:
  explicit ContentCheck(std::string file) : file_(std::move(file)) {}

  void check(const Plan& plan, const PlanTensors& tensors) const {
    for (const auto& [width, levels] : tensors.levels) check_levels(width, levels);
    for (const auto& [width, values] : tensors.trellis) check_trellis(width, values);
    for (std::size_t l = 0; l < tensors.layers.size(); ++l) {
      const LayerTensors& layer = tensors.layers[l];
      require_finite(layer_prefix(l) + "inv_freq", layer.inv_freq);
      for (const Side side : kSides) {
        for_each_tensor(layer.side(side), side, l, plan.model,
                        [&](const std::string& name, const Array<float>& array, const Shape&) {
                          require_finite(name, array.data);
                        });
      }
    }
    if (plan.codec == "calibrated") require_complete(plan, tensors);
  }

 private:
  [[noreturn]] void refuse(const std::string& name, const std::string& message) const {
    throw InputError(file_, name, message);
  }

  template <class Values>
  void require_finite(const std::string& name, const Values& values) const {
    if (!all_finite(values)) refuse(name, "expected finite values, found NaN or infinity");
  }

  void check_levels(int width, const std::vector<float>& levels) const {
    const std::string name = levels_name(width);
    if (width < 1 || width > kMaxLevelBits) refuse(name, "expected a width of 1..8 bits");
    const std::size_t count = std::size_t{1} << width;
    if (levels.size() != count) {
      refuse(name, "expected " + std::to_string(count) + " levels, found " +
                       std::to_string(levels.size()));
    }
    require_finite(name, levels);
    if (std::adjacent_find(levels.begin(), levels.end(), std::greater_equal<>()) != levels.end()) {
      refuse(name, "expected strictly ascending levels");
    }
  }

  void check_trellis(int width, const std::vector<float>& values) const {
    const std::string name = trellis_name(width);
    if (width < 1 || width > kMaxTrellisBits) refuse(name, "expected a width of 1..4 bits");
    if (values.size() != kTrellisStates) {
      refuse(name, "expected " + std::to_string(kTrellisStates) + " values, found " +
                       std::to_string(values.size()));
    }
    require_finite(name, values);
    for (const float value : values) {
      if (static_cast<float>(static_cast<Half>(value)) != value)
        refuse(name, "expected values that fp16 holds exactly, found " + std::to_string(value));
    }
  }

  /// The calibrated codec cannot run without its transforms, and without the means if it centres.
  void require_complete(const Plan& plan, const PlanTensors& tensors) const {
    for (std::size_t l = 0; l < plan.layers.size(); ++l) {
      for (const Side side : kSides) {
        if (plan.layers[l].side(side).heads.front().widths.front() == kFp16Width) continue;
        const std::string prefix = layer_prefix(l) + side_name(side) + ".";
        if (tensors.layers.empty()) refuse(prefix + "analysis", "tensor is missing");
        const SideTensors& present = tensors.layers[l].side(side);
        if (present.analysis.empty()) refuse(prefix + "analysis", "tensor is missing");
        if (present.synthesis.empty()) refuse(prefix + "synthesis", "tensor is missing");
        if (present.lambda.empty()) refuse(prefix + "lambda", "tensor is missing");
        if (!plan.centre) continue;
        if (present.mean.empty()) refuse(prefix + "mean", "tensor is missing");
        if (side == Side::kKey && plan.model.rotary_dim > 0 && tensors.layers[l].inv_freq.empty()) {
          refuse(layer_prefix(l) + "inv_freq", "tensor is missing");
        }
      }
    }
  }

  std::string file_;
};

/// Shapes are checked while collecting; the writer itself refuses data that does not fill its
/// shape.
void require_shape(const std::string& name, const Shape& found, const Shape& expected) {
  if (found != expected)
    throw InternalError("plan tensor " + name + " has another shape than its plan");
}

}  // namespace

SafetensorsWriter collect_plan_tensors(const PlanBundle& bundle) {
  const Plan& plan = bundle.plan;
  const PlanTensors& tensors = bundle.tensors;
  if (!tensors.layers.empty() && tensors.layers.size() != plan.layers.size()) {
    throw InternalError("plan of " + std::to_string(plan.layers.size()) +
                        " layers has tensors of " + std::to_string(tensors.layers.size()));
  }
  SafetensorsWriter writer;
  for (std::size_t l = 0; l < tensors.layers.size(); ++l) {
    const LayerTensors& layer = tensors.layers[l];
    for (const Side side : kSides) {
      for_each_tensor(layer.side(side), side, l, plan.model,
                      [&](const std::string& name, const Array<float>& array, const Shape& shape) {
                        if (array.empty()) return;
                        require_shape(name, array.shape, shape);
                        writer.add_view(name, array);
                      });
    }
    if (layer.inv_freq.empty()) continue;
    Array<double> inv_freq;
    inv_freq.shape = {static_cast<std::int64_t>(layer.inv_freq.size())};
    inv_freq.data = layer.inv_freq;
    const std::string name = layer_prefix(l) + "inv_freq";
    require_shape(name, inv_freq.shape, {plan.model.rotary_dim / 2});
    writer.add(name, std::move(inv_freq));
  }
  for (const auto& [width, levels] : tensors.levels) {
    Array<float> array;
    array.shape = {static_cast<std::int64_t>(levels.size())};
    array.data = levels;
    writer.add(levels_name(width), std::move(array));
  }
  for (const auto& [width, values] : tensors.trellis)
    writer.add(trellis_name(width), to_half(values));
  try {
    ContentCheck("plan.safetensors").check(plan, tensors);
  } catch (const InputError& error) {
    throw InternalError(std::string("plan not written: ") + error.what());
  }
  return writer;
}

PlanTensors read_plan_tensors(const Plan& plan, const std::filesystem::path& file,
                              const std::string& expected_sha256) {
  const SafetensorsFile container(file);
  const std::string found_sha256 = sha256(container.file().bytes());
  if (found_sha256 != expected_sha256) {
    throw InputError(file.string(), "",
                     "SHA-256 differs from the one in plan.json: expected " + expected_sha256 +
                         ", found " + found_sha256 +
                         "; the two files do not belong together or one is damaged");
  }
  PlanTensors tensors;
  std::set<std::string> known;
  const auto& entries = container.entries();
  const auto first_layer_tensor = entries.lower_bound("layers.");
  if (first_layer_tensor != entries.end() && first_layer_tensor->first.starts_with("layers.")) {
    tensors.layers.resize(plan.layers.size());
  }
  for (std::size_t l = 0; l < tensors.layers.size(); ++l) {
    LayerTensors& layer = tensors.layers[l];
    for (const Side side : kSides) {
      for_each_tensor(layer.side(side), side, l, plan.model,
                      [&](const std::string& name, Array<float>& array, const Shape& shape) {
                        known.insert(name);
                        if (container.has(name)) array = container.f32(name, shape);
                      });
    }
    const std::string name = layer_prefix(l) + "inv_freq";
    known.insert(name);
    if (container.has(name))
      layer.inv_freq = container.f64(name, Shape{plan.model.rotary_dim / 2}).data;
  }
  for (int width = 1; width <= kMaxLevelBits; ++width) {
    const std::string name = levels_name(width);
    known.insert(name);
    if (container.has(name))
      tensors.levels[width] = container.f32(name, Shape{std::int64_t{1} << width}).data;
  }
  for (int width = 1; width <= kMaxTrellisBits; ++width) {
    const std::string name = trellis_name(width);
    known.insert(name);
    if (container.has(name))
      tensors.trellis[width] = from_half(container.f16(name, Shape{kTrellisStates}).data);
  }
  for (const auto& [name, entry] : entries) {
    if (!known.contains(name)) throw InputError(file.string(), name, "unknown tensor");
  }
  ContentCheck(file.string()).check(plan, tensors);
  return tensors;
}

}  // namespace kvplan
