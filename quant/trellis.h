#pragma once
// Trellis code ("tcq"): every coordinate of a vector is a table value chosen by 8 bits of the
// vector's circular bit stream, of which its own code is a part (docs/formats/packing.md).

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace kvplan::quant {

inline constexpr int kTrellisStates = 256;
inline constexpr int kMaxTrellisWidth = 4;    // wider codes are scalar
inline constexpr int kMinTrellisLength = 32;  // vectors with fewer trellis coordinates are scalar

/// Values by state for codes of `width` bits, trained on N(0,1) by data/trellis/train_trellis.cpp.
struct TrellisTable {
  int width = 0;
  double distortion = 1;  // E (X - value)^2 on N(0,1), vectors of 128 coordinates, tail-biting
  double distortion_error = 0;                 // its standard error
  std::array<float, kTrellisStates> values{};  // exact in fp16
};

/// The shipped table of a width of 1..4. ArgumentError for another width.
const TrellisTable& trellis_table(int width);

/// Squared error of `width` bits relative to the energy: trellis_table(width).distortion.
double trellis_distortion(int width);

/// Whether a head with these widths, one per group, is coded by the trellis: enough coordinates of
/// widths 1..4.
bool uses_trellis(std::span<const int> widths, int group_size);

/// One coordinate.
struct TrellisStep {
  int width = 0;                  // 1..4, new bits
  const float* values = nullptr;  // [256] by state
  float weight = 1;               // of its squared error, finite, >= 0
};

/// Nearest code words of vectors with given widths, tables and weights. The trellis runs from the
/// last coordinate to the first, so that in a stream packed lowest bit first the state of a
/// coordinate is the 8 bits that begin where its own code begins; after the last coordinate's code
/// the stream continues with the first one's (tail-biting). Immutable, thread-safe.
class Trellis {
 public:
  /// The tables are borrowed. ArgumentError: fewer than kMinTrellisLength steps, widths outside
  /// 1..4.
  explicit Trellis(std::vector<TrellisStep> steps);
  int size() const { return static_cast<int>(steps_.size()); }
  const std::vector<TrellisStep>& steps() const { return steps_; }

  /// States of the code word near `x`; the code of coordinate i is states[i] mod 2^width. Viterbi's
  /// algorithm over the joint of the circle finds the state there, a second run from that state to
  /// itself the code word; of equal paths the one with the lower states.
  ///   x, states  [size()], x finite
  void encode(std::span<const float> x, std::span<std::uint8_t> states) const;

 private:
  std::vector<TrellisStep> steps_;
};

}  // namespace kvplan::quant
