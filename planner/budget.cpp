#include "planner/budget.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr double kBytesPerGib = 0x1p30;
constexpr double kMaxBits = 0x1p53;  // integers up to here are exact in a double
constexpr std::int64_t kFp16Bytes = 2;

struct TokenCounts {
  std::int64_t fp16 = 0, packed = 0;
};

void require_positive(std::int64_t value, const char* name) {
  if (value <= 0) {
    throw ArgumentError(std::string(name) + " is " + std::to_string(value) +
                        ", expected at least 1");
  }
}

void check(const CacheGeometry& geometry) {
  require_positive(geometry.elements, "elements per token");
  require_positive(geometry.context, "context");
  require_positive(geometry.batch, "batch");
  require_positive(geometry.page_tokens, "page_tokens");
  if (geometry.sink_tokens < 0) {
    throw ArgumentError("sink_tokens is " + std::to_string(geometry.sink_tokens) +
                        ", expected at least 0");
  }
}

TokenCounts count_tokens(const CacheGeometry& geometry) {
  const std::int64_t after_sinks =
      std::max<std::int64_t>(geometry.context - geometry.sink_tokens, 0);
  const std::int64_t packed = after_sinks / geometry.page_tokens * geometry.page_tokens;
  return {geometry.context - packed, packed};
}

/// Sums and products of sizes; ArgumentError instead of overflow.
class Bytes {
 public:
  explicit Bytes(std::int64_t value) : value_(value) {}
  std::int64_t value() const { return value_; }
  friend Bytes operator*(Bytes a, std::int64_t b) {
    if (__builtin_mul_overflow(a.value_, b, &a.value_)) refuse();
    return a;
  }
  friend Bytes operator+(Bytes a, Bytes b) {
    if (__builtin_add_overflow(a.value_, b.value_, &a.value_)) refuse();
    return a;
  }

 private:
  [[noreturn]] static void refuse() {
    throw ArgumentError(
        "the cache would take more than 2^63 bytes: check elements, context and batch");
  }
  std::int64_t value_;
};

std::int64_t floor_with_tolerance(double x) {
  const double nearest = std::nearbyint(x);
  return static_cast<std::int64_t>(std::abs(x - nearest) <= 1e-9 * nearest ? nearest
                                                                           : std::floor(x));
}

std::int64_t gib_budget_bits(double gib, const CacheGeometry& geometry) {
  const std::int64_t fp16_bytes = cache_bytes(0, geometry);
  const double budget_bytes = std::floor(gib * kBytesPerGib);
  if (static_cast<double>(fp16_bytes) > budget_bytes) {
    const double minimum = static_cast<double>(fp16_bytes) / kBytesPerGib;
    throw InfeasibleError(gib, minimum,
                          "a budget of " + std::to_string(gib) +
                              " GiB is too small: sinks and open pages alone take " +
                              std::to_string(minimum) + " GiB at fp16");
  }
  const std::int64_t fp16_token_bits = (Bytes(geometry.elements) * (8 * kFp16Bytes)).value();
  const std::int64_t packed = (Bytes(count_tokens(geometry).packed) * geometry.batch).value();
  if (packed == 0) return fp16_token_bits;
  constexpr double kInt64End = 0x1p63;
  const std::int64_t bytes = budget_bytes < kInt64End ? static_cast<std::int64_t>(budget_bytes)
                                                      : std::numeric_limits<std::int64_t>::max();
  return std::min((bytes - fp16_bytes) / packed, fp16_token_bits / 8) * 8;
}

}  // namespace

std::int64_t cache_bytes(std::int64_t packed_bits, const CacheGeometry& geometry) {
  check(geometry);
  if (packed_bits < 0) {
    throw ArgumentError("packed bits per token are " + std::to_string(packed_bits) +
                        ", expected at least 0");
  }
  const TokenCounts tokens = count_tokens(geometry);
  const std::int64_t token_bytes = packed_bits / 8 + (packed_bits % 8 != 0 ? 1 : 0);
  const Bytes sequence =
      Bytes(geometry.elements) * kFp16Bytes * tokens.fp16 + Bytes(token_bytes) * tokens.packed;
  return (sequence * geometry.batch).value();
}

std::int64_t budget_bits(const BudgetSpec& budget, const CacheGeometry& geometry) {
  check(geometry);
  if (budget.kind != "bits" && budget.kind != "bytes_per_token" && budget.kind != "gib") {
    throw ArgumentError("budget kind \"" + budget.kind +
                        "\" is no number of bits: expected bits, bytes_per_token or gib");
  }
  if (!std::isfinite(budget.value) || budget.value <= 0) {
    throw ArgumentError("a budget of " + std::to_string(budget.value) + " " + budget.kind +
                        " is not possible: expected a positive number");
  }
  if (budget.kind == "gib") return gib_budget_bits(budget.value, geometry);
  const bool per_element = budget.kind == "bits";
  const double bits = per_element ? budget.value * static_cast<double>(geometry.elements)
                                  : 8 * std::floor(budget.value);
  if (bits > kMaxBits) {
    throw ArgumentError("a budget of " + std::to_string(budget.value) + " " + budget.kind +
                        " is more than 2^53 bits per token");
  }
  return floor_with_tolerance(bits);
}

double effective_bits_at_context(double effective_bits, const CacheGeometry& geometry) {
  check(geometry);
  if (!std::isfinite(effective_bits) || effective_bits < 0) {
    throw ArgumentError("effective_bits is " + std::to_string(effective_bits) +
                        ", expected a number >= 0");
  }
  CacheGeometry sequence = geometry;
  sequence.batch = 1;
  // Sizes are whole bits; the product only carries rounding.
  const double packed_bits =
      std::nearbyint(effective_bits * static_cast<double>(geometry.elements));
  if (packed_bits > kMaxBits) {
    throw ArgumentError("effective_bits is " + std::to_string(effective_bits) +
                        ", more than 2^53 bits per token");
  }
  const std::int64_t bytes = cache_bytes(static_cast<std::int64_t>(packed_bits), sequence);
  return 8 * static_cast<double>(bytes) /
         (static_cast<double>(geometry.elements) * static_cast<double>(geometry.context));
}

}  // namespace kvplan::planner
