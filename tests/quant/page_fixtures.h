#pragma once
// Plans of every kind that pages hold, built in memory.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "quant/codebook.h"
#include "quant/codec.h"
#include "quant/rotation.h"
#include "quant/trellis.h"
#include "tests/quant/codec_fixtures.h"

namespace kvplan::quant::testing {

using HeadWidths = std::vector<std::vector<int>>;  // [kv_heads][groups]

inline ModelSpec paged_model(int kv_heads, int head_dim) {
  ModelSpec model = small_model(kv_heads, head_dim);
  model.query_heads = 2 * kv_heads;
  return model;
}

/// A calibrated plan of two layers, the second with the sides exchanged. Each head's analysis is a
/// rotation with rows of its own scaled by 1/2 to 2; means are not 0.
inline PlanBundle calibrated_plan(int head_dim, int group_size, const HeadWidths& k,
                                  const HeadWidths& v) {
  const int kv_heads = static_cast<int>(k.size());
  const auto d = static_cast<std::size_t>(head_dim);
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = paged_model(kv_heads, head_dim);
  plan.group_size = group_size;
  for (int width = 1; width <= 8; ++width) {
    const bool uniform = width == 2 || width == 8;
    bundle.tensors.levels[width] = codebook(uniform ? "uniform" : "lloyd_max_byte", width).levels;
  }

  const std::vector<double> rotation = haar_rotation(head_dim, 3, 0, 0, 0, false);
  const auto tensors_of = [&](std::size_t shift) {
    SideTensors side;
    side.analysis = side.synthesis = Array<float>({kv_heads, head_dim, head_dim});
    side.lambda = side.mean = Array<float>({kv_heads, head_dim});
    for (std::size_t h = 0; h < k.size(); ++h)
      for (std::size_t i = 0; i < d; ++i) {
        const double scale = std::exp2(1 - 2.0 * static_cast<double>(i) / (head_dim - 1));
        const std::size_t row = (i + h + shift) % d;
        side.lambda.row(h)[i] = std::exp2(-static_cast<float>(i / 16));
        side.mean.row(h)[i] = static_cast<float>((i + h + shift) % 5) - 2;
        for (std::size_t j = 0; j < d; ++j) {
          side.analysis.row(h)[i * d + j] = static_cast<float>(scale * rotation[row * d + j]);
          side.synthesis.row(h)[j * d + i] = static_cast<float>(rotation[row * d + j] / scale);
        }
      }
    return side;
  };
  for (int l = 0; l < plan.model.num_layers; ++l) {
    LayerPlan& layer = plan.layers.emplace_back();
    layer.index = l;
    for (const auto& widths : l == 0 ? k : v) layer.k.heads.push_back({widths, {}});
    for (const auto& widths : l == 0 ? v : k) layer.v.heads.push_back({widths, {}});
    LayerTensors& tensors = bundle.tensors.layers.emplace_back();
    tensors.k = tensors_of(1);
    tensors.v = tensors_of(2);
    for (int j = 0; j < head_dim / 2; ++j)
      tensors.inv_freq.push_back(std::pow(10000.0, -2.0 * j / head_dim));
  }
  return bundle;
}

inline PlanBundle rotated_plan(const std::string& name, int head_dim,
                               const std::vector<int>& k_outliers = {},
                               const std::vector<int>& v_outliers = {}) {
  PlanBundle bundle = baseline(name, paged_model(2, head_dim));
  for (LayerPlan& layer : bundle.plan.layers) {
    layer.k.heads[1].outliers = k_outliers;
    layer.v.heads[0].outliers = v_outliers;
  }
  return bundle;
}

struct PagedPlan {
  const char* name;
  std::function<PlanBundle()> make;
};

/// Levels that are on no grid of bytes.
inline PlanBundle with_exact_levels(PlanBundle bundle) {
  for (auto& [width, levels] : bundle.tensors.levels) levels = codebook("lloyd_max", width).levels;
  return bundle;
}

/// The same plan with trellis codes where a head has enough coordinates of 1 to 4 bits.
inline PlanBundle with_trellis(PlanBundle bundle) {
  bundle.plan.code = "tcq";
  for (int width = 1; width <= kMaxTrellisWidth; ++width) {
    const auto& values = trellis_table(width).values;
    bundle.tensors.trellis[width].assign(values.begin(), values.end());
  }
  return bundle;
}

/// A plan for each thing that a page can hold.
inline std::vector<PagedPlan> paged_plans() {
  const auto with = [](PlanBundle bundle, auto change) {
    change(bundle);
    return bundle;
  };
  return {
      {"Groups16",
       [] {
         return calibrated_plan(64, 16, {{6, 4, 2, 0}, {8, 3, 1, 1}}, {{5, 2, 2, 0}, {7, 7, 0, 0}});
       }},
      {"Groups8EveryWidth",
       [] {
         return calibrated_plan(64, 8, {{8, 7, 6, 5, 4, 3, 2, 1}, {2, 2, 2, 1, 1, 1, 0, 0}},
                                {{4, 4, 4, 3, 3, 3, 3, 0}, {8, 8, 8, 8, 8, 8, 8, 8}});
       }},
      {"Groups8EveryWidthExact",
       [] {
         return with_exact_levels(
             calibrated_plan(64, 8, {{8, 7, 6, 5, 4, 3, 2, 1}, {2, 2, 2, 1, 1, 1, 0, 0}},
                             {{4, 4, 4, 3, 3, 3, 3, 0}, {8, 8, 8, 8, 8, 8, 8, 8}}));
       }},
      {"Groups8Bytes",
       [] {
         return calibrated_plan(64, 8, {{8, 8, 8, 6, 5, 4, 3, 2}, {6, 6, 6, 5, 5, 5, 0, 0}},
                                {{6, 6, 6, 5, 5, 5, 1, 1}, {8, 8, 8, 4, 3, 1, 0, 0}});
       }},
      {"HeadWithoutCodes", [] { return calibrated_plan(64, 16, {{0, 0, 0, 0}}, {{3, 3, 3, 3}}); }},
      {"Fp16Heads",
       [] {
         return calibrated_plan(64, 16, {{16, 16, 16, 16}, {4, 4, 2, 2}},
                                {{3, 3, 2, 0}, {16, 16, 16, 16}});
       }},
      {"Dim80", [] { return calibrated_plan(80, 16, {{4, 4, 3, 2, 2}}, {{6, 5, 2, 1, 0}}); }},
      {"Dim80Groups8",
       [] {
         return calibrated_plan(80, 8, {{6, 6, 6, 4, 3, 3, 2, 2, 2, 0}},
                                {{5, 4, 4, 4, 4, 1, 1, 1, 0, 0}});
       }},
      {"Dim96", [] { return calibrated_plan(96, 16, {{6, 4, 4, 2, 2, 1}}, {{3, 3, 3, 3, 2, 2}}); }},
      {"Dim128",
       [] {
         return calibrated_plan(128, 16, {{6, 5, 4, 4, 3, 2, 2, 0}}, {{4, 3, 3, 3, 2, 2, 2, 1}});
       }},
      {"Dim256",
       [] {
         return calibrated_plan(256, 16, {{8, 6, 5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 1, 1, 0}},
                                {std::vector<int>(16, 2)});
       }},
      {"NormFp16NotCentred",
       [with] {
         return with(calibrated_plan(64, 16, {{4, 3, 2, 1}}, {{2, 2, 2, 2}}), [](PlanBundle& b) {
           b.plan.norm = "fp16";
           b.plan.centre = false;
         });
       }},
      {"TrellisGroups16",
       [] {
         return with_trellis(
             calibrated_plan(64, 16, {{6, 4, 2, 0}, {3, 2, 1, 1}}, {{2, 2, 2, 2}, {7, 4, 0, 0}}));
       }},
      {"TrellisGroups8",
       [] {
         return with_trellis(calibrated_plan(64, 8,
                                             {{8, 7, 6, 5, 4, 3, 2, 1}, {2, 2, 2, 1, 1, 1, 0, 0}},
                                             {{4, 4, 4, 3, 3, 3, 3, 0}, {5, 3, 2, 2, 2, 1, 1, 0}}));
       }},
      {"TrellisDim80NormFp16",
       [with] {
         return with(with_trellis(calibrated_plan(80, 8, {{6, 6, 6, 4, 3, 3, 2, 2, 2, 0}},
                                                  {{16, 16, 16, 16, 16, 16, 16, 16, 16, 16}})),
                     [](PlanBundle& b) { b.plan.norm = "fp16"; });
       }},
      {"TrellisDim128",
       [] {
         return with_trellis(
             calibrated_plan(128, 16, {{6, 5, 4, 4, 3, 2, 2, 0}}, {{4, 3, 3, 3, 2, 2, 2, 1}}));
       }},
      {"TrellisBesideFp16AndTables",
       [] {
         return with_exact_levels(with_trellis(calibrated_plan(
             64, 16, {{16, 16, 16, 16}, {6, 3, 2, 1}}, {{4, 3, 2, 1}, {8, 7, 5, 2}})));
       }},
      {"TrellisDim256",
       [] {
         return with_trellis(calibrated_plan(256, 16,
                                             {{8, 6, 5, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 1, 1, 0}},
                                             {std::vector<int>(16, 2)}));
       }},
      {"Rotated2Haar", [] { return rotated_plan("turboquant:2", 64); }},
      {"Rotated2Uniform",
       [with] {
         return with(rotated_plan("turboquant:2", 64),
                     [](PlanBundle& b) { b.plan.codebooks[2] = "uniform"; });
       }},
      {"Rotated3Hadamard", [] { return rotated_plan("turboquant:3+rht", 128); }},
      {"Rotated4PerHead", [] { return rotated_plan("turboquant:4+heads", 80); }},
      {"Outliers8And16",
       [] {
         return rotated_plan("turboquant:3+rht", 64, {0, 5, 9, 17, 30, 31, 32, 63},
                             {1, 2, 3, 4, 8, 9, 20, 21, 22, 23, 40, 41, 50, 51, 52, 62});
       }},
      {"Outliers24Of80",
       [] {
         std::vector<int> every_third;
         for (int i = 0; i < 24; ++i) every_third.push_back(3 * i);
         return rotated_plan("turboquant:4", 80, every_third);
       }},
      {"Fp16", [] { return baseline("fp16", paged_model(2, 64)); }},
      {"Fp16HalfTile", [] { return baseline("fp16", paged_model(1, 72)); }},
  };
}

}  // namespace kvplan::quant::testing
