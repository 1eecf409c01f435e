// New tokens into the cache: rows of sinks and of the open page, and pages that fill, packed. Does
// what quant::Codec::encode and quant::to_page do, with float sums in the same order.

#include <algorithm>
#include <cmath>

#include "kernels/log_norm.cuh"
#include "kernels/page_access.cuh"
#include "kernels/page_words.cuh"
#include "kernels/ptx.cuh"
#include "kernels/trellis_encoder.cuh"
#include "kernels/views.h"
#include "quant/page_layout.h"
#include "quant/transform_codec.h"

namespace kvplan::kernels {
namespace {

using quant::kPageTokens;

constexpr int kMaxThreads = 256;          // of a block: one for each coordinate
constexpr int kParts = 4;                 // of the sums of a token over its coordinates
constexpr int kStride = kPageTokens + 4;  // of a row of shared memory, in floats
constexpr int kTurns = 2;                 // threads that share the turned mean of a pair
constexpr int kOctet = 8;                 // channels of a 16-byte load
constexpr int kChunk = 8;                 // columns of the analysis matrix that are copied together
constexpr int kChunks = 3;                // in shared memory
constexpr int kMostBlocks = 512;          // before a block takes more than one head
constexpr double kMinScale = 0.5, kMaxScale = 4, kSmallestNorm = 1e-30, kHalfMax = 65504;
constexpr float kOutlierMax = 127;

int threads_of(int head_dim) { return head_dim <= kMaxThreads / 2 ? kMaxThreads / 2 : kMaxThreads; }

/// Of a block, in shared memory.
struct Workspace {
  float* x;          // [head_dim][kStride] channels in the order of the transform, then outliers;
                     // after it coordinates, then outliers
  float* analysis;   // [kChunks][kChunk][coded], where codes and sums are later
  std::byte* codes;  // codes_offset(head_dim): of the coordinates, then of outliers
  double (*sums)[kParts][kPageTokens];  // [4] y^2, weighted y^2, y c, c^2
  double* weight;                       // [coded]
  float *levels, *boundaries;           // those of width b from index 2^b on
  quant::TileRun* runs;                 // as SideLayout::runs
  std::uint16_t* place;                 // [head_dim] row of x of a channel
  // Where a head of the layer has a trellis:
  float* error_weight;  // [coded] of its squared errors
  std::byte* scratch;   // of the warps: TrellisScratch

  static constexpr std::size_t kSumsBytes = 4 * kParts * kPageTokens * sizeof(double);
  static constexpr std::size_t kLevels = 512;

  KVPLAN_DEVICE explicit Workspace(int head_dim) {
    std::byte* const memory = shared_memory();
    x = reinterpret_cast<float*>(memory);
    codes = reinterpret_cast<std::byte*>(x + head_dim * kStride);
    analysis = reinterpret_cast<float*>(codes);
    sums = reinterpret_cast<double(*)[kParts][kPageTokens]>(codes + codes_offset(head_dim));
    weight = reinterpret_cast<double*>(sums + 4);
    levels = reinterpret_cast<float*>(weight + head_dim);
    boundaries = levels + kLevels;
    runs = reinterpret_cast<quant::TileRun*>(boundaries + kLevels);
    place = reinterpret_cast<std::uint16_t*>(runs + quant::kMaxTileRuns);
    scratch = memory + (bytes(head_dim) + 15) / 16 * 16;
    error_weight = reinterpret_cast<float*>(scratch);
    scratch += (head_dim * sizeof(float) + 15) / 16 * 16;
  }
  /// 57,264 with 128 channels: 4 blocks of a multiprocessor.
  static constexpr std::size_t bytes(int head_dim) {
    const auto d = static_cast<std::size_t>(head_dim);
    return d * (kStride * sizeof(float) + sizeof(double) + sizeof(std::uint16_t)) +
           static_cast<std::size_t>(codes_offset(head_dim)) + kSumsBytes +
           2 * kLevels * sizeof(float) + quant::kMaxTileRuns * sizeof(quant::TileRun);
  }
  /// Where a head of the layer has a trellis.
  static std::size_t bytes_with_trellis(int head_dim, int block_threads) {
    const auto d = static_cast<std::size_t>(head_dim);
    return (bytes(head_dim) + 15) / 16 * 16 + (d * sizeof(float) + 15) / 16 * 16 +
           static_cast<std::size_t>(block_threads / quant::kWarpLanes *
                                    TrellisScratch::bytes(head_dim));
  }
};
static_assert(kChunks * kChunk * kMaxThreads * sizeof(float) <=
              codes_offset(kMaxThreads) + Workspace::kSumsBytes);

/// A sequence of the step.
struct Sequence {
  int slot, before, length, first_row;

  KVPLAN_DEVICE Sequence(const BatchView& batch, int i)
      : slot(batch.slot[i]),
        before(batch.length_before[i]),
        length(batch.length[i]),
        first_row(batch.first_row[i]) {}
};

/// One side of one KV head of a sequence. `index`: first the keys of all heads.
struct Job {
  int slot, side, head, before;
  int first_row, row_stride;
  const std::uint16_t* rows;  // of the head

  KVPLAN_DEVICE Job(const AppendView& v, const Sequence& sequence, int index)
      : slot(sequence.slot),
        side(index < v.layer.kv_heads ? kKeys : kValues),
        head(side == kKeys ? index : index - v.layer.kv_heads),
        before(sequence.before),
        first_row(sequence.first_row),
        row_stride(v.layer.kv_heads * v.layer.head_dim),
        rows((side == kKeys ? v.k : v.v) + head * v.layer.head_dim) {}
  KVPLAN_DEVICE const std::uint16_t* new_row(int position) const {
    return rows + std::int64_t{first_row + position - before} * row_stride;
  }
  KVPLAN_DEVICE const std::uint16_t* row(const LayerView& layer, int position) const {
    return position < before ? plain_row(layer, slot, side, head, position) : new_row(position);
  }
};

/// The block's jobs: `share` of a sequence's, fewer in the last group.
struct Jobs {
  int first, count;

  KVPLAN_DEVICE Jobs(const AppendView& v, int share) : first(block_y() * share) {
    const int left = 2 * v.layer.kv_heads - first;
    count = left < share ? left : share;
  }
};

/// Rows of new tokens: sinks, and from position `open` on. A warp takes one at a time.
KVPLAN_DEVICE void store_rows(const AppendView& v, const Sequence& sequence, const Jobs& jobs,
                              int open) {
  const auto above = [](int x, int y) { return x > y ? x - y : 0; };
  const int octets = v.layer.head_dim / kOctet, warps = threads() / quant::kWarpLanes;
  const int before = sequence.before, length = sequence.length, sinks = v.layer.sink_tokens;
  const int sink_rows = above(length < sinks ? length : sinks, before);
  const int skipped = above(open, before + sink_rows);  // packed
  const int rows = sink_rows + above(length, before + sink_rows + skipped);
  int row = warp();
  for (int i = 0; i < jobs.count; ++i, row -= rows)
    for (; row < rows; row += warps) {
      const Job job(v, sequence, jobs.first + i);
      const int position = before + row + (row < sink_rows ? 0 : skipped);
      if (lane() < octets)
        reinterpret_cast<uint4*>(
            plain_row(v.layer, job.slot, job.side, job.head, position))[lane()] =
            reinterpret_cast<const uint4*>(job.new_row(position))[lane()];
    }
}

/// What the channels of the transform are multiplied with ahead of it.
KVPLAN_DEVICE float scaled(const EncoderView& encoder, int row, float x) {
  return encoder.magnitude > 0 && row < encoder.transformed ? x * encoder.magnitude : x;
}

/// x = the page's rows by channel, without their mean (null: none) from channel `turned` on.
KVPLAN_DEVICE void load_page(const LayerView& layer, const Job& job, const EncoderView& encoder,
                             const Workspace& w, int first_position, const float* mean,
                             int turned) {
#pragma unroll 4
  for (int i = thread(); i < kPageTokens * layer.head_dim / kOctet; i += threads()) {
    const int token = i % kPageTokens, octet = i / kPageTokens;
    const uint4 halves =
        reinterpret_cast<const uint4*>(job.row(layer, first_position + token))[octet];
    const std::uint32_t pairs[kOctet / 2] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
    for (int k = 0; k < kOctet; ++k) {
      const int channel = kOctet * octet + k, row = w.place[channel];
      float x = k % 2 == 0 ? low_half(pairs[k / 2]) : high_half(pairs[k / 2]);
      if (mean != nullptr && channel >= turned) x -= mean[channel];
      w.x[row * kStride + token] = channel < turned ? x : scaled(encoder, row, x);
    }
  }
}

/// x -= R_t mean for the rotary pairs. Threads of a pair take its positions in turn.
KVPLAN_DEVICE void subtract_turned_mean(const LayerView& layer, const EncoderView& encoder,
                                        const Workspace& w, const float* mean, int first_position) {
  for (int i = thread(); i < layer.pairs * kTurns; i += threads()) {
    const int pair = i / kTurns, first = i % kTurns;
    const int a = pair * layer.pair_stride, b = a + layer.pair_distance;
    const double mean_a = mean[a], mean_b = mean[b], frequency = layer.inv_freq[pair];
    double c, s, step_c, step_s;
    sincos((first_position + first) * frequency, &s, &c);
    sincos(kTurns * frequency, &step_s, &step_c);
    const int row_a = w.place[a], row_b = w.place[b];
    for (int t = first; t < kPageTokens; t += kTurns) {
      float &x_a = w.x[row_a * kStride + t], &x_b = w.x[row_b * kStride + t];
      x_a = scaled(encoder, row_a, x_a - static_cast<float>(mean_a * c - mean_b * s));
      x_b = scaled(encoder, row_b, x_b - static_cast<float>(mean_b * c + mean_a * s));
      const double next_c = c * step_c - s * step_s;
      s = s * step_c + c * step_s;
      c = next_c;
    }
  }
}

/// Starts the copy of columns kChunk * chunk .. of the analysis matrix. By all threads.
KVPLAN_DEVICE void copy_chunk(const EncoderView& encoder, const Workspace& w, int chunk, int slot) {
  const int floats = kChunk * encoder.coded;
  if (kChunk * chunk < encoder.transformed)
    for (int i = 4 * thread(); i < floats; i += 4 * threads())
      copy_16(w.analysis + slot * floats + i, encoder.analysis + chunk * floats + i);
  end_group();
}

/// x becomes y = analysis x, sums in ascending order without fused operations; where the matrix is
/// one of signs the fused ones round as sums do. A thread owns Rows x 8 outputs, a warp 4 Rows x
/// 64, a block all. The first chunks of the matrix are under way.
template <int Rows, bool Signs>
KVPLAN_DEVICE void transform(const EncoderView& encoder, const Workspace& w) {
  constexpr int kQuads = 2;  // of tokens, half a page apart
  const int token = lane() % 8 * 4, row = thread() / 8 * Rows;
  const bool active = row < encoder.coded;
  float sum[Rows][kQuads][4] = {};
  int slot = 0;
  for (int chunk = 0; kChunk * chunk < encoder.transformed; ++chunk) {
    wait_groups<kChunks - 2>();
    sync_block();
    copy_chunk(encoder, w, chunk + kChunks - 1, slot == 0 ? kChunks - 1 : slot - 1);
    const float* a = w.analysis + slot * kChunk * encoder.coded + row;
    const float* x = w.x + kChunk * chunk * kStride + token;
    slot = slot == kChunks - 1 ? 0 : slot + 1;
    if (!active) continue;
#pragma unroll 2
    for (int j = 0; j < kChunk; ++j, a += encoder.coded, x += kStride) {
      float factors[Rows];
#pragma unroll
      for (int r = 0; r < Rows; r += 4) {
        const float4 f = *reinterpret_cast<const float4*>(a + r);
        factors[r] = f.x, factors[r + 1] = f.y, factors[r + 2] = f.z, factors[r + 3] = f.w;
      }
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float4 quad = *reinterpret_cast<const float4*>(x + q * kPageTokens / kQuads);
        const float values[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int r = 0; r < Rows; ++r)
#pragma unroll
          for (int t = 0; t < 4; ++t)
            sum[r][q][t] = Signs ? fused(factors[r], values[t], sum[r][q][t])
                                 : sum[r][q][t] + factors[r] * values[t];
      }
    }
  }
  sync_block();
  if (!active) return;
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      *reinterpret_cast<float4*>(w.x + (row + r) * kStride + token + q * kPageTokens / kQuads) =
          float4{sum[r][q][0], sum[r][q][1], sum[r][q][2], sum[r][q][3]};
}

KVPLAN_DEVICE void transform(const EncoderView& encoder, const Workspace& w) {
  const bool few = encoder.coded <= threads() / 2;
  if (encoder.magnitude > 0)
    few ? transform<4, true>(encoder, w) : transform<8, true>(encoder, w);
  else
    few ? transform<4, false>(encoder, w) : transform<8, false>(encoder, w);
}

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

/// A page of rows in fp16.
KVPLAN_DEVICE void store_halves(const LayerView& layer, const Job& job,
                                const quant::SideLayout& layout, int first_position,
                                std::byte* page) {
  constexpr int kWidth = 16;
  for (int r = 0; r < layout.run_count; ++r) {
    const quant::TileRun run = layout.runs[r];
    const bool half_tile = run.half != 0;
    const auto code = [&](int tile, int lane, int index) -> std::uint32_t {
      const TileElement e = tile_element(job.side, half_tile, lane, index);
      const int channel = run.coordinate + tile * quant::kTileCoordinates + e.coordinate;
      return job.row(layer, first_position + e.token)[channel];
    };
    constexpr int kWords = quant::kWarpLanes * kWidth;  // of a tile
    for (int i = thread(); i < run.tiles * kWords; i += threads()) {
      const int tile = i / kWords;
      const LaneWord at = lane_word(kWidth, half_tile, i % kWords);
      if (half_tile)
        reinterpret_cast<std::uint16_t*>(page + run.offset)[i] =
            static_cast<std::uint16_t>(code(tile, at.lane, at.word));
      else
        reinterpret_cast<std::uint32_t*>(page + run.offset)[i] =
            code(tile, at.lane, 2 * at.word) | code(tile, at.lane, 2 * at.word + 1) << 16;
    }
  }
}

template <bool Trellis>
KVPLAN_DEVICE void pack_page(const LayerView& layer, const Job& job, int first_position,
                             std::byte* page) {
  const quant::SideLayout& layout = side_layout(layer, job.side, job.head);
  const EncoderView encoder = layer.encoders[job.side * layer.kv_heads + job.head];
  if (encoder.fp16 != 0) return store_halves(layer, job, layout, first_position, page);
  const Workspace w(layer.head_dim);
  for (int chunk = 0; chunk < kChunks - 1; ++chunk) copy_chunk(encoder, w, chunk, chunk);
  load_tables<Trellis>(layer, layout, encoder, w);
  sync_block();
  const float* const means = job.side == kKeys ? layer.k_mean : layer.v_mean;
  const float* const mean = means == nullptr ? nullptr : means + job.head * layer.head_dim;
  const int turned = mean != nullptr && job.side == kKeys ? 2 * layer.pairs : 0;
  load_page(layer, job, encoder, w, first_position, mean, turned);
  if (turned > 0) {
    sync_block();
    subtract_turned_mean(layer, encoder, w, mean, first_position);
  }
  transform(encoder, w);
  sync_block();
  quantise<Trellis>(layer, layout, encoder, w, job.side, page);
  store_tiles<Trellis>(layout, w, page);
}

/// Block (page, group of jobs, sequence). Most steps fill no page. Blocks of the first page that
/// fills, the only one with rows of the old open page, store plain rows behind it. Float products
/// of a page: 64 * coded * transformed.
template <bool Trellis>
__global__ void __launch_bounds__(kMaxThreads, 2)
    append_kernel(const int share, const AppendView v) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Sequence sequence(v.batch, block_z());
  const Jobs jobs(v, share);
  const int sinks = v.layer.sink_tokens, full = full_pages(sequence.length, sinks);
  const int page = full_pages(sequence.before, sinks) + block(), open = sinks + full * kPageTokens;
  if (page >= full) {
    if (block() == 0) store_rows(v, sequence, jobs, open);
    return;
  }
  const int number = v.batch.page_table[std::int64_t{sequence.slot} * v.batch.table_stride + page];
  for (int i = 0; i < jobs.count; ++i) {
    const Job job(v, sequence, jobs.first + i);
    pack_page<Trellis>(v.layer, job, sinks + page * kPageTokens,
                       page_of(v.layer, number, job.head));
    sync_block();
  }
  if (block() == 0) store_rows(v, Sequence(v.batch, block_z()), Jobs(v, share), open);
}

}  // namespace

cudaError_t append(const AppendView& view, cudaStream_t stream) {
  const int jobs = 2 * view.layer.kv_heads;
  LaunchShape shape;
  // Before its first new token a sequence may have an open page of 63.
  shape.blocks = (view.batch.max_new_tokens + kPageTokens - 1) / kPageTokens;
  shape.blocks_z = view.batch.sequences;
  const std::int64_t all = std::int64_t{jobs} * shape.blocks * shape.blocks_z;
  const int share =
      static_cast<int>(std::min<std::int64_t>((all + kMostBlocks - 1) / kMostBlocks, jobs));
  shape.blocks_y = (jobs + share - 1) / share;
  shape.threads = threads_of(view.layer.head_dim);
  shape.shared_bytes = has_trellis(view.layer.codes)
                           ? Workspace::bytes_with_trellis(view.layer.head_dim, shape.threads)
                           : Workspace::bytes(view.layer.head_dim);
  shape.stream = stream;
  shape.overlap = true;
  const auto kernel = has_trellis(view.layer.codes) ? append_kernel<true> : append_kernel<false>;
  const cudaError_t allowed = allow_shared(kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(kernel, shape, share, view);
}

}  // namespace kvplan::kernels
