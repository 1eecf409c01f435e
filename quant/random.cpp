#include "quant/random.h"

#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<std::uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The address is first enciphered under the seed. Philox permutes its counters, so two addresses of
// one seed always get a different (key, upper counter half) and their streams share no block.
RandomStream::RandomStream(std::uint64_t seed, StreamPurpose purpose, std::uint32_t a,
                           std::uint32_t b, std::uint32_t c) {
  const auto address =
      philox4x32({static_cast<std::uint32_t>(purpose), a, b, c},
                 {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  key_ = {address[0], address[1]};
  counter_ = {0, 0, address[2], address[3]};
}

RandomStream RandomStream::part(std::uint32_t p) const {
  RandomStream out = *this;
  out.counter_[0] = 0;
  out.counter_[1] = p;
  out.used_ = static_cast<int>(out.block_.size());
  return out;
}

std::uint32_t RandomStream::next_u32() {
  if (used_ == 4) {
    block_ = philox4x32(counter_, key_);
    if (++counter_[0] == 0) ++counter_[1];
    used_ = 0;
  }
  return block_[static_cast<std::size_t>(used_++)];
}

double RandomStream::next_uniform() {
  const std::uint64_t high = next_u32() >> 6, low = next_u32() >> 6;
  return (static_cast<double>(high << 26 | low) + 0.5) * 0x1p-52;
}

double RandomStream::next_normal() { return normal_quantile(next_uniform()); }

std::uint32_t RandomStream::next_below(std::uint32_t bound) {
  if (bound == 0)
    throw ArgumentError("a random integer below 0 was asked for; the bound must be at least 1");
  // Lemire, "Fast Random Integer Generation in an Interval" (2019): the product's low half tells
  // which draws to reject.
  std::uint64_t product = std::uint64_t{next_u32()} * bound;
  const std::uint32_t threshold = (0u - bound) % bound;
  while (static_cast<std::uint32_t>(product) < threshold)
    product = std::uint64_t{next_u32()} * bound;
  return static_cast<std::uint32_t>(product >> 32);
}

}  // namespace kvplan::quant
