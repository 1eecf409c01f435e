// Budgets in bits, bytes per token and GiB, and the bits that a whole cache takes.

#include "planner/budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

CacheGeometry geometry(std::int64_t elements, std::int64_t context, std::int64_t batch = 1,
                       int sinks = 4, int page = 64) {
  return {elements, context, batch, sinks, page};
}

struct BytesRow {
  const char* name;
  std::int64_t packed_bits;
  CacheGeometry geometry;
  std::int64_t bytes;
};

class CacheBytes : public testing::TestWithParam<BytesRow> {};

TEST_P(CacheBytes, ChargesSinksAndOpenPageAtFp16) {
  EXPECT_EQ(cache_bytes(GetParam().packed_bits, GetParam().geometry), GetParam().bytes);
}

INSTANTIATE_TEST_SUITE_P(
    Rows, CacheBytes,
    testing::Values(BytesRow{"OneFullPage", 80, geometry(10, 68), 4 * 20 + 64 * 10},
                    BytesRow{"OneTokenShort", 80, geometry(10, 67), 67 * 20},
                    BytesRow{"OpenPage", 80, geometry(10, 70), 6 * 20 + 64 * 10},
                    BytesRow{"OnlySinks", 80, geometry(10, 3), 3 * 20},
                    BytesRow{"NoSinks", 80, geometry(10, 64, 1, 0), 64 * 10},
                    BytesRow{"PartialByteRoundsUp", 81, geometry(10, 64, 1, 0), 64 * 11},
                    BytesRow{"BatchMultiplies", 81, geometry(10, 68, 3), 3 * (4 * 20 + 64 * 11)},
                    BytesRow{"PageOfOne", 8, geometry(10, 7, 1, 2, 1), 2 * 20 + 5}),
    [](const auto& row) { return row.param.name; });

struct BudgetRow {
  const char* name;
  BudgetSpec budget;
  CacheGeometry geometry;
  std::int64_t bits;
};

class Budgets : public testing::TestWithParam<BudgetRow> {};

TEST_P(Budgets, BecomeBitsPerToken) {
  EXPECT_EQ(budget_bits(GetParam().budget, GetParam().geometry), GetParam().bits);
}

constexpr double kByte = 0x1p-30;  // in GiB

INSTANTIATE_TEST_SUITE_P(
    Rows, Budgets,
    testing::Values(
        BudgetRow{"BitsExact", {"bits", 3.25}, geometry(11520, 4096), 37440},
        BudgetRow{"BitsRoundDown", {"bits", .33}, geometry(10, 4096), 3},
        BudgetRow{"BitsDecimal", {"bits", 4.35}, geometry(100, 4096), 435},  // 434.99.. in double
        BudgetRow{"BytesPerToken", {"bytes_per_token", 4680}, geometry(11520, 4096), 37440},
        BudgetRow{"BytesPerTokenWhole", {"bytes_per_token", 4680.9}, geometry(11520, 4096), 37440},
        BudgetRow{"GibExact", {"gib", (4 * 20 + 64 * 7) * kByte}, geometry(10, 68), 56},
        BudgetRow{"GibOneByteShort", {"gib", (4 * 20 + 64 * 7 - 1) * kByte}, geometry(10, 68), 48},
        BudgetRow{"GibFp16Alone", {"gib", 4 * 20 * kByte}, geometry(10, 68), 0},
        BudgetRow{"GibBatch", {"gib", 5 * (4 * 20 + 64 * 7) * kByte}, geometry(10, 68, 5), 56},
        BudgetRow{"GibAmpleIsFp16", {"gib", 1e30}, geometry(10, 68), 160},
        BudgetRow{"GibNoFullPage", {"gib", 67 * 20 * kByte}, geometry(10, 67), 160}),
    [](const auto& row) { return row.param.name; });

TEST(Budget, GibIsTheLargestThatFits) {
  for (std::int64_t context : {100, 1000, 4096, 8191}) {
    for (double gib : {.15, .2, .37}) {
      SCOPED_TRACE(std::to_string(context) + " tokens, " + std::to_string(gib) + " GiB");
      const CacheGeometry g = geometry(11520, context, 16384 / context);
      const std::int64_t bits = budget_bits({"gib", gib}, g);
      EXPECT_LE(static_cast<double>(cache_bytes(bits, g)), gib * 0x1p30);
      if (bits < 16 * g.elements) {
        EXPECT_GT(static_cast<double>(cache_bytes(bits + 1, g)), gib * 0x1p30);
      }
    }
  }
}

TEST(Budget, GibBelowFp16PartsIsInfeasible) {
  const CacheGeometry g = geometry(10, 68, 2);
  try {
    budget_bits({"gib", (2 * 4 * 20 - 1) * kByte}, g);
    FAIL();
  } catch (const InfeasibleError& e) {
    EXPECT_EQ(e.minimum(), 2 * 4 * 20 * kByte);
    EXPECT_EQ(budget_bits({"gib", e.minimum()}, g), 0);
  }
}

TEST(Budget, RefusesWhatIsNoBudget) {
  const CacheGeometry g = geometry(10, 68);
  for (const char* kind : {"max_kl", "none", "", "gigabytes"}) {
    EXPECT_THROW(budget_bits({kind, 1}, g), ArgumentError) << kind;
  }
  for (const char* kind : {"bits", "bytes_per_token", "gib"}) {
    for (double value : {0.0, -1.0, kNan, std::numeric_limits<double>::infinity()}) {
      EXPECT_THROW(budget_bits({kind, value}, g), ArgumentError) << kind << " " << value;
    }
  }
  EXPECT_THROW(budget_bits({"bits", 1e300}, g), ArgumentError);
  EXPECT_THROW(budget_bits({"bytes_per_token", 1e300}, g), ArgumentError);
}

TEST(Budget, RefusesImpossibleGeometry) {
  for (const CacheGeometry& g :
       {geometry(0, 68), geometry(10, 0), geometry(10, 68, 0), geometry(10, 68, 1, -1),
        geometry(10, 68, 1, 4, 0), geometry(std::int64_t{1} << 62, 68)}) {
    EXPECT_THROW(cache_bytes(8, g), ArgumentError);
    EXPECT_THROW(effective_bits_at_context(1, g), ArgumentError);
    EXPECT_THROW(budget_bits({"gib", 1}, g), ArgumentError);
  }
  EXPECT_THROW(cache_bytes(-1, geometry(10, 68)), ArgumentError);
}

TEST(EffectiveBitsAtContext, IsCacheBytesOfOneSequence) {
  // (4 x 16 + 64 x 4) / 68, whatever the batch
  EXPECT_DOUBLE_EQ(effective_bits_at_context(4, geometry(10, 68, 9)), (4 * 16 + 64 * 4) / 68.0);
  EXPECT_DOUBLE_EQ(effective_bits_at_context(4, geometry(10, 67)), 16);
  // 33 bits take 5 bytes
  EXPECT_DOUBLE_EQ(effective_bits_at_context(3.3, geometry(10, 64, 1, 0)), 4);
  EXPECT_DOUBLE_EQ(effective_bits_at_context(16, geometry(10, 4096)), 16);
}

TEST(EffectiveBitsAtContext, FallsTowardsTheEffectiveBits) {
  double previous = 16.5;
  for (std::int64_t context = 68; context <= 4 + 64 * 4096; context = 4 + (context - 4) * 4) {
    const double bits = effective_bits_at_context(3.25, geometry(11520, context));
    EXPECT_LT(bits, previous);
    EXPECT_GT(bits, 3.25);
    previous = bits;
  }
  EXPECT_NEAR(previous, 3.25, 1e-3);
}

TEST(EffectiveBitsAtContext, RefusesImpossibleBits) {
  for (double bits : {-.1, kNan, 1e300}) {
    EXPECT_THROW(effective_bits_at_context(bits, geometry(10, 68)), ArgumentError) << bits;
  }
}

}  // namespace
}  // namespace kvplan::planner
