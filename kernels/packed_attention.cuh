#pragma once
// Attention of one segment over packed pages of any runs of tiles. Private to the decode kernels.

#include <type_traits>

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/trellis_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// Sums of products of bytes: [columns' block][16 tokens][row g (high, low digit of column t), row g
// + 8].
template <int Blocks>
using ByteSums = int[Blocks][kRows][4];

// sums += keys . queries over the tiles of a run of bytes at `at`.
template <int Blocks, class Tile>
KVPLAN_DEVICE void score_bytes(ByteSums<Blocks>& sums, const Tile& tile, std::uint32_t at,
                               std::uint32_t bytes, int tiles, const uint2* query) {
  constexpr int kRegisters = Tile::kHalfTile ? 4 : 8;
  std::uint32_t a[kRegisters];
  const auto load = [&](std::uint32_t(&to)[kRegisters], std::uint32_t from) {
    std::uint32_t w[Tile::kWords];
    tile.load(w, from);
    tile.registers(w, to);
  };
  if constexpr (Tile::kHalfTile) {
    const uint2 q = query[lane()];
    load(a, at);
    // The bytes of coordinates that are not there meet zeros.
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int e = 0; e < Blocks; ++e) mma_bytes(sums[e][i], a[i], a[i] >> 8, e == 0 ? q.x : q.y);
  } else {
    int j = 0;
#pragma unroll 1
    for (; j + 1 < tiles; j += 2) {
      const uint2 q = query[lane()], next_q = query[kLanes + lane()];
      std::uint32_t next[kRegisters];
      load(a, at);
      load(next, at + bytes);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int e = 0; e < Blocks; ++e)
          mma_bytes(sums[e][i], a[2 * i], a[2 * i + 1], next[2 * i], next[2 * i + 1],
                    e == 0 ? q.x : q.y, e == 0 ? next_q.x : next_q.y);
      at += 2 * bytes;
      query += 2 * kLanes;
    }
    if (j == tiles) return;
    const uint2 q = query[lane()];
    load(a, at);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int e = 0; e < Blocks; ++e)
        mma_bytes(sums[e][i], a[2 * i], a[2 * i + 1], e == 0 ? q.x : q.y);
  }
}

// outputs += (values . weights) * unit over the tiles of a run of bytes at `at`.
template <int Blocks, class Tile>
KVPLAN_DEVICE void add_byte_values(Output<Blocks>* output, const Tile& tile, std::uint32_t at,
                                   std::uint32_t bytes, int tiles, const ByteWeights<Blocks>& p,
                                   const float (&unit)[Blocks]) {
#pragma unroll 1
  for (int j = 0; j < tiles; ++j) {
    Output<Blocks> o = *output;
    int sums[Blocks][4];
    std::uint32_t w[Tile::kWords];
    tile.load(w, at);
    if constexpr (Tile::kHalfTile) {
      std::uint32_t a[4];
      tile.registers(w, a);
#pragma unroll
      for (int e = 0; e < Blocks; ++e) {
        multiply_unsigned(sums[e], a[0], 0, a[1], 0, p[0][e], p[1][e]);
        mma_unsigned(sums[e], a[2], 0, a[3], 0, p[2][e], p[3][e]);
      }
    } else {
      std::uint32_t a[8];
      tile.registers(w, a);
#pragma unroll
      for (int e = 0; e < Blocks; ++e) {
        multiply_unsigned(sums[e], a[0], a[1], a[2], a[3], p[0][e], p[1][e]);
        mma_unsigned(sums[e], a[4], a[5], a[6], a[7], p[2][e], p[3][e]);
      }
    }
#pragma unroll
    for (int e = 0; e < Blocks; ++e)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        o.x[2 * e + h] = fused(digits(sums[e][2 * h], sums[e][2 * h + 1]), unit[e], o.x[2 * e + h]);
      }
    *output = o;
    output += kLanes;
    at += bytes;
  }
}

// sums += keys . queries over a run of other tiles.
KVPLAN_DEVICE void score_halves(HalfSums& sums, const RunEntry& run, std::uint32_t at,
                                const uint2* query) {
  with_tile(run.kind, (std::uint32_t{run.table} << kEntryShift) + 4 * lane(),
            [&](const auto& tile) {
              constexpr int kWords = std::remove_reference_t<decltype(tile)>::kWords;
#pragma unroll 1
              for (int j = 0; j < run.tiles; ++j) {
                const uint2 q = query[j * kLanes + lane()];
                std::uint32_t w[kWords];
                tile.load(w, at + j * run.bytes);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                  std::uint32_t a[4];
                  tile.template operand<false>(w, i, a);
                  mma(sums[i], a, q.x, q.y);
                }
              }
            });
}

// outputs += (values . weights) * unit over a run of other tiles.
template <int Blocks>
KVPLAN_DEVICE void add_half_values(Output<Blocks>* output, const RunEntry& run, std::uint32_t at,
                                   const HalfWeights& p, const float (&unit)[Blocks]) {
  with_tile(run.kind, (std::uint32_t{run.table} << kEntryShift) + 4 * lane(),
            [&](const auto& tile) {
              constexpr int kWords = std::remove_reference_t<decltype(tile)>::kWords;
#pragma unroll 1
              for (int j = 0; j < run.tiles; ++j) {
                float even[4] = {}, odd[4] = {};
                std::uint32_t w[kWords];
                tile.load(w, at + j * run.bytes);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                  std::uint32_t a[4];
                  tile.template operand<true>(w, i, a);
                  mma(i % 2 == 0 ? even : odd, a, p[i][0], p[i][1]);
                }
                add_output(output[j * kLanes + lane()], even, odd, unit);
              }
            });
}

// A run whose products are in fp16.
template <LayerCodes Codes>
KVPLAN_DEVICE void score_fp16(HalfSums& sums, const RunEntry& run, std::uint32_t at,
                              const uint2* query) {
  if constexpr (has_trellis(Codes))
    if (!has_direct(Codes) || is_trellis(run)) return score_trellis(sums, run, at, query);
  if constexpr (has_direct(Codes)) score_halves(sums, run, at, query);
}
template <int Blocks, LayerCodes Codes>
KVPLAN_DEVICE void add_fp16_values(Output<Blocks>* output, const RunEntry& run, std::uint32_t at,
                                   const HalfWeights& p, const float (&unit)[Blocks]) {
  if constexpr (has_trellis(Codes))
    if (!has_direct(Codes) || is_trellis(run))
      return add_trellis_values<Blocks>(output, run, at, p, unit);
  if constexpr (has_direct(Codes)) add_half_values<Blocks>(output, run, at, p, unit);
}

KVPLAN_DEVICE bool is_bytes(const RunEntry& run) { return run.kind % kHalfKinds < kOtherKinds; }

template <class Visit>
KVPLAN_DEVICE void with_bytes(const RunEntry& run, Visit visit) {
  with_byte_tile(run, run.kind >= kHalfKinds, run.kind % kOtherKinds, visit);
}

// Scores from runs of tiles of keys, without norms. `at` moves behind those that are stored as
// tiles.
template <int Blocks, LayerCodes Codes>
KVPLAN_DEVICE void score_runs(Scores<Blocks>& s, const Work<Blocks>& work, int first, int end,
                              std::uint32_t& at, const uint2* query, bool with_bias) {
  ByteSums<Blocks> sums = {};
  HalfSums halves = {};
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const RunEntry& run = work.runs[i];
    if (Codes == LayerCodes::kBytes || is_bytes(run))
      with_bytes(run, [&](const auto& tile) {
        score_bytes<Blocks>(sums, tile, at, run.bytes, run.tiles, query);
      });
    else
      score_fp16<Codes>(halves, run, at, query);
    at += std::uint32_t{run.bytes} * run.tiles;
    query += run.tiles * kLanes;
  }
  for_scores<Blocks>([&](int i, int h, int e) {
    const float other =
        (with_bias ? work.bias[e] : 0) + (Codes == LayerCodes::kBytes ? 0 : halves[i][2 * h + e]);
    s[i][h][e] = fused(digits(sums[e][i][2 * h], sums[e][i][2 * h + 1]), work.unit[e], other);
  });
}

// Outputs of runs of tiles; w: weights of the tokens.
template <int Blocks, LayerCodes Codes>
KVPLAN_DEVICE void value_runs(Output<Blocks>* output, const Work<Blocks>& work, int first, int end,
                              std::uint32_t& at, Scores<Blocks>& w) {
  float factor[Blocks], unit[Blocks], half_unit[Blocks];
  measure_weights<Blocks>(w, kTopByteWeight, factor, unit);
  ByteWeights<Blocks> p;
  make_byte_weights<Blocks>(p, w, factor);
  HalfWeights halves;
  if constexpr (Codes != LayerCodes::kBytes) {
    for_scores<Blocks>(
        [&](int i, int h, int e) { w[i][h][e] *= factor[e] * (1 / kTopByteWeight); });
#pragma unroll
    for (int e = 0; e < Blocks; ++e) half_unit[e] = unit[e] * kTopByteWeight;
    make_half_weights<Blocks>(halves, w);
  }
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const RunEntry& run = work.runs[i];
    if (Codes == LayerCodes::kBytes || is_bytes(run))
      with_bytes(run, [&](const auto& tile) {
        add_byte_values<Blocks>(output + lane(), tile, at, run.bytes, run.tiles, p, unit);
      });
    else
      add_fp16_values<Blocks, Codes>(output, run, at, halves, half_unit);
    at += std::uint32_t{run.bytes} * run.tiles;
    output += run.tiles * kLanes;
  }
}

// The feed's next page; `page`: its index in the sequence.
template <int Blocks, LayerCodes Codes>
KVPLAN_DEVICE void attend_page(const AttentionView& v, const Work<Blocks>& work, PageFeed& feed,
                               Running<Blocks>& r, int page) {
  Scores<Blocks> s, outlier_scores = {};
  std::uint32_t at = feed.wait_keys();
  score_runs<Blocks, Codes>(s, work, 0, work.key_runs, at, work.query, true);
  const int values = work.key_runs + work.key_outlier_runs;
  if constexpr (has_direct(Codes)) {
    // Outlier channels have a scale of their own per token, so sums of their own.
    if (work.key_outlier_runs > 0)
      score_runs<Blocks, Codes>(outlier_scores, work, work.key_runs, values, at,
                                work.query + work.key_tiles * kLanes, false);
  }
  const bool centred = v.layer.phase_steps > 0;
  if (!centred) feed.done_keys();
  at = feed.wait_rest();
  const std::uint32_t half = at;
  float norms[8];
  load_norms(norms, half + work.key_norms, work.norm_bytes[0]);
  const int first = v.layer.sink_tokens + quant::kPageTokens * page;
  const bool whole = first + quant::kPageTokens - 1 <= work.first_query && first >= work.lowest;
  const bool plain =
      !has_direct(Codes) && r.started && whole && !v.layer.k_mean && !(v.soft_cap > 0);
  if (plain) {
    for_scores<Blocks>(
        [&](int i, int h, int e) { s[i][h][e] = fused(s[i][h][e], norms[2 * i + h], -r.m[e]); });
  } else {
    for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] *= norms[2 * i + h]; });
    if constexpr (has_direct(Codes)) {
      if (work.key_outlier_runs > 0) {
        load_norms(norms, half + work.key_scales, 2);
        for_scores<Blocks>([&](int i, int h, int e) {
          s[i][h][e] = fused(outlier_scores[i][h][e], norms[2 * i + h], s[i][h][e]);
        });
      }
    }
    if (v.layer.k_mean) {
      if (centred) {
        add_centre<Blocks>(s, v, work, feed.phases());
        feed.done_keys();
      }
      for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] += work.constant[e]; });
    }
    if (v.soft_cap > 0) [[unlikely]]
      cap<Blocks>(s, v.soft_cap);
    if (!whole) [[unlikely]]
      mask<Blocks>(s, v, work, first);
  }
  const int tiles = work.value_tiles + (has_direct(Codes) ? work.value_outlier_tiles : 0);
  follow_maximum<Blocks>(r, s, plain, [&](const float(&factor)[Blocks]) {
    scale_output<Blocks>(work, tiles, factor);
  });
  exponentiate<Blocks>(s, r);

  load_norms(norms, half + work.value_norms, work.norm_bytes[1]);
  Scores<Blocks> w;
  for_scores<Blocks>([&](int i, int h, int e) {
    w[i][h][e] = s[i][h][e] * norms[2 * i + h];
    r.norms[e] += w[i][h][e];
  });
  const int outlier_values = values + work.value_runs;
  value_runs<Blocks, Codes>(work.output, work, values, outlier_values, at, w);
  if constexpr (has_direct(Codes)) {
    if (work.value_outlier_runs > 0) {
      load_norms(norms, half + work.value_scales, 2);
      for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] *= norms[2 * i + h]; });
      value_runs<Blocks, Codes>(work.output + work.value_tiles * kLanes, work, outlier_values,
                                outlier_values + work.value_outlier_runs, at, s);
    }
  }
  feed.done_rest();
}

// Any runs of tiles: the list of runs in shared memory says of which.
template <int Blocks, LayerCodes Codes>
struct RunsPath {
  static constexpr int kBlocks = Blocks, kWarps = kDecodeWarps;
  using Feed = PageFeed;
  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<Blocks>& work, Feed& feed,
                                   Running<Blocks>& r, int first, int count) {
    clear_output(work, work.value_tiles + work.value_outlier_tiles);
#pragma unroll 1
    for (int page = first; page < first + count; ++page)
      attend_page<Blocks, Codes>(v, work, feed, r, page);
  }
};

}  // namespace kvplan::kernels
