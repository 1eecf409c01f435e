// New tokens into the cache: rows of sinks and of the open page, and pages that fill, packed. Does
// what quant::Codec::encode and quant::to_page do, with float sums in the same order.

#include <algorithm>

#include "kernels/page_access.cuh"
#include "kernels/page_quantiser.cuh"
#include "kernels/page_workspace.cuh"
#include "kernels/ptx.cuh"
#include "kernels/views.h"
#include "quant/page_layout.h"

namespace kvplan::kernels {
namespace {

constexpr int kTurns = 2;         // threads that share the turned mean of a pair
constexpr int kOctet = 8;         // channels of a 16-byte load
constexpr int kMostBlocks = 512;  // before a block takes more than one head

int threads_of(int head_dim) { return head_dim <= kMaxThreads / 2 ? kMaxThreads / 2 : kMaxThreads; }

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
