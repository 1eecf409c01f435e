#pragma once
// Counter-based random numbers (Philox4x32-10) and written-out distributions: equal on every
// platform and thread count.

#include <array>
#include <cstdint>
#include <span>

namespace kvplan::quant {

/// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), Philox4x32 with 10
/// rounds.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key);

/// What a stream of draws is for; part of the key, so streams never overlap.
enum class StreamPurpose : std::uint32_t {
  kRotation = 1,
  kMixing = 2,
  kLabels = 3,
  kBootstrap = 4,
  kTest = 5,
  kSketch = 6,      // rows of sign sketches
  kSimulation = 7,  // vectors drawn from a profile's moments
  kStudy = 8        // data of studies
};

/// One stream, addressed by (seed, purpose, a, b, c): draw i depends on these alone.
class RandomStream {
 public:
  RandomStream(std::uint64_t seed, StreamPurpose purpose, std::uint32_t a = 0, std::uint32_t b = 0,
               std::uint32_t c = 0);
  /// The stream of part p of this address. Parts never overlap, part 0 is the stream itself from
  /// its start, as long as none draws 2^34 words.
  RandomStream part(std::uint32_t p) const;
  std::uint32_t next_u32();
  /// Uniform in (0,1): (52 random bits + 1/2) / 2^52, exact in double.
  double next_uniform();
  /// Standard normal by inversion of next_uniform() (Wichura, algorithm AS 241), portable to the
  /// bit.
  double next_normal();
  /// Uniform integer in [0, bound), without modulo bias (rejection).
  std::uint32_t next_below(std::uint32_t bound);

 private:
  std::array<std::uint32_t, 2> key_;
  std::array<std::uint32_t, 4> counter_;
  std::array<std::uint32_t, 4> block_{};
  int used_ = 4;
};

}  // namespace kvplan::quant
