#include "exporters/losses.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <set>
#include <tuple>

#include "exporters/stack_tables.h"

namespace kvplan::exporters {
namespace {

constexpr double kTolerance = 1e-9;  // of mean widths

std::string decimal(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, 2).ptr;
  std::string out(text, end);
  out.erase(out.find_last_not_of('0') + 1);
  if (out.ends_with('.')) out.pop_back();
  return out;
}

std::string widths_text(double k, double v) { return "K" + decimal(k) + "V" + decimal(v); }

class Reporter {
 public:
  Reporter(const PlanBundle& bundle, const ProjectionOptions& options, Projection& projection)
      : plan_(bundle.plan),
        tensors_(bundle.tensors),
        options_(options),
        p_(projection),
        report_(projection.report) {}

  void run() {
    report_.target = p_.stack.name;
    report_.dialect = p_.stack.dialect;
    report_.target_version = p_.stack.version;
    report_.plan_bits = plan_.effective_bits;
    report_.export_bits = 8.0 * static_cast<double>(report_.bytes_per_token) /
                          static_cast<double>(p_.shape.elements());
    predict();
    bits();
    heads_and_groups();
    centre();
    rotation();
    codec();
    scales();
    if (plan_.sink_tokens > 0)
      lose("SINKS", {}, std::to_string(plan_.sink_tokens) + " tokens at 16 bits", "none");
    window();
    notes();
  }

 private:
  void lose(const char* code, std::vector<int> layers, std::string plan, std::string exported) {
    report_.items.push_back(
        {code, LossClass::kLost, std::move(layers), std::move(plan), std::move(exported)});
  }

  const SidePlan& side_of(int layer, Side side) const {
    return plan_.layers[static_cast<std::size_t>(layer)].side(side);
  }

  /// Layers with a side, quantised by plan and export, of which `holds` is true; and those sides.
  struct Affected {
    std::vector<int> layers;
    std::set<Side> sides;
    std::string sides_text() const {
      std::string text;
      for (const Side side : sides) text += side == Side::kKey ? "K" : "V";
      return text;
    }
  };
  Affected affected(const std::function<bool(int, Side)>& holds) const {
    Affected out;
    for (int l = 0; l < p_.shape.num_layers(); ++l) {
      if (!p_.cached(l)) continue;
      for (const Side side : kSides) {
        if (side_of(l, side).bits == kFp16Width || p_.format(l, side).plain() || !holds(l, side))
          continue;
        out.sides.insert(side);
        if (out.layers.empty() || out.layers.back() != l) out.layers.push_back(l);
      }
    }
    if (std::ssize(out.layers) == p_.shape.num_layers()) out.layers.clear();
    return out;
  }
  void lose_where(const char* code, const std::function<bool(int, Side)>& holds,
                  const std::string& exported) {
    const Affected found = affected(holds);
    if (!found.sides.empty()) lose(code, found.layers, found.sides_text(), exported);
  }

  void predict() {
    if (!plan_.origin && plan_.predicted_kl > 0) report_.plan_predicted_kl = plan_.predicted_kl;
    double total = 0;
    for (int l = 0; l < p_.shape.num_layers(); ++l) {
      if (!p_.cached(l)) continue;
      const LayerPlan& layer = plan_.layers[static_cast<std::size_t>(l)];
      if (!layer.rotated_cost_k || !layer.rotated_cost_v) return;
      total += *layer.rotated_cost_k * relative_error(l, Side::kKey) +
               *layer.rotated_cost_v * relative_error(l, Side::kValue);
    }
    report_.export_predicted_kl = total;
  }

  double relative_error(int layer, Side side) const {
    if (p_.heads.empty()) return p_.format(layer, side).relative_error;
    const auto& own = p_.heads[static_cast<std::size_t>(layer)][static_cast<std::size_t>(side)];
    double total = 0;
    for (const int head : own)
      total += p_.stack.formats[static_cast<std::size_t>(head)].relative_error;
    return total / static_cast<double>(own.size());
  }

  /// One item for each (class, plan, export), in the order of their first layers.
  void bits() {
    std::vector<LossItem> items;
    for (int l = 0; l < p_.shape.num_layers(); ++l) {
      if (!p_.cached(l)) continue;
      const double k = side_of(l, Side::kKey).bits, v = side_of(l, Side::kValue).bits;
      const double own_k = p_.width(l, Side::kKey), own_v = p_.width(l, Side::kValue);
      const bool forced = std::ranges::find(p_.forced16, l) != p_.forced16.end();
      LossClass loss = LossClass::kNote;
      if (own_k > k + kTolerance || own_v > v + kTolerance)
        loss = forced ? LossClass::kForced : LossClass::kRaised;
      if (own_k < k - kTolerance || own_v < v - kTolerance) loss = LossClass::kLowered;
      if (loss == LossClass::kNote) continue;
      const LossItem item{.code = loss == LossClass::kForced ? "FORCED16" : "BITS",
                          .loss = loss,
                          .plan = widths_text(k, v),
                          .exported = widths_text(own_k, own_v)};
      auto same = std::ranges::find_if(items, [&](const LossItem& other) {
        return other.loss == item.loss && other.plan == item.plan &&
               other.exported == item.exported;
      });
      if (same == items.end()) same = items.insert(items.end(), item);
      same->layers.push_back(l);
    }
    for (LossItem& item : items) report_.items.push_back(std::move(item));
  }

  static double head_bits(const HeadPlan& head) {
    double total = 0;
    for (const int width : head.widths) total += width;
    return total / static_cast<double>(head.widths.size());
  }

  void heads_and_groups() {
    if (!options_.head_widths)
      lose_where(
          "HEADS",
          [&](int l, Side side) {
            const auto& heads = side_of(l, side).heads;
            return std::ranges::any_of(heads, [&](const HeadPlan& head) {
              return std::abs(head_bits(head) - head_bits(heads.front())) > kTolerance;
            });
          },
          "one width for all heads");
    lose_where(
        "GROUPS",
        [&](int l, Side side) {
          return std::ranges::any_of(side_of(l, side).heads, [](const HeadPlan& head) {
            return head.widths.front() != head.widths.back();
          });
        },
        "one width for all channels");
    lose_where(
        "OUTLIERS",
        [&](int l, Side side) {
          return std::ranges::any_of(side_of(l, side).heads,
                                     [](const HeadPlan& head) { return !head.outliers.empty(); });
        },
        "none");
  }

  void centre() {
    if (!plan_.centre) return;
    lose_where(
        "CENTRE", [&](int, Side side) { return side == Side::kValue || !options_.mean_centre; },
        options_.mean_centre ? "K" : "none");
  }

  /// Only an unsigned Hadamard matrix over the whole head can be the stack's own.
  void rotation() {
    const std::string sides = rotated_sides(plan_);
    if (!sides.empty() && plan_.codec != "calibrated") {
      std::set<std::string> exported;
      const Affected found = affected([&](int l, Side side) {
        // A codec of the side's own implies its transform.
        if (sides.find(side_name(side)) == std::string::npos || !side_of(l, side).codec.empty())
          return false;
        const StackRotation& own =
            p_.rotation[static_cast<std::size_t>(l)][static_cast<std::size_t>(side)];
        const int d = p_.shape.layers[static_cast<std::size_t>(l)].head_dim_of(side);
        const bool same = plan_.rotation.kind == "hadamard" && plan_.rotation.rounds == 1 &&
                          own.kind == "hadamard" && own.tile == d;
        if (!same)
          exported.insert(own.tile == 0 ? own.kind : own.kind + " " + std::to_string(own.tile));
        return !same;
      });
      std::string text;
      for (const auto& name : exported) text += (text.empty() ? "" : ", ") + name;
      if (!found.sides.empty())
        lose("ROTATION", found.layers, found.sides_text() + " " + plan_.rotation.kind, text);
    }
    if (plan_.codec == "calibrated")
      lose_where("TRANSFORM", [](int, Side) { return true; }, "none");
  }

  /// Whether the plan's codec is one of the stack's own.
  bool own_codec(int layer, Side side) const {
    const SidePlan& planned = side_of(layer, side);
    std::set<std::string> ids = {planned.codec};
    if (planned.codec.empty()) {
      const std::string width = ":" + decimal(planned.bits);
      ids = {plan_.codec, plan_.policy, plan_.codec + width};
      if (plan_.codec == "kivi") ids.insert("kvtuner" + width);
    }
    return std::ranges::any_of(p_.stack.formats, [&](const Format& format) {
      if (format.codec.empty()) return false;
      return std::ranges::any_of(ids, [&](const std::string& id) {
        return id == format.codec || id.starts_with(format.codec + "+") ||
               (!id.empty() && format.codec.starts_with(id + "+"));
      });
    });
  }
  void codec() {
    std::set<std::string> names;
    const Affected found = affected([&](int l, Side side) {
      if (own_codec(l, side)) return false;
      const std::string& name = p_.format(l, side).name;
      names.insert(name.substr(0, name.find(" (V)")));
      return true;
    });
    if (found.sides.empty()) return;
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    lose("CODEC", found.layers, plan_.codec, text);
  }

  bool has_static_scales() const {
    const auto scaled = [](const std::string& codec) {
      return codec.starts_with("fp8") || codec.starts_with("nvfp4");
    };
    if (tensors_.layers.empty() || tensors_.layers.front().k.absmax.empty()) return false;
    return scaled(plan_.codec) || std::ranges::any_of(plan_.layers, [&](const LayerPlan& layer) {
             return scaled(layer.k.codec) || scaled(layer.v.codec);
           });
  }
  void scales() {
    const bool unit = (p_.stack.name == "vllm" || p_.stack.name == "lmdeploy") &&
                      (p_.setting == "fp8" || p_.setting == "nvfp4");
    const bool per_layer = p_.stack.name == "sglang";
    if (!unit && !per_layer) return;
    const std::string exported = unit ? "scale 1.0; target kv-scales writes static ones"
                                      : "one scale per layer, the larger of K and V";
    if (has_static_scales())
      lose("SCALES", {}, "static scales per head", exported);
    else
      report_.note("SCALES", exported);
  }

  void window() {
    if (p_.stack.name == "hf") {
      report_.note("WINDOW", "the 16-bit tail varies between 0 and WINDOW tokens");
      return;
    }
    const bool kept = p_.stack.name == "kvtuner" && plan_.window == kKiviWindow &&
                      (plan_.codec == "kivi" || plan_.policy == "import:kvtuner");
    if (plan_.window > 0 && !kept)
      lose("WINDOW", {}, std::to_string(plan_.window) + " tokens at 16 bits", "none");
  }

  void notes() {
    const auto plain = [&](int l) {
      return p_.cached(l) && p_.format(l, Side::kKey).plain() && p_.format(l, Side::kValue).plain();
    };
    if (p_.stack.name == "vllm") {
      std::vector<int> sliding, skipped;
      for (int l = 0; l < p_.shape.num_layers(); ++l) {
        if (!p_.cached(l) || !plain(l)) continue;
        skipped.push_back(l);
        if (p_.shape.layers[static_cast<std::size_t>(l)].kind == "sliding") sliding.push_back(l);
      }
      if (!sliding.empty() && p_.setting.starts_with("turboquant"))
        report_.note("UNVERIFIED", "TurboQuant beside sliding layers at 16 bits", sliding);
      if (p_.setting.starts_with("turboquant") &&
          p_.stack.formats[static_cast<std::size_t>(p_.stack.format_index(p_.setting))].width == 3)
        report_.note("BITS", "3-bit keys: users report 20 points less on hard reasoning");
      if (!skipped.empty())
        report_.note("ESTIMATE", "bytes per token: pages of mixed sizes are padded", skipped);
    }
    if (p_.stack.name == "kv-scales" || p_.stack.name == "sglang")
      report_.note("UNVERIFIED", "compressed-tensors accepts the block, no server loaded it");
    if (p_.stack.name == "modelopt")
      report_.note("UNVERIFIED", "no released stack reads kv_cache_quantized_layers");
    if (p_.stack.dialect == "buun")
      report_.note("UNVERIFIED", "-ctk and -ctv name the type of the default tier");
    if (p_.stack.name == "hf")
      report_.note("ESTIMATE", "bytes per token: of packed codes, the builder holds a byte each");
    if (report_.export_predicted_kl)
      report_.note("ESTIMATE", "predicted KL: relative error of the format on Gaussian vectors");
  }

  const Plan& plan_;
  const PlanTensors& tensors_;
  const ProjectionOptions& options_;
  Projection& p_;
  LossReport& report_;
};

}  // namespace

void report_losses(const PlanBundle& bundle, const ProjectionOptions& options,
                   Projection& projection) {
  Reporter(bundle, options, projection).run();
}

}  // namespace kvplan::exporters
