// The CUDA runtime against the CPU reference, end to end. Compiled twice: for the GPU, where it
// skips aloud without one, and for the emulated device.

#include "kernels/runtime.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "kernels/cuda_cache.h"
#include "kernels/views.h"
#include "quant/codebook.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "schemas/error.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::quant::testing;
using quant::AttentionOptions;
using quant::CacheGeometry;
using quant::SequenceStep;

constexpr double kOutputTolerance = 2e-3;  // of the norm of a query head's output
constexpr double kLogSumTolerance = 2e-3;

bool device_is_missing() {
  kvplan_device_info info;
  return kvplan_query_device(0, &info) != KVPLAN_OK;
}

CacheGeometry geometry_of(const PlanBundle& bundle, int queries_per_kv = 2, int sequences = 4,
                          std::int64_t max_tokens = 300) {
  CacheGeometry geometry;
  geometry.query_heads = queries_per_kv * bundle.plan.model.kv_heads;
  geometry.max_sequences = sequences;
  geometry.max_tokens = max_tokens;
  return geometry;
}

/// The same random steps for the runtime and the reference.
class Both {
 public:
  Both(const PlanBundle& bundle, const CacheGeometry& geometry)
      : cuda_(make_cuda_cache(bundle, geometry)),
        reference_(quant::make_reference_cache(bundle, geometry)),
        layers_(static_cast<int>(bundle.plan.layers.size())),
        kv_row_(static_cast<std::size_t>(bundle.plan.model.kv_heads * bundle.plan.model.head_dim)),
        head_dim_(static_cast<std::size_t>(bundle.plan.model.head_dim)),
        query_heads_(static_cast<std::size_t>(geometry.query_heads)) {}

  quant::KvCache& cuda() { return *cuda_; }
  const std::vector<float>& outputs() const { return outputs_; }

  /// A step of every layer; `attention` none: only appended.
  void step(const std::vector<SequenceStep>& parts,
            const std::vector<AttentionOptions>& attention = {{}}) {
    std::size_t rows = 0;
    for (const SequenceStep& part : parts) rows += static_cast<std::size_t>(part.tokens);
    cuda_->begin_step(parts);
    reference_->begin_step(parts);
    for (int layer = 0; layer < layers_; ++layer) {
      const auto k = vectors(rows * kv_row_), v = vectors(rows * kv_row_);
      cuda_->append(layer, k, v);
      reference_->append(layer, k, v);
      for (const AttentionOptions& options : attention) attend(layer, rows, options);
    }
  }
  /// Fills a slot in one step without attention.
  void fill(int slot, int tokens) { step({{slot, tokens}}, {}); }
  void fork(int from, int to) {
    cuda_->fork(from, to);
    reference_->fork(from, to);
  }
  void release(int slot) {
    cuda_->release(slot);
    reference_->release(slot);
  }
  void expect_equal_vectors(int slot) {
    const std::int64_t length = reference_->length(slot);
    ASSERT_EQ(cuda_->length(slot), length);
    ASSERT_EQ(cuda_->free_blocks(), reference_->free_blocks());
    std::vector<float> found(static_cast<std::size_t>(length) * kv_row_), expected(found.size());
    for (int layer = 0; layer < layers_; ++layer)
      for (const Side side : kSides) {
        cuda_->read_back(layer, side, slot, 0, length, found);
        reference_->read_back(layer, side, slot, 0, length, expected);
        SCOPED_TRACE(::testing::Message()
                     << "slot " << slot << " layer " << layer << " " << side_name(side));
        for (std::size_t t = 0; t < static_cast<std::size_t>(length); ++t)
          ASSERT_LT(relative_distance(std::span(found).subspan(t * kv_row_, kv_row_),
                                      std::span(expected).subspan(t * kv_row_, kv_row_)),
                    kReadBackTolerance)
              << "position " << t;
      }
  }

 private:
  static constexpr double kReadBackTolerance = 1e-5;  // sums in another order

  std::vector<std::uint16_t> vectors(std::size_t count) {
    std::vector<std::uint16_t> bits(count);
    for (std::uint16_t& x : bits) x = quant::to_half(static_cast<float>(random_.next_normal()));
    return bits;
  }
  static double relative_distance(std::span<const float> found, std::span<const float> expected) {
    double error = 0, energy = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      error += std::pow(double{found[i]} - expected[i], 2);
      energy += std::pow(double{expected[i]}, 2);
    }
    return std::isfinite(error) ? std::sqrt(error / std::max(energy, 1e-12)) : 1e30;
  }

  void attend(int layer, std::size_t rows, const AttentionOptions& options) {
    const auto q = vectors(rows * query_heads_ * head_dim_);
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> found(q.size(), kNan), expected(q.size());
    std::vector<float> found_lse(rows * query_heads_, kNan), expected_lse(found_lse.size());
    SCOPED_TRACE(::testing::Message() << "layer " << layer << " window " << options.window
                                      << " cap " << options.soft_cap << " scale " << options.scale);
    cuda_->attend(layer, q, options, found, found_lse);
    reference_->attend(layer, q, options, expected, expected_lse);
    for (std::size_t i = 0; i < found_lse.size(); ++i) {
      ASSERT_NEAR(found_lse[i], expected_lse[i], kLogSumTolerance)
          << "row " << i / query_heads_ << " head " << i % query_heads_;
      ASSERT_LT(relative_distance(std::span(found).subspan(i * head_dim_, head_dim_),
                                  std::span(expected).subspan(i * head_dim_, head_dim_)),
                kOutputTolerance)
          << "row " << i / query_heads_ << " head " << i % query_heads_;
    }
    outputs_.insert(outputs_.end(), found.begin(), found.end());
    outputs_.insert(outputs_.end(), found_lse.begin(), found_lse.end());
  }

  std::unique_ptr<quant::KvCache> cuda_, reference_;
  int layers_;
  std::size_t kv_row_, head_dim_, query_heads_;
  quant::RandomStream random_{7, quant::StreamPurpose::kTest};
  std::vector<float> outputs_;  // of all attend() calls
};

PlanBundle mixed_plan() {
  return calibrated_plan(64, 8, {{8, 6, 4, 3, 2, 2, 1, 0}, {2, 2, 2, 2, 2, 2, 0, 0}},
                         {{3, 3, 3, 3, 2, 2, 1, 1}, {16, 16, 16, 16, 16, 16, 16, 16}});
}

class Runtime : public ::testing::Test {
 protected:
  void SetUp() override {
    if (device_is_missing()) GTEST_SKIP() << kvplan_last_error();
  }
};

// Every kind of plan: sinks, a page boundary, a ragged batch.
class RuntimePlans : public ::testing::TestWithParam<PagedPlan> {
 protected:
  void SetUp() override {
    if (device_is_missing()) GTEST_SKIP() << kvplan_last_error();
  }
};

TEST_P(RuntimePlans, AttendsAndReadsBackAsTheReference) {
  const PlanBundle bundle = GetParam().make();
  Both both(bundle, geometry_of(bundle));
  both.step({{0, 131}, {2, 3}, {3, 67}}, {});
  both.step({{3, 1}, {0, 2}, {2, 1}});
  both.step({{0, 4}, {1, 1}, {3, 2}});
  for (const int slot : {0, 1, 2, 3}) both.expect_equal_vectors(slot);
}

INSTANTIATE_TEST_SUITE_P(Plans, RuntimePlans, ::testing::ValuesIn(paged_plans()),
                         [](const auto& info) { return std::string(info.param.name); });

// Layers that have a decode kernel of their own: many pages for a warp, masks, a forced rescale.
class UniformRuntime : public ::testing::TestWithParam<UniformWidths> {
 protected:
  void SetUp() override {
    if (device_is_missing()) GTEST_SKIP() << kvplan_last_error();
  }
};

PlanBundle uniform_plan(const UniformWidths& widths) {
  const std::string keys = std::to_string(widths.keys), values = std::to_string(widths.values);
  PlanBundle bundle = rotated_plan(
      "turboquant:" + (keys == values ? keys : keys + "/" + values) + "+hadamard+nc+gauss",
      quant::kTileCoordinates * widths.tiles);
  for (auto& [width, name] : bundle.plan.codebooks) {
    name = width == 2 || width == 8 ? "uniform" : "lloyd_max_byte";
    bundle.tensors.levels[width] = quant::codebook(name, width).levels;
  }
  return bundle;
}

TEST_P(UniformRuntime, AttendsAsTheReference) {
  const PlanBundle bundle = uniform_plan(GetParam());
  CacheGeometry geometry = geometry_of(bundle, 2, 2, 1100);
  geometry.max_query_tokens = 2;
  const DecodeShape shape = decode_shape(quant::page_format(bundle).front(),
                                         bundle.plan.model.head_dim, 0, false, kColumns / 2, 1);
  ASSERT_GE(shape.uniform, 0);
  EXPECT_EQ(kUniformWidths[shape.uniform], GetParam());
  Both both(bundle, geometry);
  both.step({{0, 1030}, {1, 133}}, {});
  const AttentionOptions all, window{.window = 300}, capped{.soft_cap = 3},
      sharp{.scale = 0.3F};  // scores that outgrow the running maximum
  both.step({{0, 2}, {1, 1}}, {all, window, capped, sharp});
  both.step({{1, 2}}, {all});
}

INSTANTIATE_TEST_SUITE_P(Widths, UniformRuntime, ::testing::ValuesIn(kUniformWidths),
                         [](const auto& info) {
                           const UniformWidths& w = info.param;
                           return "K" + std::to_string(w.keys) + "V" + std::to_string(w.values) +
                                  "Tiles" + std::to_string(w.tiles);
                         });

// Layers of bytes of several widths, with a decode path of their own too.
struct MixedCase {
  const char* name;
  std::function<PlanBundle()> make;
  int queries_per_kv = 2, query_tokens = 2;
};

class MixedRuntime : public ::testing::TestWithParam<MixedCase> {
 protected:
  void SetUp() override {
    if (device_is_missing()) GTEST_SKIP() << kvplan_last_error();
  }
};

/// Key means so large that the rotary tile is split.
PlanBundle with_large_means(PlanBundle bundle) {
  for (LayerTensors& layer : bundle.tensors.layers)
    for (float& x : layer.k.mean.data) x *= 6;
  return bundle;
}

PlanBundle with_norms_not_centred(PlanBundle bundle, const std::string& norm) {
  bundle.plan.norm = norm;
  bundle.plan.centre = false;
  return bundle;
}

std::vector<MixedCase> mixed_cases() {
  const auto groups16 = [] {
    return calibrated_plan(128, 16, {{6, 5, 5, 5, 4, 4, 4, 3}, {8, 3, 3, 2, 2, 2, 1, 0}},
                           {{8, 8, 8, 6, 6, 1, 1, 1}, {5, 5, 4, 2, 2, 1, 1, 0}});
  };
  // Half tiles of every width: alone, behind one tile, behind two and three.
  const auto groups8 = [] {
    return calibrated_plan(128, 8,
                           {{8, 8, 8, 6, 6, 6, 5, 5, 5, 4, 4, 4, 3, 2, 1, 0},
                            {6, 5, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2, 1}},
                           {{8, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0},
                            {3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1}});
  };
  return {
      {"Groups16", groups16},
      {"Groups16OneColumn", groups16, 1, 1},
      {"Groups16ThreeColumns", groups16, 3, 1},
      {"Groups8", groups8},
      {"Groups8FourColumns", groups8, 4, 1},
      {"SplitTile", [=] { return with_large_means(groups16()); }},
      {"NormFp16NotCentred", [=] { return with_norms_not_centred(groups16(), "fp16"); }},
      {"NormLog8NotCentred", [=] { return with_norms_not_centred(groups8(), "log8"); }},
      {"NormFp16",
       [=] {
         PlanBundle bundle = groups8();
         bundle.plan.norm = "fp16";
         return bundle;
       }},
      {"HeadWithoutCodes",
       [] {
         return calibrated_plan(64, 16, {{0, 0, 0, 0}, {4, 3, 0, 0}}, {{3, 3, 2, 1}, {0, 0, 0, 0}});
       }},
      {"Dim80",
       [] {
         return calibrated_plan(80, 8, {{6, 6, 6, 4, 3, 3, 2, 2, 2, 0}},
                                {{5, 4, 4, 4, 4, 1, 1, 1, 0, 0}});
       }},
  };
}

TEST_P(MixedRuntime, AttendsAsTheReference) {
  const MixedCase& what = GetParam();
  const PlanBundle bundle = what.make();
  CacheGeometry geometry = geometry_of(bundle, what.queries_per_kv, 2, 2300);
  geometry.max_query_tokens = what.query_tokens;
  const quant::LayerFormat format = quant::page_format(bundle).front();
  const DecodeShape shape =
      decode_shape(format, bundle.plan.model.head_dim, quant::phase_steps(format), false,
                   what.queries_per_kv * what.query_tokens, 1);
  ASSERT_TRUE(shape.mixed);
  Both both(bundle, geometry);
  both.step({{0, 2200}, {1, 133}}, {});
  const AttentionOptions all, window{.window = 300}, capped{.soft_cap = 3},
      sharp{.scale = 0.15F};  // scores that outgrow the running maximum
  both.step({{0, what.query_tokens}, {1, 1}}, {all, window, capped, sharp});
  both.step({{1, what.query_tokens}}, {all});
}

INSTANTIATE_TEST_SUITE_P(Plans, MixedRuntime, ::testing::ValuesIn(mixed_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(Runtime, AttendsAtEveryLengthAroundSinksAndPages) {
  const PlanBundle bundle = mixed_plan();
  const std::vector<int> lengths = {0, 1, 2, 3, 4, 62, 63, 64, 65, 66, 67, 68, 126, 131, 132, 200};
  CacheGeometry geometry = geometry_of(bundle, 3, static_cast<int>(lengths.size()));
  Both both(bundle, geometry);
  std::vector<SequenceStep> fill, one, several;
  for (int slot = 0; slot < geometry.max_sequences; ++slot) {
    const int length = lengths[static_cast<std::size_t>(slot)];
    if (length > 0) fill.push_back({slot, length});
    one.insert(one.begin(), {slot, 1});
    several.push_back({slot, 1 + slot % 4});
  }
  both.step(fill, {});
  both.step(one);
  both.step(several);
}

TEST_F(Runtime, AttendsWithWindowsCapsAndScales) {
  const PlanBundle bundle = mixed_plan();
  Both both(bundle, geometry_of(bundle));
  both.step({{0, 200}, {1, 66}, {2, 5}}, {});
  std::vector<AttentionOptions> options;
  for (const int window : {1, 2, 63, 64, 65, 100, 132, 1000}) options.push_back({0, 0, window});
  options.push_back({0.05f, 0, 0});
  options.push_back({0, 2, 0});
  options.push_back({0.2f, 20, 70});
  both.step({{0, 3}, {1, 2}, {2, 4}}, options);
}

TEST_F(Runtime, ServesEveryGroupSize) {
  const PlanBundle scalar = calibrated_plan(64, 16, {{4, 3, 2, 2}}, {{3, 3, 2, 0}});
  const PlanBundle trellis =
      with_trellis(calibrated_plan(64, 8, {{6, 4, 4, 3, 2, 2, 1, 0}}, {{3, 3, 3, 2, 2, 2, 2, 1}}));
  for (const int queries_per_kv : {1, 2, 3, 4, 5, 7, 8, 9, 12, 16})
    for (const PlanBundle* bundle : {&scalar, &trellis}) {
      SCOPED_TRACE(std::to_string(queries_per_kv) + " " + bundle->plan.code);
      Both both(*bundle, geometry_of(*bundle, queries_per_kv, 2, 200));
      both.step({{0, 140}, {1, 20}}, {});
      both.step({{1, 1}, {0, 1}});
      both.step({{1, 4}, {0, 3}});
    }
}

TEST_F(Runtime, RefusesTablesThatLeaveNoRoom) {
  std::vector<int> widths;
  for (int i = 0; i < 32; ++i) widths.push_back(8 - i / 4);
  PlanBundle bundle = with_exact_levels(with_trellis(calibrated_plan(256, 8, {widths}, {widths})));
  for (float& mean : bundle.tensors.layers[0].k.mean.data) mean *= 100;  // needs both rotary tiles
  EXPECT_THROW(Both(bundle, geometry_of(bundle, 8)), InputError);
}

TEST_F(Runtime, GrowsTokenByTokenOverAPage) {
  const PlanBundle bundle = mixed_plan();
  Both both(bundle, geometry_of(bundle));
  both.fill(1, 60);
  for (int t = 0; t < 12; ++t) both.step({{1, 1}});
  both.expect_equal_vectors(1);
}

TEST_F(Runtime, ForksShareFullPagesAndDivergeAfter) {
  const PlanBundle bundle = mixed_plan();
  const int sinks = bundle.plan.sink_tokens;
  for (const int tokens : {sinks - 1, sinks, sinks + 64, 150}) {
    SCOPED_TRACE(tokens);
    Both both(bundle, geometry_of(bundle));
    both.fill(0, tokens);
    both.fork(0, 2);
    both.step({{0, 1}, {2, 2}});
    both.fork(2, 1);
    both.release(0);
    both.step({{1, 50}, {2, 3}}, {});
    both.step({{1, 1}, {2, 1}});
    for (const int slot : {1, 2}) both.expect_equal_vectors(slot);
  }
}

TEST_F(Runtime, ReusedSlotsAndBlocksShowNothingOfTheirPast) {
  const PlanBundle bundle = mixed_plan();
  CacheGeometry geometry = geometry_of(bundle);
  geometry.blocks = 8;
  Both both(bundle, geometry);
  both.step({{0, 260}, {1, 140}, {2, 70}}, {});
  both.release(1);
  both.release(0);
  both.step({{1, 2}, {0, 70}, {3, 200}}, {});
  both.release(0);
  both.step({{3, 1}, {1, 1}, {0, 1}, {2, 1}});
  both.step({{0, 4}, {1, 66}}, {});
  both.step({{0, 1}, {1, 3}, {2, 2}});
  for (const int slot : {0, 1, 2, 3}) both.expect_equal_vectors(slot);
}

TEST_F(Runtime, TwoRunsGiveEqualBytes) {
  const PlanBundle bundle = mixed_plan();
  std::array<std::vector<float>, 2> outputs;
  for (std::vector<float>& output : outputs) {
    Both both(bundle, geometry_of(bundle));
    both.step({{0, 280}, {1, 64}}, {});
    both.step({{0, 2}, {1, 1}});
    output = both.outputs();
  }
  ASSERT_EQ(outputs[0].size(), outputs[1].size());
  EXPECT_EQ(std::memcmp(outputs[0].data(), outputs[1].data(), outputs[0].size() * sizeof(float)),
            0);
}

TEST_F(Runtime, SharesItsPoolUntilItIsEmptyAndRefusesWithoutHarm) {
  const PlanBundle bundle = mixed_plan();
  CacheGeometry geometry = geometry_of(bundle);
  geometry.blocks = 3;
  Both both(bundle, geometry);
  both.step({{0, 132}, {1, 60}}, {});
  const std::vector<SequenceStep> too_much = {{1, 8}, {2, 70}};
  EXPECT_THROW(both.cuda().begin_step(too_much), MemoryError);
  EXPECT_EQ(both.cuda().length(1), 60);
  EXPECT_EQ(both.cuda().length(2), 0);
  both.step({{1, 4}, {0, 1}});
  both.release(0);
  both.step({{2, 70}}, {});
  both.step({{2, 1}, {1, 1}});
  for (const int slot : {1, 2}) both.expect_equal_vectors(slot);
}

}  // namespace
}  // namespace kvplan::kernels
