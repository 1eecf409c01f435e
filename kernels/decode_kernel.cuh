#pragma once
// The decode kernel around a path, which is how a warp attends to the packed pages of one segment.
// A path has kBlocks (of four columns), kWarps (at most), a Feed
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
    if (map.of_trellis[table]) {
      constexpr int kStates = 1 << kStateBits;
      for (int e = thread(); e < trellis_entries(width); e += threads())
        to[e] = pack_halves(levels[e % kStates], levels[e >> width]);
      continue;
    }
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

/// Sequences whose entries of a step are read ahead.
inline constexpr int kTouched = 1024;

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

/// Brings what the first warp is about to read closer to the block, while it waits for the lengths.
KVPLAN_DEVICE void touch_batch(const AttentionView& v) {
  const BatchView& batch = v.batch;
  const int first = thread() - kLanes, step = threads() - kLanes;
  for (int i = first; i < batch.sequences && i < kTouched; i += step) {
    touch(batch.length_before + i);
    touch(batch.first_row + i);
    touch(batch.slot + i);
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
  static constexpr int kBlocks = Path::kBlocks;
  using Memory = BlockMemory<kBlocks>;
  using Feed = typename Path::Feed;

  KVPLAN_DEVICE Worker(const AttentionView& v, const Memory& memory) : v_(v), memory_(memory) {}

  /// Takes the warp's share of the pages and sends for the first.
  KVPLAN_DEVICE void start(Feed& feed) {
    const Round& round = memory_.round();
    WarpState& state = memory_.state(warp());
    bool has_pages = false;
    if (lane() < round.count) {
      const Piece& piece = round.pieces[lane()];
      const Cut cut(round.page_line, static_cast<std::uint32_t>(warps_of_block()));
      const int first = piece.first_own_page();
      int pages[2];
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t at = cut.begin(static_cast<std::uint32_t>(warp() + i)),
                            start = round.page_start[lane()];
        const std::uint32_t each = v_.layer.costs.head(piece.head);
        const int before = at <= start ? 0
                                       : units_within(at - start, v_.layer.costs.start + each, each,
                                                      piece.end_own_page() - first);
        (i == 0 ? pages[0] : pages[1]) = first + before;
      }
      state.begin[lane()] = pages[0], state.end[lane()] = pages[1];
      has_pages = pages[0] < pages[1];
    }
    const std::uint32_t with_pages = ballot(has_pages);
    if (lane() == 0) state.piece = -1;
    sync_warp();
    if (with_pages != 0) send_for(feed, first_bit(with_pages));
  }

  KVPLAN_DEVICE void attend(Feed& feed) {
    int next;
#pragma unroll 1
    for (int p = with_pages(-1); p >= 0; p = next) {
      next = with_pages(p);
      attend_pages(feed, p, next);
    }
  }

 private:
  /// The first piece behind p of which the warp has pages, or -1.
  KVPLAN_DEVICE int with_pages(int p) const {
    const WarpState& state = memory_.state(warp());
#pragma unroll 1
    for (++p; p < memory_.round().count; ++p)
      if (state.begin[p] < state.end[p]) return p;
    return -1;
  }
  /// The pages of piece p; those of `next` are sent for then.
  KVPLAN_DEVICE void attend_pages(Feed& feed, int p, int next) {
    WarpState& state = memory_.state(warp());
    const Piece& piece = memory_.round().pieces[p];
    const int first = state.begin[p], count = state.end[p] - first;
    Running<kBlocks> r;
    {
      Work<kBlocks> work;
      load_piece(v_, memory_, p, work);
      Path::attend(v_, work, feed, r, first, count);
    }
    if (next >= 0) send_for(feed, next);
    reduce_masses(r);
    sync_warp();
    scale_bytes<kBlocks>(v_, piece.head, memory_.output(warp()), r);
    if (next >= 0) {
      put_aside(p, r);
    } else {
      store_state(state.state, r);
      if (lane() == 0) state.piece = p;
    }
    sync_warp();
  }
  /// Has the pages of piece p brought.
  KVPLAN_DEVICE void send_for(Feed& feed, int p) {
    const PageSource& source = memory_.round().sources[p];
    const WarpState& state = memory_.state(warp());
    const int first = state.begin[p];
    PageList list;
    list.pages = source.pages;
    list.blocks = source.blocks + first;
    list.phases = source.phases + std::int64_t{first} * (16 * v_.layer.phase_steps);
    list.block_bytes = source.block_bytes;
    list.count = state.end[p] - first;
    list.key_bytes = source.key_bytes, list.rest_bytes = source.rest_bytes;
    list.phase_bytes = source.phase_bytes;
    feed.start(list);
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
  constexpr int kBlocks = Path::kBlocks;
  using Feed = typename Path::Feed;
  const BlockMemory<kBlocks> memory(v);
  Worker<Path> worker(v, memory);
  let_next_kernel_start();
  prefetch_matrices(v);
  fill_shared(v, memory);
  Round& round = memory.round();
  Kept<Feed> kept_feed(
      Feed(memory.list(warp()), memory.barriers(warp()), memory.feed(warp()), memory.map));
  wait_for_previous_kernel();
  if (warp() == 0)
    measure_line(v, round);
  else
    touch_batch(v);
  while (true) {
    if (warp() == 0) next_round(v, round);
    sync_block();
    if (round.count == 0) break;
    QueryTransform<kBlocks>(v, memory).run(
        [&] { kept_feed.use([&](Feed& feed) { worker.start(feed); }); });
    prefetch_plain(v, round);
    list_runs(v, memory);
    if (v.layer.k_mean != nullptr) centre_queries(v, memory);
    sync_block();
    fragment_queries(v, memory);
    sync_block();
    kept_feed.use([&](Feed& feed) { worker.attend(feed); });
    attend_plain<kBlocks>(v, round);
    sync_block();
    leave_results(v, memory);
    if (round.end == round.block_end) break;
    fence_copies();
    sync_block();
  }
}

using DecodeKernel = void (*)(AttentionView);

}  // namespace kvplan::kernels
