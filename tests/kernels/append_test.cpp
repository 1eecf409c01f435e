// Rows and packed pages of `append` against the CPU codec and page layout.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "kernels/views.h"
#include "tests/kernels/device_layer.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;
using quant::testing::calibrated_plan;
using quant::testing::PagedPlan;

// The kernel's sums in double and its cosines differ from the CPU's in the last bit, which may turn
// a code that lies on a boundary.
constexpr double kDifferingBytes = 1e-4;

struct Vectors {
  std::vector<std::uint16_t> of[2];  // k, v
};

/// Keeps what every sequence got and appends steps on the device.
class Appender {
 public:
  Appender(const PlanBundle& bundle, int layer, int sequences, int max_tokens)
      : layer_(bundle, layer, sequences, max_tokens),
        device_(layer_.contents),
        lengths_(size(sequences)),
        tokens_(size(sequences)) {}

  /// `replays`: of a graph behind one begin_step, which must not matter where a sequence gets one
  /// token.
  void step(const std::vector<int>& new_tokens, int replays = 1) {
    std::vector<int> after = lengths_;
    for (std::size_t i = 0; i < after.size(); ++i) after[i] += new_tokens[i];
    const auto batch = layer_.batch(lengths_, after);
    const auto token = size(layer_.view.kv_heads) * size(layer_.view.head_dim);
    std::vector<std::uint16_t> rows[2];
    for (std::size_t i = 0; i < after.size(); ++i)
      for (int side = 0; side < 2; ++side) {
        const auto x = random_halves(size(new_tokens[i]) * token, draw_++);
        rows[side].insert(rows[side].end(), x.begin(), x.end());
        auto& all = tokens_[i].of[side];
        all.insert(all.end(), x.begin(), x.end());
      }
    const DeviceArray<std::uint16_t> k(rows[0]), v(rows[1]);
    AppendView view{batch.view, k.data(), v.data(), layer_.view};
    device_.attach(view.layer);
    for (int i = 0; i < replays; ++i) ASSERT_EQ(append(view, nullptr), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    lengths_ = after;
  }

  void expect_contents() {
    for (std::size_t i = 0; i < lengths_.size(); ++i)
      layer_.store(layer_.slot(static_cast<int>(i)), lengths_[i], tokens_[i].of);
    const LayerContents found{device_.pool.host(), device_.sinks.host(), device_.open.host()};
    EXPECT_EQ(found.sinks, layer_.contents.sinks);
    for (std::size_t i = 0; i < lengths_.size(); ++i) expect_open_rows(found, static_cast<int>(i));
    const auto& expected = layer_.contents.pool;
    std::size_t differing = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) differing += found.pool[i] != expected[i];
    EXPECT_LE(static_cast<double>(differing),
              kDifferingBytes * static_cast<double>(expected.size()));
  }

 private:
  void expect_open_rows(const LayerContents& found, int sequence) const {
    const int slot = layer_.slot(sequence), length = lengths_[size(sequence)];
    const int sinks = layer_.view.sink_tokens;
    const int open = sinks + full_pages(length, sinks) * quant::kPageTokens;
    for (int side = 0; side < 2; ++side)
      for (int head = 0; head < layer_.view.kv_heads; ++head)
        for (int position = open; position < length; ++position)
          EXPECT_TRUE(
              std::ranges::equal(layer_.plain_row(found, slot, side, head, position),
                                 layer_.plain_row(layer_.contents, slot, side, head, position)))
              << "sequence " << sequence << " side " << side << " position " << position;
  }

  DeviceLayer layer_;
  DeviceContents device_;
  std::vector<int> lengths_;
  std::vector<Vectors> tokens_;
  std::uint32_t draw_ = 0;
};

class Append : public OnDevice {};

TEST_P(Append, PrefillAndTheStepAfterItMatchTheCodec) {
  const std::vector<int> first{1, 3, 4, 5, 63, 64, 67, 68, 127, 132};
  const std::vector<int> second{1, 1, 64, 63, 5, 4, 1, 1, 70, 136};
  Appender appender(GetParam().make(), 0, static_cast<int>(first.size()), 300);
  appender.step(first);
  appender.step(second);
  appender.expect_contents();
}

INSTANTIATE_TEST_SUITE_P(Plans, Append, ::testing::ValuesIn(quant::testing::paged_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

std::vector<PagedPlan> rotary_plans() {
  const auto with = [](auto change) {
    return [change] {
      PlanBundle b = calibrated_plan(64, 8, {{8, 6, 5, 4, 4, 3, 2, 0}}, {{4, 4, 3, 3, 2, 2, 1, 1}});
      change(b);
      return b;
    };
  };
  const auto partial = [](PlanBundle& b) {
    b.plan.model.rotary_dim = 24;
    for (LayerTensors& layer : b.tensors.layers) layer.inv_freq.resize(12);
  };
  return {{"Interleaved", with([](PlanBundle& b) { b.plan.model.rope.style = "interleaved"; })},
          {"Partial", with(partial)},
          {"PartialInterleaved", with([partial](PlanBundle& b) {
             partial(b);
             b.plan.model.rope.style = "interleaved";
           })},
          {"WithoutRotary", with([](PlanBundle& b) {
             b.plan.model.rope.style = "none";
             for (LayerTensors& layer : b.tensors.layers) layer.inv_freq.clear();
           })},
          {"WithoutSinks", with([](PlanBundle& b) { b.plan.sink_tokens = 0; })},
          {"ScaleOne", with([](PlanBundle& b) { b.plan.scale_rule = "one"; })},
          {"ScaleNormCorrected", with([](PlanBundle& b) { b.plan.scale_rule = "norm_corrected"; })},
          {"ScaleBiased", with([](PlanBundle& b) { b.plan.scale_rule = "biased"; })}};
}

class AppendOptions : public OnDevice {};

TEST_P(AppendOptions, MatchTheCodec) {
  Appender appender(GetParam().make(), 0, 2, 300);
  appender.step({70, 196});
  appender.expect_contents();
}

INSTANTIATE_TEST_SUITE_P(Plans, AppendOptions, ::testing::ValuesIn(rotary_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

/// Full and half tiles of one width on both sides, with levels that are bytes and others.
std::vector<PagedPlan> width_plans() {
  static constexpr const char* kNames[][2] = {{"Width1", "Width1Exact"}, {"Width2", "Width2Exact"},
                                              {"Width3", "Width3Exact"}, {"Width4", "Width4Exact"},
                                              {"Width5", "Width5Exact"}, {"Width6", "Width6Exact"},
                                              {"Width7", "Width7Exact"}, {"Width8", "Width8Exact"}};
  std::vector<PagedPlan> plans;
  for (int width = 1; width <= 8; ++width) {
    const auto make = [width] {
      const int w = width;
      return calibrated_plan(64, 8, {{w, w, w, w, w, 0, 0, 0}}, {{w, w, w, 0, 0, 0, 0, 0}});
    };
    plans.push_back({kNames[width - 1][0], make});
    plans.push_back(
        {kNames[width - 1][1], [make] { return quant::testing::with_exact_levels(make()); }});
  }
  return plans;
}

INSTANTIATE_TEST_SUITE_P(Widths, AppendOptions, ::testing::ValuesIn(width_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

/// A rotated plan that centres.
PlanBundle centred(PlanBundle bundle) {
  bundle.plan.centre = true;
  for (LayerTensors& layer : bundle.tensors.layers)
    for (SideTensors* const side : {&layer.k, &layer.v}) {
      const ModelSpec& model = bundle.plan.model;
      side->mean = Array<float>({model.kv_heads, model.head_dim});
      for (std::size_t i = 0; i < side->mean.data.size(); ++i)
        side->mean.data[i] = 0.25f * static_cast<float>(i % 7) - 0.6f;
    }
  return bundle;
}

/// Matrices of one magnitude, products of 128 coordinates and more, and what stands beside them.
std::vector<PagedPlan> matrix_plans() {
  using quant::testing::rotated_plan;
  std::vector<int> halves;
  for (int i = 0; i < 128; ++i) halves.push_back(2 * i);
  const std::vector<int> eights(16, 8);
  return {{"HadamardCentred", [] { return centred(rotated_plan("turboquant:4+rht", 128)); }},
          {"HadamardCentredPartial",
           [] {
             PlanBundle b = centred(rotated_plan("turboquant:3+rht", 64));
             b.plan.model.rotary_dim = 24;
             for (LayerTensors& layer : b.tensors.layers) layer.inv_freq.resize(12);
             return b;
           }},
          {"HadamardBesideOutliers",
           [halves] { return centred(rotated_plan("turboquant:2+rht", 256, halves)); }},
          {"Dim72",
           [] {
             return calibrated_plan(72, 8, {{5, 5, 4, 3, 3, 3, 2, 1, 1}},
                                    {{2, 2, 2, 2, 2, 2, 2, 2, 2}});
           }},
          {"EightBits256", [eights] { return calibrated_plan(256, 16, {eights}, {eights}); }},
          {"NormFp16", [] {
             PlanBundle b =
                 calibrated_plan(128, 16, {{6, 5, 4, 4, 3, 3, 2, 2}}, {{4, 4, 4, 4, 4, 4, 4, 4}});
             b.plan.norm = "fp16";
             return b;
           }}};
}

INSTANTIATE_TEST_SUITE_P(Matrices, AppendOptions, ::testing::ValuesIn(matrix_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

class AppendBatch : public OnDevice {};

TEST_P(AppendBatch, BlocksThatTakeSeveralHeads) {
  constexpr int kSequences = 180;  // times 3 heads and 2 sides
  std::vector<int> first(kSequences, 1), second(kSequences, 1);
  first[3] = 67, first[100] = 3, first[179] = 60;
  second[100] = 64, second[179] = 135;
  Appender appender(GetParam().make(), 0, kSequences, 200);
  appender.step(first);
  appender.step(second);
  appender.expect_contents();
}

INSTANTIATE_TEST_SUITE_P(Plans, AppendBatch,
                         ::testing::Values(PagedPlan{
                             "ThreeHeads",
                             [] {
                               return calibrated_plan(
                                   64, 16, {{4, 3, 2, 1}, {2, 2, 2, 2}, {16, 16, 16, 16}},
                                   {{3, 3, 3, 3}, {8, 6, 5, 0}, {0, 0, 0, 0}});
                             }}),
                         [](const auto& row) { return std::string(row.param.name); });

class AppendSteps : public OnDevice {};

TEST_P(AppendSteps, OneTokenAtATime) {
  Appender appender(GetParam().make(), 1, 2, 200);
  appender.step({1, 60});
  for (int i = 1; i < 134; ++i) appender.step({1, 1}, 2);
  appender.expect_contents();
}

INSTANTIATE_TEST_SUITE_P(Plans, AppendSteps,
                         ::testing::Values(PagedPlan{"Mixed",
                                                     [] {
                                                       return calibrated_plan(
                                                           64, 8, {{8, 7, 6, 5, 4, 3, 2, 1}},
                                                           {{2, 2, 2, 1, 1, 1, 0, 0}});
                                                     }}),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace kvplan::kernels
