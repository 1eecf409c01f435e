#pragma once
// From the coordinates of a page in shared memory to codes, norms and tiles: what
// quant::TransformCodec and quant::to_page do. Private to append.

#include <cmath>

#include "kernels/log_norm.cuh"
#include "kernels/page_workspace.cuh"
#include "quant/transform_codec.h"

namespace kvplan::kernels {

inline constexpr double kMinScale = 0.5, kMaxScale = 4, kSmallestNorm = 1e-30, kHalfMax = 65504;
inline constexpr float kOutlierMax = 127;

/// The parts of a token's sum.
KVPLAN_DEVICE double total(const double (*sum)[kPageTokens], int token) {
  double all = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) all += sum[part][token];
  return all;
}

KVPLAN_DEVICE double scale_of(int scale_rule, double yy, double yc, double cc) {
  const auto rule = static_cast<quant::ScaleRule>(scale_rule);
  if (rule == quant::ScaleRule::kOne || !(yy > 0)) return 1;
  const double top = rule == quant::ScaleRule::kBiased ? yc : yy;
  const double bottom = rule == quant::ScaleRule::kUnbiased ? yc : cc;
  if (!(bottom > 0)) return kMaxScale;
  const double ratio = top / bottom;
  const double scale = rule == quant::ScaleRule::kNormCorrected ? std::sqrt(ratio) : ratio;
  return scale < kMinScale ? kMinScale : scale > kMaxScale ? kMaxScale : scale;
}

/// How many of the ascending boundaries are below each u.
template <int Width>
KVPLAN_DEVICE void nearest_levels(const float* boundaries, const float (&u)[kParts],
                                  int (&codes)[kParts]) {
#pragma unroll
  for (int& code : codes) code = 0;
#pragma unroll
  for (int step = 1 << (Width - 1); step > 0; step >>= 1)
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      if (u[k] > boundaries[codes[k] + step - 1]) codes[k] += step;
}

/// The same for uniform levels of 8 bits: the number of steps is right or next to it.
KVPLAN_DEVICE void nearest_uniform_levels(const float* boundaries, float steps,
                                          const float (&u)[kParts], int (&codes)[kParts]) {
#pragma unroll
  for (int k = 0; k < kParts; ++k) {
    const int near = static_cast<int>(std::fmin(std::fmax(u[k] * steps + 128, 1.0f), 254.0f));
    codes[k] = near - 1 + (u[k] > boundaries[near - 1] ? 1 : 0) + (u[k] > boundaries[near] ? 1 : 0);
  }
}

KVPLAN_DEVICE void find_codes(const quant::TileRun& run, const float* boundaries, float steps,
                              const float (&u)[kParts], int (&codes)[kParts]) {
  switch (run.width) {
    case 1:
      return nearest_levels<1>(boundaries, u, codes);
    case 2:
      return nearest_levels<2>(boundaries, u, codes);
    case 3:
      return nearest_levels<3>(boundaries, u, codes);
    case 4:
      return nearest_levels<4>(boundaries, u, codes);
    case 5:
      return nearest_levels<5>(boundaries, u, codes);
    case 6:
      return nearest_levels<6>(boundaries, u, codes);
    case 7:
      return nearest_levels<7>(boundaries, u, codes);
    default:
      if (run.code == quant::TileCode::kBytes)
        return nearest_uniform_levels(boundaries, steps, u, codes);
      return nearest_levels<8>(boundaries, u, codes);
  }
}

/// Codes of a token's coordinates part, part + kParts, .. and its sums.
KVPLAN_DEVICE void quantise_part(const Workspace& w, int runs, int side, int token, int part,
                                 float inverse_norm) {
  double yy = 0, yc = 0, cc = 0;
  for (int r = 0; r < runs; ++r) {
    const quant::TileRun run = w.runs[r];
    const bool half_tile = run.half != 0;
    const int count = quant::tile_coordinates(half_tile) / kParts;
    const float *levels = w.levels + (1 << run.width),
                *boundaries = w.boundaries + (1 << run.width);
    const float steps = reciprocal_fast(run.step);
    const float* y = w.x + (run.coordinate + part) * kStride + token;
    const double* weight = w.weight + run.coordinate + part;
    std::byte* codes = w.codes + codes_offset(run.coordinate) + token_byte(side, half_tile, token);
    for (int tile = 0; tile < run.tiles; ++tile) {
      float u[kParts];
      int found[kParts];
#pragma unroll
      for (int k = 0; k < kParts; ++k)
        u[k] = k < count ? y[kParts * k * kStride] * inverse_norm : 0;
      find_codes(run, boundaries, steps, u, found);
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (k >= count) break;
        const double value = u[k], level = levels[found[k]], weighed = weight[kParts * k];
        yy += weighed * value * value;
        yc += weighed * value * level;
        cc += weighed * level * level;
        codes[coordinate_byte(side, kParts * k + part)] = static_cast<std::byte>(found[k]);
      }
      y += quant::kTileCoordinates * kStride;
      weight += quant::kTileCoordinates;
      codes += codes_offset(quant::kTileCoordinates);
    }
  }
  w.sums[1][part][token] = yy;
  w.sums[2][part][token] = yc;
  w.sums[3][part][token] = cc;
}

KVPLAN_DEVICE void store_norm(const quant::SideLayout& layout, std::byte* page, int token,
                              double norm) {
  std::byte* const to = page + layout.norm_offset +
                        quant::token_index(token) * static_cast<std::size_t>(layout.norm_bytes);
  if (layout.norm_bytes == 1)
    *reinterpret_cast<std::int8_t*>(to) = static_cast<std::int8_t>(log8_of(norm));
  else
    *reinterpret_cast<std::uint16_t*>(to) =
        to_half(static_cast<float>(norm < kHalfMax ? norm : kHalfMax));
}

/// Codes of the outliers, rows of x from `first` on; scales go to the page.
KVPLAN_DEVICE void quantise_outliers(const quant::SideLayout& layout, const Workspace& w, int side,
                                     int first, std::byte* page) {
  const int token = thread();
  if (token >= kPageTokens) return;
  float largest = 0;
  for (int i = 0; i < layout.outliers; ++i)
    largest = std::fmax(largest, std::fabs(w.x[(first + i) * kStride + token]));
  const std::uint16_t half = to_half(largest / kOutlierMax);
  reinterpret_cast<std::uint16_t*>(page + layout.scale_offset)[quant::token_index(token)] = half;
  const float scale = from_half(half);
  for (int i = 0; i < layout.outliers; ++i) {
    const int coordinate = i % quant::kTileCoordinates, tile = i - coordinate;
    const bool half_tile = tile + quant::kTileCoordinates > layout.outliers;
    const float x = w.x[(first + i) * kStride + token];
    const float code = scale > 0 ? std::floor(x / scale + 0.5f) : 0;
    const float stored = std::fmin(std::fmax(code, -kOutlierMax), kOutlierMax) + (kOutlierMax + 1);
    w.codes[codes_offset(layout.coded + tile) + token_byte(side, half_tile, token) +
            coordinate_byte(side, coordinate)] = static_cast<std::byte>(stored);
  }
}

/// How many runs are no part of a trellis.
template <bool Trellis>
KVPLAN_DEVICE int scalar_runs(const quant::SideLayout& layout, const Workspace& w) {
  int runs = layout.run_count;
  if constexpr (Trellis)
    while (runs > 0 && w.runs[runs - 1].code == quant::TileCode::kTrellis) --runs;
  return runs;
}

/// The root mean square of a token's coordinates.
KVPLAN_DEVICE double norm_of(const EncoderView& encoder, const Workspace& w, int token) {
  return encoder.coded == 0 ? 0 : std::sqrt(total(w.sums[0], token) / encoder.coded);
}
KVPLAN_DEVICE float inverse_of(double norm) {
  return norm > kSmallestNorm ? static_cast<float>(1 / norm) : 0;
}

/// Streams of the page's tokens, where their scalar codes would be, and their part of the sums. A
/// warp takes one token at a time.
KVPLAN_DEVICE void encode_streams(const LayerView& layer, const quant::SideLayout& layout,
                                  const EncoderView& encoder, const Workspace& w, int side) {
  const int first = scalar_runs<true>(layout, w);
  if (first == layout.run_count) return;
  const TrellisRuns trellis{w.runs + first, layout.run_count - first, layer.levels};
  const TrellisScratch scratch(w.scratch + warp() * TrellisScratch::bytes(layer.head_dim),
                               layer.head_dim);
  const int begin = trellis.runs[0].coordinate;
  TrellisEncoder nearest(trellis, w.error_weight + begin, scratch);
  std::byte* const streams = w.codes + codes_offset(begin);
  for (int token = warp(); token < kPageTokens; token += threads() / quant::kWarpLanes) {
    const float inverse = inverse_of(norm_of(encoder, w, token));
    const float* const y = w.x + begin * kStride + token;
    nearest.encode(y, kStride, inverse);
    double sums[3] = {};
    for (int r = 0; r < trellis.count; ++r) {
      const float* const values = trellis.values(trellis.runs[r]);
      for (int i = trellis.begin(r) + lane(); i < trellis.end(r); i += quant::kWarpLanes) {
        const double value = y[i * kStride] * inverse, level = values[scratch.states[i]];
        const double weight = w.weight[begin + i];
        sums[0] += weight * value * value;
        sums[1] += weight * value * level;
        sums[2] += weight * level * level;
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      for (int step = 1; step < quant::kWarpLanes; step *= 2) sums[k] += shuffle_xor(sums[k], step);
      if (lane() == 0) w.sums[1 + k][0][token] += sums[k];
    }
    for (int b = lane(); b < layout.stream_bytes; b += quant::kWarpLanes)
      streams[quant::stream_byte(side == kKeys ? Side::kKey : Side::kValue, layout.stream_bytes,
                                 token, b)] =
          static_cast<std::byte>(stream_byte_of(trellis, scratch.states, b));
    sync_warp();
  }
}

/// Coordinates become codes; norms and scales of outliers go to the page. Thread `token` + 64 i
/// works on a token.
template <bool Trellis>
KVPLAN_DEVICE void quantise(const LayerView& layer, const quant::SideLayout& layout,
                            const EncoderView& encoder, const Workspace& w, int side,
                            std::byte* page) {
  const int token = thread() % kPageTokens, first = thread() / kPageTokens;
  const int step = threads() / kPageTokens;
  for (int part = first; part < kParts; part += step) {
    double squares = 0;
#pragma unroll 8
    for (int i = part; i < encoder.coded; i += kParts) {
      const double y = w.x[i * kStride + token];
      squares += y * y;
    }
    w.sums[0][part][token] = squares;
  }
  sync_block();
  const double norm = norm_of(encoder, w, token);
  const float inverse = inverse_of(norm);
  for (int part = first; part < kParts; part += step)
    quantise_part(w, scalar_runs<Trellis>(layout, w), side, token, part, inverse);
  if (layout.outliers > 0) quantise_outliers(layout, w, side, encoder.transformed, page);
  sync_block();
  if constexpr (Trellis) {
    encode_streams(layer, layout, encoder, w, side);
    sync_block();
  }
  if (first == 0)
    store_norm(layout, page, token,
               norm * scale_of(layer.scale_rule, total(w.sums[1], token), total(w.sums[2], token),
                               total(w.sums[3], token)));
}

/// Tiles from codes, by one warp each; streams.
template <bool Trellis>
KVPLAN_DEVICE void store_tiles(const quant::SideLayout& layout, const Workspace& w,
                               std::byte* page) {
  int tile = warp();
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun run = w.runs[r];
    if (Trellis && run.code == quant::TileCode::kTrellis) continue;
    const std::byte* const codes =
        w.codes + codes_offset(run.coordinate + (r < layout.run_count ? 0 : layout.coded));
    for (; tile < run.tiles; tile += threads() / quant::kWarpLanes) {
      std::byte* const to = page + run.offset + tile * quant::tile_bytes(run.width, run.half != 0);
      if (run.half != 0)
        store_tile<true>(run.code, run.width, codes, to);
      else
        store_tile<false>(run.code, run.width, codes + tile * codes_offset(quant::kTileCoordinates),
                          to);
    }
    tile -= run.tiles;
  }
  if constexpr (Trellis) {
    if (layout.stream_bytes == 0) return;
    const int begin = w.runs[scalar_runs<true>(layout, w)].coordinate;
    const auto* const from = reinterpret_cast<const uint4*>(w.codes + codes_offset(begin));
    auto* const to = reinterpret_cast<uint4*>(page + layout.stream_offset);
    const int count = kPageTokens * layout.stream_bytes / static_cast<int>(sizeof *to);
    for (int i = thread(); i < count; i += threads()) to[i] = from[i];
  }
}

/// What packing reads of the plan.
template <bool Trellis>
KVPLAN_DEVICE void load_tables(const LayerView& layer, const quant::SideLayout& layout,
                               const EncoderView& encoder, const Workspace& w) {
  for (int i = thread(); i < layer.head_dim; i += threads()) {
    const int channel =
        i < encoder.transformed ? encoder.channels[i] : encoder.outliers[i - encoder.transformed];
    w.place[channel] = static_cast<std::uint16_t>(i);
    if (i >= encoder.coded) continue;
    w.weight[i] = encoder.weight[i];
    if constexpr (Trellis)
      w.error_weight[i] =
          encoder.heaviest > 0 ? static_cast<float>(encoder.weight[i] / encoder.heaviest) : 1;
  }
  if (thread() < quant::kMaxTileRuns) w.runs[thread()] = layout.runs[thread()];
  for (int r = 0; r < layout.run_count; ++r) {
    if (Trellis && layout.runs[r].code == quant::TileCode::kTrellis) break;
    const int table = layout.runs[r].table, count = 1 << layout.runs[r].width;
    for (int i = thread(); i < count; i += threads()) {
      w.levels[count + i] = layer.levels[table * 256 + i];
      if (i < count - 1) w.boundaries[count + i] = layer.boundaries[table * 255 + i];
    }
  }
}

}  // namespace kvplan::kernels
