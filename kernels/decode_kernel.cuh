#pragma once
// The decode kernel around a path, which is how a warp attends to the packed pages of one segment.
// A path has kPages (of a unit), kBlocks (of four columns), kWarps (at most), a Feed
// (page_feed.cuh) and
//   attend(view, work, feed, running, first page, pages).
// Private to the decode kernels.

#include "kernels/block_memory.cuh"
#include "kernels/page_feed.cuh"
#include "kernels/plain_attention.cuh"
#include "kernels/ptx.cuh"
#include "kernels/queries.cuh"
#include "kernels/results.cuh"
#include "kernels/round.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/tile_plan.h"
#include "kernels/views.h"

namespace kvplan::kernels {

/// What all rounds find in shared memory: tables of levels, tiles of the rotary embedding.
template <int Blocks>
KVPLAN_DEVICE void fill_shared(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  const SharedMap& map = memory.map;
  for (int table = 0; table < map.tables; ++table) {
    if (map.table_address[table] == 0) continue;
    const int width = map.table_width[table];
    const float* levels = v.layer.levels + 256 * table;
    auto* const to = memory.template at<std::uint32_t>(map.table_address[table]);
    const int mask = (1 << width) - 1;
    for (int e = thread(); e < table_bytes(width) / 4; e += threads()) {
      const int index = e / kLanes;
      to[e] = width <= kMaxPairWidth ? pack_halves(levels[index & mask], levels[index >> width])
                                     : pack_halves(levels[index], levels[index]);
    }
  }
  const auto copy = [&](int address, const uint4* from) {
    if (address == 0) return;
    auto* const to = memory.template at<uint4>(address);
    const int kept = (v.layer.mixed ? kHalfPageRows : kRows) * kLanes;  // of a step
    for (int i = thread(); i < v.layer.phase_steps * kept; i += threads())
      to[i] = from[i / kept * (kRows * kLanes) + i % kept];
  };
  copy(map.rotary_tile, v.layer.rotary_tile);
  copy(map.rotary_tile_low, v.layer.rotary_tile_low);
}

/// Brings the matrices closer, while the kernel ahead still runs. The grid shares the work.
KVPLAN_DEVICE void prefetch_matrices(const AttentionView& v) {
  constexpr int kLine = 128;
  const int tiles = matrix_tiles(v.layer.head_dim);
  const int bytes =
      v.layer.kv_heads * tiles * tiles * 2 * quant::kWarpLanes * static_cast<int>(sizeof(uint4));
#pragma unroll 1
  for (int at = kLine * (thread() * blocks() + block()); at < bytes;
       at += kLine * blocks() * threads()) {
    prefetch(reinterpret_cast<const std::byte*>(v.layer.k_matrix) + at);
    prefetch(reinterpret_cast<const std::byte*>(v.layer.v_matrix) + at);
  }
}

// Sums over bytes become sums over levels.
template <int Blocks>
KVPLAN_DEVICE void scale_bytes(const AttentionView& v, int head, Output<Blocks>* output,
                               const Running<Blocks>& r) {
  const quant::SideLayout& side = v.layer.heads[head].v;
  output += lane();
#pragma unroll 1
  for (int i = 0; i < side.run_count; ++i) {
    const quant::TileRun& run = side.runs[i];
    if (run.code == quant::TileCode::kBytes)
#pragma unroll 1
      for (int j = 0; j < run.tiles; ++j)
#pragma unroll
        for (int k = 0; k < 2 * Blocks; ++k) {
          float& o = output[j * kLanes].x[k];
          o = run.step * fused(run.byte_offset, r.norms[k / 2], o);
        }
    output += run.tiles * kLanes;
  }
}

template <int Blocks>
KVPLAN_DEVICE void load_piece(const AttentionView& v, const BlockMemory<Blocks>& memory, int p,
                              Work<Blocks>& work) {
  const Piece& piece = memory.round().pieces[p];
  const quant::HeadLayout& head = v.layer.heads[piece.head];
  work.column_block = piece.column_block;
  work.tables = memory.mixed(warp());
  work.query = memory.query(p);
  work.output = memory.output(warp());
  work.runs = memory.runs(p);
  work.centre = memory.centre(p);
  for (const quant::SideLayout* side : {&head.k, &head.v}) {
    int outlier_tiles = 0;
    for (int i = side->run_count; i < side->run_count + side->outlier_runs; ++i)
      outlier_tiles += side->runs[i].tiles;
    if (side == &head.v) work.value_outlier_tiles = outlier_tiles;
    (side == &head.k ? work.key_tiles : work.value_tiles) = side->tiles - outlier_tiles;
  }
  work.key_runs = head.k.run_count, work.key_outlier_runs = head.k.outlier_runs;
  work.value_runs = head.v.run_count, work.value_outlier_runs = head.v.outlier_runs;
  const std::uint32_t first_half = key_tile_bytes(head);
  work.key_norms = head.k.norm_offset - first_half;
  work.value_norms = head.v.norm_offset - first_half;
  work.key_scales = head.k.scale_offset - first_half;
  work.value_scales = head.v.scale_offset - first_half;
  work.norm_bytes[0] = head.k.norm_bytes, work.norm_bytes[1] = head.v.norm_bytes;
  work.first_query = v.batch.length_before[piece.sequence];
  const std::int64_t lowest =
      v.window > 0 ? work.first_query + v.batch.max_new_tokens - v.window : 0;
  work.lowest = lowest > 0 ? static_cast<int>(lowest) : 0;
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
    const ColumnTerms terms = memory.terms(p)[(lane() & 3) + 4 * e];
    work.bias[e] = terms.bias;
    work.unit[e] = terms.unit;
    work.constant[e] = v.layer.k_mean ? terms.constant : 0;
  }
}

/// A warp at work on its share of a round.
template <class Path>
class Worker {
 public:
  static constexpr int kPages = Path::kPages, kBlocks = Path::kBlocks;
  using Memory = BlockMemory<kBlocks>;
  using Feed = typename Path::Feed;

  KVPLAN_DEVICE Worker(const AttentionView& v, const Memory& memory) : v_(v), memory_(memory) {}

  /// Takes the share and sends for the first pages.
  KVPLAN_DEVICE void start(Feed& feed) {
    const Round& round = memory_.round();
    WarpState& state = memory_.state(warp());
    bool has_pages = false;
    if (lane() < round.count) {
      const Piece& piece = round.pieces[lane()];
      const Cut cut(round.end - round.begin, static_cast<std::uint32_t>(warps_of_block()));
      int units[2];
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t at = round.begin + cut.begin(static_cast<std::uint32_t>(warp() + i));
        const int before = units_before(v_.layer.costs, piece, at);
        (i == 0 ? units[0] : units[1]) = before;
      }
      const int begin = units[0] > piece.begin ? units[0] : piece.begin;
      const int end = units[1] < piece.end ? units[1] : piece.end;
      state.begin[lane()] = begin, state.end[lane()] = end;
      has_pages = begin < end && end > piece.chunks;
    }
    const std::uint32_t with_pages = ballot(has_pages);
    if (lane() == 0) state.piece = state.sent = -1;
    sync_warp();
    if (with_pages != 0) send_for(feed, first_bit(with_pages));
  }

  KVPLAN_DEVICE void attend(Feed& feed) {
    const WarpState& state = memory_.state(warp());
#pragma unroll 1
    for (int p = 0; p < memory_.round().count; ++p)
      if (state.begin[p] < state.end[p]) attend_piece(feed, p);
  }

 private:
  /// Pages of a piece, of the warp's units.
  struct PageRange {
    int first, count;
    KVPLAN_DEVICE PageRange(const Piece& piece, const WarpState& state, int p) {
      const int begin = state.begin[p] - piece.chunks;
      first = piece.first_page + kPages * (begin > 0 ? begin : 0);
      const int end = piece.first_page + kPages * (state.end[p] - piece.chunks);
      count = (end < piece.end_page ? end : piece.end_page) - first;
    }
  };

  KVPLAN_DEVICE void attend_piece(Feed& feed, int p) {
    WarpState& state = memory_.state(warp());
    const Piece& piece = memory_.round().pieces[p];
    if (state.begin[p] < piece.chunks)
      attend_chunks<kBlocks>(v_, memory_.round(), p, memory_.output(warp()), state.begin[p],
                             state.end[p] < piece.chunks ? state.end[p] : piece.chunks);
    const PageRange pages(piece, state, p);
    if (pages.count <= 0) return;
    if (state.sent != p) send_for(feed, p);
    Running<kBlocks> r;
    {
      Work<kBlocks> work;
      load_piece(v_, memory_, p, work);
      Path::attend(v_, work, feed, r, pages.first, pages.count);
    }
    reduce_masses(r);
    sync_warp();
    scale_bytes<kBlocks>(v_, piece.head, memory_.output(warp()), r);
    bool more = false;
    for (int q = p + 1; q < memory_.round().count; ++q)
      more = more || state.begin[q] < state.end[q];
    if (more) {
      put_aside(p, r);
    } else {
      store_state(state.state, r);
      if (lane() == 0) state.piece = p;
    }
    sync_warp();
  }
  /// Has the pages of piece p brought.
  KVPLAN_DEVICE void send_for(Feed& feed, int p) {
    const Piece& piece = memory_.round().pieces[p];
    WarpState& state = memory_.state(warp());
    const PageRange pages(piece, state, p);
    const quant::HeadLayout& head = v_.layer.heads[piece.head];
    const int phases = 16 * v_.layer.phase_steps;  // of a page
    PageList list;
    list.pages = v_.layer.pool + head.block_offset;
    list.blocks = v_.batch.page_table +
                  std::int64_t{v_.batch.slot[piece.sequence]} * v_.batch.table_stride + pages.first;
    list.phases = v_.layer.page_phase + std::int64_t{pages.first} * phases;
    list.block_bytes = v_.layer.block_bytes;
    list.count = pages.count;
    list.key_bytes = key_tile_bytes(head);
    list.rest_bytes = head.page_bytes - list.key_bytes;
    list.phase_bytes = static_cast<std::uint32_t>(phases * static_cast<int>(sizeof(float2)));
    feed.start(list);
    if (lane() == 0) state.sent = p;
  }
  /// To memory: the warp's outputs are needed for another piece.
  KVPLAN_DEVICE void put_aside(int p, const Running<kBlocks>& r) {
    const int slot = block() * quant::kBlockParts + kAside + p;
    store_state(v_.part_state + slot * kColumns, r);
    const Output<kBlocks>* const from = memory_.output(warp());
    Output<kBlocks>* const to = part_output<kBlocks>(v_, slot);
    const int elements = v_.layer.heads[memory_.round().pieces[p].head].v.tiles * kLanes;
#pragma unroll 1
    for (int k = lane(); k < elements; k += kLanes) to[k] = from[k];
    if (lane() == 0) memory_.round().aside[p] = 1;
  }

  const AttentionView& v_;
  const Memory& memory_;
};

/// A value that stays in memory between its uses, and so leaves the registers to others.
template <class T>
class Kept {
 public:
  KVPLAN_DEVICE explicit Kept(const T& value) : value_(value), where_(opaque(&value_)) {}
  Kept(const Kept&) = delete;
  template <class Use>
  KVPLAN_DEVICE void use(Use use) {
    T value = *where_;
    use(value);
    *where_ = value;
  }

 private:
  T value_, *where_;
};

template <class Path>
__global__ void __launch_bounds__(Path::kWarps* kLanes, 1) decode_kernel(const AttentionView v) {
  using Feed = typename Path::Feed;
  const BlockMemory<Path::kBlocks> memory(v);
  Worker<Path> worker(v, memory);
  let_next_kernel_start();
  prefetch_matrices(v);
  fill_shared(v, memory);
  Kept<Feed> kept_feed(
      Feed(memory.list(warp()), memory.barriers(warp()), memory.feed(warp()), memory.map));
  wait_for_previous_kernel();
  Round& round = memory.round();
  if (warp() == 0) measure_line<Path::kPages>(v, round);
  while (true) {
    if (warp() == 0) next_round<Path::kPages>(v, round);
    sync_block();
    if (round.count == 0) break;
    kept_feed.use([&](Feed& feed) { worker.start(feed); });
    transform_queries(v, memory);
    list_runs(v, memory);
    if (v.layer.k_mean != nullptr) centre_queries(v, memory);
    sync_block();
    fragment_queries(v, memory);
    sync_block();
    kept_feed.use([&](Feed& feed) { worker.attend(feed); });
    sync_block();
    leave_results(v, memory);
    if (round.end == round.block_end) break;
    fence_copies();
    sync_block();
  }
}

using DecodeKernel = void (*)(AttentionView);

}  // namespace kvplan::kernels
