// The paged cache against plain lists of vectors that went through the codec.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include "quant/kv_cache.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "schemas/error.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;
using ::testing::HasSubstr;

constexpr double kTolerance = 2e-6;  // outputs are floats

/// A cache beside the vectors that it was given.
class Checked {
 public:
  Checked(PlanBundle bundle, const CacheGeometry& geometry)
      : bundle_(std::move(bundle)),
        cache_(make_reference_cache(bundle_, geometry)),
        d_(static_cast<std::size_t>(bundle_.plan.model.head_dim)),
        kv_heads_(static_cast<std::size_t>(bundle_.plan.model.kv_heads)),
        query_heads_(static_cast<std::size_t>(geometry.query_heads)) {
    for (std::size_t l = 0; l < bundle_.plan.layers.size(); ++l)
      for (const Side side : kSides)
        codecs_.push_back(make_codec(bundle_, static_cast<int>(l), side));
  }

  KvCache& operator*() { return *cache_; }
  KvCache* operator->() { return cache_.get(); }
  int layers() const { return static_cast<int>(bundle_.plan.layers.size()); }

  std::vector<std::uint16_t> vectors(std::size_t heads, std::size_t tokens) {
    std::vector<std::uint16_t> bits(tokens * heads * d_);
    for (std::uint16_t& value : bits) value = to_half(static_cast<float>(random_.next_normal()));
    return bits;
  }
  std::vector<std::uint16_t> rows(std::size_t tokens) { return vectors(kv_heads_, tokens); }

  void fork(int from, int to) {
    cache_->fork(from, to);
    given_[to] = given_[from];
  }
  void release(int slot) {
    cache_->release(slot);
    given_.erase(slot);
  }

  /// A step of random vectors, checking the attention of each layer.
  void step(const std::vector<SequenceStep>& parts, const AttentionOptions& options = {}) {
    cache_->begin_step(parts);
    std::size_t tokens = 0;
    for (const SequenceStep& part : parts) tokens += static_cast<std::size_t>(part.tokens);
    for (int layer = 0; layer < layers(); ++layer) {
      const std::array<std::vector<std::uint16_t>, 2> x = {rows(tokens), rows(tokens)};
      cache_->append(layer, x[0], x[1]);
      std::size_t first = 0;
      for (const SequenceStep& part : parts) {
        const std::size_t count = static_cast<std::size_t>(part.tokens) * kv_heads_ * d_;
        for (const std::size_t s : {0, 1}) {
          std::vector<float>& list = given_[part.slot][index(layer, s)];
          for (std::size_t i = 0; i < count; ++i) list.push_back(from_half(x[s][first + i]));
        }
        first += count;
      }
      check_attention(layer, parts, tokens, options);
    }
  }

  /// What the slot should read as, and whether it does.
  void check_read_back(int slot) {
    for (int layer = 0; layer < layers(); ++layer)
      for (const Side side : kSides) {
        const std::vector<float> expected = plain(layer, side, slot);
        std::vector<float> found(expected.size(), std::numeric_limits<float>::quiet_NaN());
        const auto length = static_cast<std::int64_t>(expected.size() / (kv_heads_ * d_));
        ASSERT_EQ(cache_->length(slot), length);
        cache_->read_back(layer, side, slot, 0, length, found);
        ASSERT_EQ(found, expected) << "layer " << layer << " " << side_name(side);
      }
  }

  std::vector<float> plain(int layer, Side side, int slot) {
    const auto s = static_cast<std::size_t>(side);
    std::vector<float> x = given_[slot][index(layer, s)];
    const std::size_t row = kv_heads_ * d_;
    const std::size_t sinks = static_cast<std::size_t>(bundle_.plan.sink_tokens);
    const KvShape page{kPageTokens, bundle_.plan.model.kv_heads, bundle_.plan.model.head_dim};
    for (std::size_t t = sinks; t + kPageTokens <= x.size() / row; t += kPageTokens) {
      const auto part = std::span(x).subspan(t * row, kPageTokens * row);
      const auto decoded =
          round_trip(*codecs_[index(layer, s)], page, part, static_cast<std::int64_t>(t));
      std::ranges::copy(decoded, part.begin());
    }
    return x;
  }

 private:
  static std::size_t index(int layer, std::size_t side) {
    return 2 * static_cast<std::size_t>(layer) + side;
  }

  void check_attention(int layer, const std::vector<SequenceStep>& parts, std::size_t tokens,
                       const AttentionOptions& options) {
    const std::vector<std::uint16_t> q = vectors(query_heads_, tokens);
    std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
    std::vector<float> lse(tokens * query_heads_, std::numeric_limits<float>::quiet_NaN());
    cache_->attend(layer, q, options, out, lse);
    std::vector<float> without_lse(out.size());
    cache_->attend(layer, q, options, without_lse, {});
    ASSERT_EQ(without_lse, out);
    std::size_t row = 0;
    for (const SequenceStep& part : parts) {
      const std::vector<float> k = plain(layer, Side::kKey, part.slot);
      const std::vector<float> v = plain(layer, Side::kValue, part.slot);
      const std::size_t start = k.size() / (kv_heads_ * d_) - static_cast<std::size_t>(part.tokens);
      for (int t = 0; t < part.tokens; ++t, ++row)
        for (std::size_t head = 0; head < query_heads_; ++head)
          check_head(std::span(q).subspan((row * query_heads_ + head) * d_, d_), k, v,
                     head / (query_heads_ / kv_heads_), start + static_cast<std::size_t>(t),
                     options, std::span(out).subspan((row * query_heads_ + head) * d_, d_),
                     lse[row * query_heads_ + head]);
    }
  }

  // Softmax over positions 0..t, or the last `window` of them.
  void check_head(std::span<const std::uint16_t> q, const std::vector<float>& k,
                  const std::vector<float>& v, std::size_t kv_head, std::size_t t,
                  const AttentionOptions& options, std::span<const float> out, float lse) const {
    const double scale =
        options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(d_));
    const auto window = static_cast<std::size_t>(options.window);
    const std::size_t begin = window > 0 && t + 1 > window ? t + 1 - window : 0;
    double mass = 0;
    std::vector<double> sum(d_);
    for (std::size_t s = begin; s <= t; ++s) {
      const std::size_t at = (s * kv_heads_ + kv_head) * d_;
      double score = 0;
      for (std::size_t i = 0; i < d_; ++i) score += double{from_half(q[i])} * double{k[at + i]};
      score *= scale;
      if (options.soft_cap > 0) score = options.soft_cap * std::tanh(score / options.soft_cap);
      mass += std::exp(score);
      for (std::size_t i = 0; i < d_; ++i) sum[i] += std::exp(score) * double{v[at + i]};
    }
    ASSERT_NEAR(lse, std::log(mass), kTolerance * (1 + std::abs(std::log(mass))));
    for (std::size_t i = 0; i < d_; ++i)
      ASSERT_NEAR(out[i], sum[i] / mass, kTolerance * (1 + std::abs(sum[i] / mass)))
          << "position " << t << " channel " << i;
  }

  PlanBundle bundle_;
  std::unique_ptr<KvCache> cache_;
  std::size_t d_, kv_heads_, query_heads_;
  std::vector<std::unique_ptr<Codec>> codecs_;                      // [layer][side]
  std::map<int, std::map<std::size_t, std::vector<float>>> given_;  // slot, [layer][side]
  RandomStream random_{17, StreamPurpose::kTest};
};

PlanBundle small_plan() { return calibrated_plan(16, 8, {{4, 2}}, {{3, 0}}); }

CacheGeometry geometry_of(int sequences, std::int64_t max_tokens, int query_heads = 2) {
  CacheGeometry geometry;
  geometry.query_heads = query_heads;
  geometry.max_sequences = sequences;
  geometry.max_tokens = max_tokens;
  return geometry;
}

class CacheOfPlan : public ::testing::TestWithParam<PagedPlan> {};

TEST_P(CacheOfPlan, ReadsAsTheCodecAndAttendsToWhatItReads) {
  const PlanBundle bundle = GetParam().make();
  Checked cache(bundle, geometry_of(2, 200, 2 * bundle.plan.model.kv_heads));
  cache.step({{0, 70}, {1, 1}});
  cache.step({{1, 3}, {0, 2}});
  cache.step({{0, 60}, {1, 64}});
  for (const int slot : {0, 1}) cache.check_read_back(slot);
}

INSTANTIATE_TEST_SUITE_P(All, CacheOfPlan, ::testing::ValuesIn(paged_plans()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(ReferenceCache, HoldsEveryLengthAroundSinksAndPages) {
  for (const int length : {1, 3, 4, 5, 63, 64, 65, 67, 68, 69, 127, 132, 133}) {
    SCOPED_TRACE("length " + std::to_string(length));
    Checked cache(small_plan(), geometry_of(2, 200));
    EXPECT_EQ(cache->length(0), 0);
    cache.step({{0, length}});
    cache.check_read_back(0);
    EXPECT_EQ(cache->free_blocks(), 6u - (length >= 132 ? 2 : length >= 68 ? 1 : 0));
    cache.step({{0, 1}});
    cache.check_read_back(0);
  }
}

TEST(ReferenceCache, ReadsTheSameHoweverTheTokensCame) {
  constexpr int kTokens = 150;
  const auto read = [&](const std::vector<int>& steps) {
    const PlanBundle bundle = small_plan();
    const auto cache = make_reference_cache(bundle, geometry_of(1, kTokens));
    RandomStream random(3, StreamPurpose::kTest);
    std::vector<std::uint16_t> k(kTokens * 16), v(k.size());
    for (auto* x : {&k, &v})
      for (auto& value : *x) value = to_half(static_cast<float>(random.next_normal()));
    std::size_t done = 0;
    for (const int tokens : steps) {
      cache->begin_step({{SequenceStep{0, tokens}}});
      const auto count = static_cast<std::size_t>(tokens) * 16;
      for (const int layer : {0, 1})
        cache->append(layer, std::span(k).subspan(done, count), std::span(v).subspan(done, count));
      done += count;
    }
    std::vector<float> x(k.size());
    cache->read_back(1, Side::kKey, 0, 0, kTokens, x);
    return x;
  };
  const auto at_once = read({kTokens});
  EXPECT_EQ(read(std::vector<int>(kTokens, 1)), at_once);
  EXPECT_EQ(read({3, 1, 63, 1, 64, 18}), at_once);
}

TEST(ReferenceCache, AttendsWithEveryQueryLengthAndGroup) {
  for (const int queries_per_kv : {1, 3, 5, 16})
    for (const int tokens : {1, 2, 3, 4}) {
      SCOPED_TRACE(std::to_string(queries_per_kv) + " queries, " + std::to_string(tokens) +
                   " tokens");
      Checked cache(calibrated_plan(16, 8, {{4, 2}, {3, 1}}, {{3, 0}, {2, 2}}),
                    geometry_of(1, 200, 2 * queries_per_kv));
      cache.step({{0, 66}});
      cache.step({{0, tokens}});
      cache.step({{0, tokens}});
    }
}

TEST(ReferenceCache, AppliesWindowCapAndScale) {
  for (const std::int64_t window : {1, 2, 5, 63, 64, 65, 100, 1000}) {
    SCOPED_TRACE("window " + std::to_string(window));
    Checked cache(small_plan(), geometry_of(1, 300));
    cache.step({{0, 140}}, {.window = window});
    cache.step({{0, 3}}, {.scale = 0.7f, .soft_cap = 1.5f, .window = window});
  }
  Checked cache(small_plan(), geometry_of(1, 300));
  cache.step({{0, 80}}, {.soft_cap = 0.5f});
  cache.step({{0, 2}}, {.scale = 3});
}

TEST(ReferenceCache, HoldsPlansWithoutSinks) {
  PlanBundle bundle = small_plan();
  bundle.plan.sink_tokens = 0;
  Checked cache(bundle, geometry_of(1, 200));
  cache.step({{0, 63}});
  cache.step({{0, 1}});
  cache.step({{0, 70}});
  cache.check_read_back(0);
}

TEST(ReferenceCache, SharesThePagesOfForksThatThenDiverge) {
  Checked cache(small_plan(), geometry_of(3, 300));
  cache.step({{0, 140}});
  const std::size_t free = cache->free_blocks();
  cache.fork(0, 2);
  EXPECT_EQ(cache->free_blocks(), free);
  cache.check_read_back(2);
  cache.step({{0, 1}, {2, 2}});  // differing open pages
  cache.step({{2, 70}, {0, 60}});
  EXPECT_EQ(cache->free_blocks(), free - 2);
  cache.check_read_back(0);
  cache.check_read_back(2);
  cache.release(0);
  EXPECT_EQ(cache->free_blocks(), free - 1);  // only its own page
  EXPECT_EQ(cache->length(0), 0);
  cache.check_read_back(2);
  cache.step({{0, 90}, {2, 1}});  // the slot and the block serve again
  cache.check_read_back(0);
  cache.check_read_back(2);
  cache.release(2);
  cache.release(0);
  cache.release(0);
  EXPECT_EQ(cache->free_blocks(), free + 2);
}

TEST(ReferenceCache, ForksOfSinksAndEmptySlots) {
  Checked cache(small_plan(), geometry_of(2, 100));
  cache.fork(0, 1);
  EXPECT_EQ(cache->length(1), 0);
  cache.step({{0, 3}});
  cache.fork(0, 1);
  cache.step({{1, 3}, {0, 1}});
  cache.check_read_back(0);
  cache.check_read_back(1);
}

TEST(ReferenceCache, ReportsAnExhaustedPoolAndStaysAsItWas) {
  CacheGeometry geometry = geometry_of(2, 1000);
  geometry.blocks = 2;
  Checked cache(small_plan(), geometry);
  cache.step({{0, 130}, {1, 5}});
  EXPECT_EQ(cache->free_blocks(), 1u);
  const std::vector<SequenceStep> too_much = {{1, 63}, {0, 2}};
  try {
    cache->begin_step(too_much);
    FAIL();
  } catch (const MemoryError& error) {
    // K 4 and 2, V 3 bits of 8 coordinates and two norms, 64 tokens, two layers with sides
    // exchanged.
    const int block = 64 * ((8 * 4 + 8 * 2 + 8 * 3) / 8 + 2);
    EXPECT_EQ(error.needed_bytes(), 2 * 2 * block);
    EXPECT_EQ(error.available_bytes(), 2 * block);
    EXPECT_THAT(error.what(), HasSubstr("1 blocks"));
  }
  EXPECT_EQ(cache->length(0), 130);
  EXPECT_EQ(cache->length(1), 5);
  EXPECT_EQ(cache->free_blocks(), 1u);
  cache.check_read_back(0);
  cache.step({{1, 63}});
  EXPECT_EQ(cache->free_blocks(), 0u);
  cache.step({{0, 1}, {1, 63}});  // up to the last token of the open pages
  EXPECT_THROW(cache->begin_step(std::vector<SequenceStep>{{0, 1}}), MemoryError);
  cache.release(1);
  cache.step({{0, 1}});
  cache.check_read_back(0);
}

TEST(ReferenceCache, RefusesMisuseAndStaysAsItWas) {
  Checked cache(small_plan(), geometry_of(2, 100));
  const auto begin = [&](const std::vector<SequenceStep>& parts) { cache->begin_step(parts); };
  EXPECT_THROW(begin({{2, 1}}), ArgumentError);
  EXPECT_THROW(begin({{-1, 1}}), ArgumentError);
  EXPECT_THROW(begin({{0, 1}, {0, 1}}), ArgumentError);
  EXPECT_THROW(begin({{0, 0}}), ArgumentError);
  EXPECT_THROW(begin({{0, 1}, {1, -5}}), ArgumentError);
  EXPECT_THROW(begin({{0, 101}}), ArgumentError);
  EXPECT_EQ(cache->length(0), 0);
  const std::vector<std::uint16_t> row(16), two(32);
  std::vector<float> out(32), lse(2);
  EXPECT_THROW(cache->append(0, row, row), ArgumentError);  // no step
  EXPECT_THROW(cache->attend(0, {}, {}, {}, {}), ArgumentError);
  begin({{0, 1}});
  EXPECT_EQ(cache->length(0), 1);
  EXPECT_THROW(cache->attend(0, two, {}, out, lse), ArgumentError);  // before append()
  EXPECT_THROW(cache->append(2, row, row), ArgumentError);
  EXPECT_THROW(cache->append(-1, row, row), ArgumentError);
  EXPECT_THROW(cache->append(0, two, row), ArgumentError);
  EXPECT_THROW(cache->append(0, row, {}), ArgumentError);
  for (const std::uint16_t bad : std::to_array<std::uint16_t>({0x7c00, 0xfc00, 0x7e01})) {
    std::vector<std::uint16_t> poisoned = row;
    poisoned[7] = bad;
    EXPECT_THROW(cache->append(0, row, poisoned), ArgumentError);
  }
  cache->append(0, row, row);
  EXPECT_THROW(cache->append(0, row, row), ArgumentError);  // twice
  EXPECT_NO_THROW(cache->attend(0, two, {}, out, lse));
  EXPECT_THROW(cache->attend(0, row, {}, out, lse), ArgumentError);
  EXPECT_THROW(cache->attend(0, two, {}, std::span(out).first(31), lse), ArgumentError);
  EXPECT_THROW(cache->attend(0, two, {}, out, std::span(lse).first(1)), ArgumentError);
  EXPECT_THROW(cache->attend(0, two, {.soft_cap = -1}, out, lse), ArgumentError);
  EXPECT_THROW(cache->attend(0, two, {.scale = INFINITY}, out, lse), ArgumentError);
  EXPECT_THROW(cache->attend(0, two, {.window = -1}, out, lse), ArgumentError);
  EXPECT_THROW(begin({{1, 1}}), ArgumentError);  // slot 0 lacks layer 1
  EXPECT_THROW(cache->fork(0, 1), ArgumentError);
  std::vector<float> x(16);
  EXPECT_NO_THROW(cache->read_back(0, Side::kKey, 0, 0, 1, x));
  EXPECT_THROW(cache->read_back(1, Side::kKey, 0, 0, 1, x), ArgumentError);  // not there yet
  cache->append(1, row, row);
  EXPECT_NO_THROW(cache->read_back(1, Side::kKey, 0, 0, 1, x));
  EXPECT_NO_THROW(cache->read_back(1, Side::kKey, 0, 1, 0, {}));
  EXPECT_THROW(cache->read_back(1, Side::kKey, 0, 1, 1, x), ArgumentError);
  EXPECT_THROW(cache->read_back(1, Side::kKey, 0, -1, 1, x), ArgumentError);
  EXPECT_THROW(cache->read_back(1, Side::kKey, 0, 0, 1, {}), ArgumentError);
  EXPECT_THROW(cache->read_back(1, Side::kKey, 2, 0, 0, {}), ArgumentError);
  EXPECT_THROW(cache->fork(0, 0), ArgumentError);
  EXPECT_THROW(cache->fork(0, 2), ArgumentError);
  EXPECT_THROW(cache->release(2), ArgumentError);
  EXPECT_THROW(cache->length(-1), ArgumentError);
}

TEST(ReferenceCache, EndsAStepWithTheReleaseOfOneOfItsSlots) {
  Checked cache(small_plan(), geometry_of(3, 100));
  cache.step({{0, 5}, {1, 7}, {2, 2}});
  const std::vector<std::uint16_t> rows(32), q(64);
  std::vector<float> out(64);
  cache.release(0);
  EXPECT_THROW(cache->attend(0, q, {}, out, {}), ArgumentError);
  EXPECT_THROW(cache->append(0, rows, rows), ArgumentError);
  cache.check_read_back(1);
  cache.step({{1, 1}, {2, 1}});

  cache->begin_step({{SequenceStep{1, 1}, SequenceStep{2, 1}}});
  cache->append(0, rows, rows);
  cache.release(2);
  EXPECT_THROW(cache->append(1, rows, rows), ArgumentError);
  EXPECT_THROW(cache->begin_step({{SequenceStep{0, 1}}}), ArgumentError);  // slot 1 lacks layer 1
  cache.release(1);
  cache.step({{2, 6}, {0, 2}, {1, 1}});
  for (const int slot : {0, 1, 2}) cache.check_read_back(slot);
}

TEST(ReferenceCache, RefusesImpossibleGeometry) {
  const auto refused = [](auto change) {
    CacheGeometry geometry = geometry_of(2, 100);
    change(geometry);
    EXPECT_THROW(make_reference_cache(small_plan(), geometry), ArgumentError);
  };
  refused([](CacheGeometry& g) { g.query_heads = 0; });
  refused([](CacheGeometry& g) { g.max_sequences = 0; });
  refused([](CacheGeometry& g) { g.max_tokens = 0; });
  refused([](CacheGeometry& g) { g.max_tokens = (std::int64_t{1} << 30) + 1; });
  refused([](CacheGeometry& g) { g.blocks = -1; });
  refused([](CacheGeometry& g) { g.max_query_tokens = 0; });
  CacheGeometry odd = geometry_of(1, 100, 3);
  EXPECT_THROW(make_reference_cache(calibrated_plan(16, 16, {{2}, {2}}, {{2}, {2}}), odd),
               ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
