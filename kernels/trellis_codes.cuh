#pragma once
// Attention over the codes of a trellis (docs/formats/packing.md, "Streams"): states from the
// streams of a page, their values from a table in shared memory, products in fp16. Private to the
// decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// One side's streams of a page in shared memory.
class Streams {
 public:
  KVPLAN_DEVICE Streams(const RunEntry& run, std::uint32_t at)
      : at_(at), words_(run.stream_bytes / 4), left_(run.stream_bytes % 4) {}

  /// Word `word` of the tokens at `index` .. `index` + 3 (quant::stream_index), up to the one
  /// behind the last. A stream goes on with its first bits.
  KVPLAN_DEVICE uint4 words(int word, int index) const {
    const bool whole = word < words_;
    uint4 four = load_shared4(word_address(whole ? word : 0, index));
    if (whole || left_ == 0) [[likely]]
      return four;
    const int shift = 8 * left_;
    four = {four.x << shift, four.y << shift, four.z << shift, four.w << shift};
#pragma unroll 1
    for (int plane = 0; plane < left_; ++plane) {
      const std::uint32_t bytes =
          load_shared(word_address(words_, 0) + static_cast<std::uint32_t>(64 * plane + index));
      const auto byte = [&](int i) { return (bytes >> 8 * i & 0xff) << 8 * plane; };
      four.x |= byte(0), four.y |= byte(1), four.z |= byte(2), four.w |= byte(3);
    }
    return four;
  }

 private:
  KVPLAN_DEVICE std::uint32_t word_address(int word, int index) const {
    return at_ + static_cast<std::uint32_t>(4 * (quant::kPageTokens * word + index));
  }

  std::uint32_t at_;
  int words_, left_;  // whole words of a stream, bytes behind them
};

/// The codes of a run that a lane finds side by side in a stream: 4 of keys, 2 of values, of a half
/// tile half as many.
class TrellisReader {
 public:
  KVPLAN_DEVICE TrellisReader(const RunEntry& run, std::uint32_t at, int first_code)
      : streams_(run, at),
        width_(run.kind % kHalfKinds - kTrellisKinds),
        table_(std::uint32_t{run.table} << kEntryShift),
        mask_(static_cast<std::uint32_t>(trellis_entries(width_) - 1) << kIndexShift),
        bit_(run.bit + first_code * width_) {}
  /// Goes to the next tile.
  KVPLAN_DEVICE void advance() { bit_ += quant::kTileCoordinates * width_; }
  /// The bits of four tokens from the lane's first code on, for pair().
  KVPLAN_DEVICE void windows(std::uint32_t (&x)[4], int index) const {
    const int word = bit_ / 32, shift = bit_ % 32;
    const uint4 low = streams_.words(word, index), high = streams_.words(word + 1, index);
    // Codes and states of a lane take at most 20 bits.
    x[0] = funnel_right(low.x, high.x, shift) << kIndexShift;
    x[1] = funnel_right(low.y, high.y, shift) << kIndexShift;
    x[2] = funnel_right(low.z, high.z, shift) << kIndexShift;
    x[3] = funnel_right(low.w, high.w, shift) << kIndexShift;
  }
  /// The values of the next two codes of a window, which moves behind them.
  KVPLAN_DEVICE std::uint32_t pair(std::uint32_t& window) const {
    const std::uint32_t found = load_shared((window & mask_) | table_);
    window >>= 2 * width_;
    return found;
  }

 private:
  static constexpr int kIndexShift = 2;  // an entry takes 4 bytes

  Streams streams_;
  int width_;
  std::uint32_t table_, mask_;
  int bit_;
};

KVPLAN_DEVICE bool is_trellis(const RunEntry& run) { return run.kind % kHalfKinds > kTrellisKinds; }

// sums += keys . queries over a run; rows of the tiles as trellis_row() says.
KVPLAN_DEVICE void score_trellis(HalfSums& sums, const RunEntry& run, std::uint32_t at,
                                 const uint2* query) {
  const bool half_tile = run.kind >= kHalfKinds;
  const int g = lane() >> 2, t = lane() & 3;
  TrellisReader reader(run, at, (half_tile ? 2 : 4) * t);
#pragma unroll 1
  for (int j = 0; j < run.tiles; ++j, reader.advance()) {
    const uint2 q = query[j * kLanes + lane()];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      std::uint32_t windows[4];  // [step of the pair][row block]
      reader.windows(windows, 32 * pair + 4 * g);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        std::uint32_t a[4] = {};
#pragma unroll
        for (int row_block = 0; row_block < 2; ++row_block) {
          std::uint32_t& window = windows[2 * step + row_block];
          a[row_block] = reader.pair(window);
          if (!half_tile) a[2 + row_block] = reader.pair(window);
        }
        mma(sums[2 * pair + step], a, q.x, q.y);
      }
    }
  }
}

// outputs += (values . weights) * unit over a run.
template <int Blocks>
KVPLAN_DEVICE void add_trellis_values(Output<Blocks>* output, const RunEntry& run, std::uint32_t at,
                                      const HalfWeights& p, const float (&unit)[Blocks]) {
  const bool half_tile = run.kind >= kHalfKinds;
  const int g = lane() >> 2, t = lane() & 3;
  TrellisReader reader(run, at, (half_tile ? 1 : 2) * g);
#pragma unroll 1
  for (int j = 0; j < run.tiles; ++j, reader.advance()) {
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      std::uint32_t windows[4];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9
      reader.windows(windows, 16 * i + 4 * t);
      std::uint32_t found[4];  // rows g and g + 8
#pragma unroll
      for (int k = 0; k < 4; ++k) found[k] = reader.pair(windows[k]);
      std::uint32_t a[4] = {permute(found[0], found[1], 0x5410), 0,
                            permute(found[2], found[3], 0x5410), 0};
      if (!half_tile)
        a[1] = permute(found[0], found[1], 0x7632), a[3] = permute(found[2], found[3], 0x7632);
      mma(i % 2 == 0 ? even : odd, a, p[i][0], p[i][1]);
    }
    add_output(output[j * kLanes + lane()], even, odd, unit);
  }
}

}  // namespace kvplan::kernels
