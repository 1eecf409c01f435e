// New tokens into the cache: rows of sinks and of the open page, and pages that fill, packed. Does
// what quant::Codec::encode and quant::to_page do, with float sums in the same order.

#include <cmath>

#include "kernels/log_norm.cuh"
#include "kernels/page_access.cuh"
#include "kernels/ptx.cuh"
#include "kernels/views.h"
#include "quant/page_layout.h"
#include "quant/transform_codec.h"

namespace kvplan::kernels {
namespace {

using quant::kPageTokens;

constexpr int kThreads = 256;
constexpr int kParts = kThreads / kPageTokens;  // threads that share the sums of a token
constexpr int kStride = kPageTokens + 4;        // of a row of shared memory, in floats
constexpr int kThreadTokens = 4;                // of the product
constexpr int kOctet = 8;                       // channels of a 16-byte load
constexpr double kMinScale = 0.5, kMaxScale = 4, kSmallestNorm = 1e-30, kHalfMax = 65504;
constexpr float kOutlierMax = 127;

/// Of a block, in shared memory.
struct Workspace {
  double (*sums)[kParts][kPageTokens];  // [4] y^2, weighted y^2, y c, c^2
  float* x;              // [head_dim][kStride] channels through the transform, then outliers
  float* y;              // [head_dim][kStride] coordinates, then their codes
  std::uint16_t* place;  // [head_dim] row of x of a channel
};

constexpr std::size_t kSumsBytes = 4 * sizeof(double) * kThreads;

std::size_t shared_bytes(int head_dim) {
  const auto d = static_cast<std::size_t>(head_dim);
  return kSumsBytes + d * (2 * kStride * sizeof(float) + sizeof(std::uint16_t));
}

KVPLAN_DEVICE Workspace workspace(int head_dim) {
  Workspace w;
  std::byte* const memory = shared_memory();
  w.sums = reinterpret_cast<double(*)[kParts][kPageTokens]>(memory);
  w.x = reinterpret_cast<float*>(memory + kSumsBytes);
  w.y = w.x + head_dim * kStride;
  w.place = reinterpret_cast<std::uint16_t*>(w.y + head_dim * kStride);
  return w;
}

/// What a block works on: one side of one KV head of one sequence.
struct Job {
  int slot, side, head, before, length;
  const std::uint16_t* rows;  // of the first new token
  std::int64_t row_stride;

  KVPLAN_DEVICE explicit Job(const AppendView& v)
      : slot(v.batch.slot[block_z()]),
        side(block_y() % 2),
        head(block_y() / 2),
        before(v.batch.length_before[block_z()]),
        length(v.batch.length[block_z()]),
        row_stride(std::int64_t{v.layer.kv_heads} * v.layer.head_dim) {
    rows = (side == kKeys ? v.k : v.v) + v.batch.first_row[block_z()] * row_stride +
           head * v.layer.head_dim;
  }
  KVPLAN_DEVICE const std::uint16_t* row(const LayerView& layer, int position) const {
    return position < before ? plain_row(layer, slot, side, head, position)
                             : rows + (position - before) * row_stride;
  }
};

KVPLAN_DEVICE void store_rows(const LayerView& layer, const Job& job, int begin, int end) {
  const int octets = layer.head_dim / kOctet;
  for (int i = thread(); i < (end - begin) * octets; i += kThreads) {
    const int position = begin + i / octets, octet = i % octets;
    const auto* const from =
        reinterpret_cast<const uint4*>(job.rows + (position - job.before) * job.row_stride);
    reinterpret_cast<uint4*>(plain_row(layer, job.slot, job.side, job.head, position))[octet] =
        from[octet];
  }
}

/// x = the page's rows by channel; bits of the halves for a head stored as fp16.
KVPLAN_DEVICE void load_page(const LayerView& layer, const Job& job, const Workspace& w,
                             int first_position, bool bits) {
  for (int i = thread(); i < kPageTokens * layer.head_dim / kOctet; i += kThreads) {
    const int token = i % kPageTokens, octet = i / kPageTokens;
    const uint4 halves =
        reinterpret_cast<const uint4*>(job.row(layer, first_position + token))[octet];
    const std::uint32_t pairs[kOctet / 2] = {halves.x, halves.y, halves.z, halves.w};
    for (int k = 0; k < kOctet; ++k) {
      const auto half = static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2));
      w.x[w.place[kOctet * octet + k] * kStride + token] =
          bits ? static_cast<float>(half) : from_half(half);
    }
  }
}

/// x -= mean for the channels from `first` on.
KVPLAN_DEVICE void subtract_mean(const Workspace& w, const float* mean, int first, int head_dim) {
  for (int i = first * kPageTokens + thread(); i < head_dim * kPageTokens; i += kThreads)
    w.x[w.place[i / kPageTokens] * kStride + i % kPageTokens] -= mean[i / kPageTokens];
}

/// x -= R_t mean for the rotary pairs. A thread turns a pair through 8 positions.
KVPLAN_DEVICE void subtract_turned_mean(const LayerView& layer, const Workspace& w,
                                        const float* mean, int first_position) {
  constexpr int kRun = 8, kRuns = kPageTokens / kRun;
  for (int i = thread(); i < layer.pairs * kRuns; i += kThreads) {
    const int pair = i / kRuns, first = i % kRuns * kRun;
    const int a = pair * layer.pair_stride, b = a + layer.pair_distance;
    const double mean_a = mean[a], mean_b = mean[b], frequency = layer.inv_freq[pair];
    const double angle = (first_position + first) * frequency;
    double c = std::cos(angle), s = std::sin(angle);
    const double step_c = std::cos(frequency), step_s = std::sin(frequency);
    float* const row_a = w.x + w.place[a] * kStride + first;
    float* const row_b = w.x + w.place[b] * kStride + first;
    for (int t = 0; t < kRun; ++t) {
      row_a[t] -= static_cast<float>(mean_a * c - mean_b * s);
      row_b[t] -= static_cast<float>(mean_b * c + mean_a * s);
      const double next_c = c * step_c - s * step_s;
      s = s * step_c + c * step_s;
      c = next_c;
    }
  }
}

/// y = analysis x, sums in ascending order without fused operations. A thread owns Rows x 4
/// outputs, a warp 2 Rows x 64.
template <int Rows>
KVPLAN_DEVICE void transform(const EncoderView& encoder, const Workspace& w) {
  constexpr int kGroups = kPageTokens / kThreadTokens;
  const int token = thread() % kGroups * kThreadTokens, n = encoder.transformed;
  for (int row = thread() / kGroups * Rows; row < encoder.coded; row += kThreads / kGroups * Rows) {
    float sum[Rows][kThreadTokens] = {};
    const float* const a = encoder.analysis + std::int64_t{row} * n;
    for (int j = 0; j < n; j += 4) {
      float4 factors[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) factors[r] = *reinterpret_cast<const float4*>(a + r * n + j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float4 x = *reinterpret_cast<const float4*>(w.x + (j + e) * kStride + token);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const float4& f = factors[r];
          const float factor = e == 0 ? f.x : e == 1 ? f.y : e == 2 ? f.z : f.w;
          sum[r][0] += factor * x.x;
          sum[r][1] += factor * x.y;
          sum[r][2] += factor * x.z;
          sum[r][3] += factor * x.w;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      *reinterpret_cast<float4*>(w.y + (row + r) * kStride + token) =
          float4{sum[r][0], sum[r][1], sum[r][2], sum[r][3]};
  }
}

/// The parts of a token's sum.
KVPLAN_DEVICE double total(const double (*sum)[kPageTokens], int token) {
  double all = 0;
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

/// How many of the ascending boundaries are below u.
KVPLAN_DEVICE int nearest_level(const float* boundaries, int width, float u) {
  int code = 0;
  for (int step = 1 << (width - 1); step > 0; step >>= 1)
    if (u > boundaries[code + step - 1]) code += step;
  return code;
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

/// y becomes codes; norms go to the page. A token is shared by kParts threads.
KVPLAN_DEVICE void quantise(const LayerView& layer, const quant::SideLayout& layout,
                            const EncoderView& encoder, const Workspace& w, std::byte* page) {
  const int token = thread() % kPageTokens, part = thread() / kPageTokens;
  double squares = 0;
  for (int i = part; i < encoder.coded; i += kParts) {
    const double y = w.y[i * kStride + token];
    squares += y * y;
  }
  w.sums[0][part][token] = squares;
  sync_block();
  const double norm = encoder.coded == 0 ? 0 : std::sqrt(total(w.sums[0], token) / encoder.coded);
  const float inverse = norm > kSmallestNorm ? static_cast<float>(1 / norm) : 0;

  double yy = 0, yc = 0, cc = 0;
  for (int r = 0; r < layout.run_count; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const float* const boundaries = layer.boundaries + run.table * 255;
    const float* const levels = layer.levels + run.table * 256;
    const int end = run.coordinate + run_coordinates(run);
    for (int i = run.coordinate + part; i < end; i += kParts) {
      float& y = w.y[i * kStride + token];
      const float u = y * inverse;
      const int code = nearest_level(boundaries, run.width, u);
      const double value = u, level = levels[code], weight = encoder.weight[i];
      yy += weight * value * value;
      yc += weight * value * level;
      cc += weight * level * level;
      y = static_cast<float>(code);
    }
  }
  w.sums[1][part][token] = yy;
  w.sums[2][part][token] = yc;
  w.sums[3][part][token] = cc;
  sync_block();
  if (part == 0)
    store_norm(layout, page, token,
               norm * scale_of(layer.scale_rule, total(w.sums[1], token), total(w.sums[2], token),
                               total(w.sums[3], token)));
}

/// Rows of x from `first` on become codes of outliers; scales go to the page.
KVPLAN_DEVICE void quantise_outliers(const quant::SideLayout& layout, const Workspace& w, int first,
                                     std::byte* page) {
  const int token = thread();
  if (token >= kPageTokens) return;
  float largest = 0;
  for (int i = 0; i < layout.outliers; ++i)
    largest = std::fmax(largest, std::fabs(w.x[(first + i) * kStride + token]));
  const std::uint16_t half = to_half(largest / kOutlierMax);
  reinterpret_cast<std::uint16_t*>(page + layout.scale_offset)[quant::token_index(token)] = half;
  const float scale = from_half(half);
  for (int i = 0; i < layout.outliers; ++i) {
    float& x = w.x[(first + i) * kStride + token];
    const float code = scale > 0 ? std::floor(x / scale + 0.5f) : 0;
    x = std::fmin(std::fmax(code, -kOutlierMax), kOutlierMax) + (kOutlierMax + 1);
  }
}

/// The tiles of a run from rows of codes by coordinate.
KVPLAN_DEVICE void store_tiles(const quant::TileRun& run, int side, const float* codes,
                               std::byte* page) {
  const bool half_tile = run.half != 0;
  const int tile_words = quant::kWarpLanes * run.width;
  for (int i = thread(); i < run.tiles * tile_words; i += kThreads) {
    const int tile = i / tile_words;
    const LaneWord at = lane_word(run.width, half_tile, i % tile_words);
    const float* const rows = codes + tile * quant::tile_coordinates(half_tile) * kStride;
    const std::uint32_t word = pack_word(run, at.word, [&](int code) {
      const TileElement e = tile_element(side, half_tile, at.lane, code);
      return static_cast<std::uint32_t>(rows[e.coordinate * kStride + e.token]);
    });
    if (half_tile)
      reinterpret_cast<std::uint16_t*>(page + run.offset)[i] = static_cast<std::uint16_t>(word);
    else
      reinterpret_cast<std::uint32_t*>(page + run.offset)[i] = word;
  }
}

KVPLAN_DEVICE void pack_page(const LayerView& layer, const Job& job, int first_position,
                             std::byte* page) {
  const quant::SideLayout& layout = side_layout(layer, job.side, job.head);
  const EncoderView& encoder = layer.encoders[job.side * layer.kv_heads + job.head];
  const Workspace w = workspace(layer.head_dim);
  const int transformed = encoder.fp16 != 0 ? layer.head_dim : encoder.transformed;
  for (int i = thread(); i < layer.head_dim; i += kThreads) {
    const int channel = encoder.fp16 != 0 ? i
                        : i < transformed ? encoder.channels[i]
                                          : encoder.outliers[i - transformed];
    w.place[channel] = static_cast<std::uint16_t>(i);
  }
  sync_block();
  load_page(layer, job, w, first_position, encoder.fp16 != 0);
  sync_block();
  if (encoder.fp16 == 0) {
    const float* const means = job.side == kKeys ? layer.k_mean : layer.v_mean;
    if (means != nullptr) {
      const float* const mean = means + job.head * layer.head_dim;
      const int pairs = job.side == kKeys ? layer.pairs : 0;
      if (pairs > 0) subtract_turned_mean(layer, w, mean, first_position);
      subtract_mean(w, mean, 2 * pairs, layer.head_dim);
      sync_block();
    }
    if (encoder.coded <= 4 * kThreads / (kPageTokens / kThreadTokens))
      transform<4>(encoder, w);
    else
      transform<8>(encoder, w);
    sync_block();
    quantise(layer, layout, encoder, w, page);
    if (layout.outliers > 0) quantise_outliers(layout, w, transformed, page);
    sync_block();
  }
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const float* const rows = run.code == quant::TileCode::kInteger ? w.x + transformed * kStride
                              : encoder.fp16 != 0                   ? w.x
                                                                    : w.y;
    store_tiles(run, job.side, rows + run.coordinate * kStride, page);
  }
}

/// Block (page, 2 * KV head + side, sequence). Block 0 packs the first page that fills, the only
/// one with rows of the old open page, and then writes the rows of the sinks and of the new open
/// page. Float products of a page: 64 * coded * transformed.
__global__ void __launch_bounds__(kThreads, 2) append_kernel(const AppendView v) {
  const Job job(v);
  const int sinks = v.layer.sink_tokens;
  const int full = full_pages(job.length, sinks);
  const int page = full_pages(job.before, sinks) + block();
  if (page < full) {
    const int number = v.batch.page_table[std::int64_t{job.slot} * v.batch.table_stride + page];
    pack_page(v.layer, job, sinks + page * kPageTokens, page_of(v.layer, number, job.head));
  }
  if (block() > 0) return;
  if (job.before < sinks)
    store_rows(v.layer, job, job.before, job.length < sinks ? job.length : sinks);
  const int open = sinks + full * kPageTokens;
  if (job.length > open)
    store_rows(v.layer, job, job.before > open ? job.before : open, job.length);
}

}  // namespace

cudaError_t append(const AppendView& view, cudaStream_t stream) {
  LaunchShape shape;
  // Before its first new token a sequence may have an open page of 63.
  shape.blocks = (view.batch.max_new_tokens + kPageTokens - 1) / kPageTokens;
  shape.blocks_y = 2 * view.layer.kv_heads;
  shape.blocks_z = view.batch.sequences;
  shape.threads = kThreads;
  shape.shared_bytes = shared_bytes(view.layer.head_dim);
  shape.stream = stream;
  const cudaError_t allowed = allow_shared(append_kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(append_kernel, shape, view);
}

}  // namespace kvplan::kernels
