// transformers: a Python module that builds the cache.

#include <algorithm>

#include "exporters/stack_tables.h"
#include "exporters/writers.h"

namespace kvplan::exporters {
namespace {

constexpr const char* kHead = R"(# The cache of a kvplan plan for transformers )";
constexpr const char* kTraps = R"(.
#   model.generate(..., past_key_values=kv_plan_cache.build())
# For quality, not for memory: codes are held in a byte each. Before you measure with it:
# - The first update returns its states unquantised, so one-shot perplexity shows no loss: feed the
#   text in chunks.
# - Every flush quantises again what was quantised before.
# - The tail at 16 bits varies between 0 and WINDOW tokens.
)";
constexpr const char* kLayer = R"(

class PlanLayer(QuantizedLayer):
    def __init__(self, k, v):
        super().__init__(axis_key="k", axis_value="v", residual_length=WINDOW)
        self.bits = {"k": k, "v": v}

    def _quantize(self, t, axis):
        n = self.bits[axis]
        if n >= 16:
            return t, None, None
        x = t.float().unflatten(-1, (-1, GROUP))
        lo, hi = x.amin(-1, True), x.amax(-1, True)
        step = ((hi - lo) / (2**n - 1)).clamp_min(1e-8)
        return ((x - lo) / step).round().to(torch.uint8), step, lo

    def _dequantize(self, q):
        return q[0] if q[1] is None else (q[0] * q[1] + q[2]).flatten(-2).to(self.dtype)

)";

}  // namespace

std::vector<ExportFile> write_hf(const PlanBundle& bundle, const ExportOptions&,
                                 Projection& projection) {
  std::string plan, sliding;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    const LayerShape& layer = projection.shape.layers[static_cast<std::size_t>(l)];
    const auto width = [&](Side side) { return std::to_string(projection.format(l, side).width); };
    plan += (plan.empty() ? "(" : ", (") + width(Side::kKey) + ", " + width(Side::kValue) + ")";
    if (layer.kind == "sliding")
      sliding +=
          (sliding.empty() ? "" : ", ") + std::to_string(l) + ": " + std::to_string(layer.window);
  }
  const int window = std::max(bundle.plan.window, bundle.plan.page_tokens);
  std::string text = kHead + projection.report.target_version + kTraps;
  text += "import torch\nfrom transformers.cache_utils import Cache, DynamicLayer, ";
  if (!sliding.empty()) text += "DynamicSlidingWindowLayer, ";
  text += "QuantizedLayer\n\nPLAN = [" + plan + "]  # (K, V) bits per decoder layer\n";
  if (!sliding.empty()) text += "SLIDING = {" + sliding + "}  # layer: tokens\n";
  text += "GROUP, WINDOW = " + std::to_string(hf_group(projection.shape)) + ", " +
          std::to_string(window) + "\n";
  text += kLayer;
  text += "\ndef build():\n";
  if (sliding.empty()) {
    text +=
        "    return Cache(layers=[DynamicLayer() if min(b) >= 16 else PlanLayer(*b) for b in "
        "PLAN])\n";
  } else {
    text +=
        "    return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=SLIDING[i]) if i in "
        "SLIDING\n"
        "                         else DynamicLayer() if min(b) >= 16 else PlanLayer(*b)\n"
        "                         for i, b in enumerate(PLAN)])\n";
  }
  return {{"kv_plan_cache.py", text}};
}

}  // namespace kvplan::exporters
