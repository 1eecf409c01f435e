#pragma once
// Attention of one segment over packed pages. Private to the decode kernel.

#include <type_traits>

#include "kernels/page_stream.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// Calls use(words, tile, index) for the tiles of runs first .. end - 1, one after the other;
// `offset` in the page moves on. Within a run of few words the next tile is in registers before one
// is used, so that the way from shared memory is hidden.
template <int Pages, class Use>
KVPLAN_DEVICE void for_tiles(Stream<Pages>& stream, const RunEntry* runs, int first, int end,
                             std::uint32_t& offset, Use use) {
  int index = 0;
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const RunEntry run = runs[i];
    with_tile(run.kind, (std::uint32_t{run.table} << kEntryShift) + 4 * lane(),
              [&](const auto& tile) {
                constexpr int kWords = std::remove_reference_t<decltype(tile)>::kWords;
                constexpr bool kAhead = kWords <= 4;
                std::uint32_t words[Pages][kWords], next[Pages][kWords];
                const auto load = [&](std::uint32_t(&to)[Pages][kWords]) {
                  stream.advance(offset + run.bytes);
#pragma unroll
                  for (int n = 0; n < Pages; ++n) tile.load(to[n], stream.tile(n, offset));
                  offset += run.bytes;
                };
                if constexpr (kAhead) load(next);
#pragma unroll 1
                for (int j = 0; j < run.tiles; ++j, ++index) {
                  if constexpr (kAhead) {
#pragma unroll
                    for (int n = 0; n < Pages; ++n)
#pragma unroll
                      for (int k = 0; k < kWords; ++k) words[n][k] = next[n][k];
                    if (j + 1 < run.tiles) load(next);
                  } else {
                    load(words);
                  }
                  use(words, tile, index);
                }
              });
  }
}

// scores += keys . queries over runs of tiles.
template <int Pages>
KVPLAN_DEVICE void score_runs(Scores<Pages>& s, Stream<Pages>& stream, const RunEntry* runs,
                              int first, int end, std::uint32_t& offset, const uint2* query) {
  for_tiles<Pages>(stream, runs, first, end, offset,
                   [&](const auto& words, const auto& tile, int index) {
                     const uint2 q = query[index * kLanes + lane()];
#pragma unroll
                     for (int n = 0; n < Pages; ++n)
#pragma unroll
                       for (int i = 0; i < kRows; ++i) {
                         std::uint32_t a[4];
                         tile.template operand<false>(words[n], i, a);
                         mma(s[n][i], a, q.x, q.y);
                       }
                   });
}

// outputs = outputs * factor + values . weights over runs of tiles.
template <int Pages>
KVPLAN_DEVICE void value_runs(float4* output, Stream<Pages>& stream, const RunEntry* runs,
                              int first, int end, std::uint32_t& offset, const float (&factor)[2],
                              Weights<Pages>& p, Running& r) {
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const bool uniform = runs[i].kind == kUniformKind;
    if (uniform) {
      scale_high_tokens<Pages>(p, UniformTile::kHighFactor);
      add_code_offsets<Pages>(r, p);
    }
    for_tiles<Pages>(
        stream, runs, i, i + 1, offset, [&](const auto& words, const auto& tile, int index) {
          float4* to = output + index * kLanes + lane();
          const float4 before = *to;
          float even[4] = {before.x * factor[0], before.y * factor[1], before.z * factor[0],
                           before.w * factor[1]};
          float odd[4] = {0, 0, 0, 0};
#pragma unroll
          for (int n = 0; n < Pages; ++n)
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              std::uint32_t a[4];
              tile.template operand<true>(words[n], k, a);
              mma(k % 2 == 0 ? even : odd, a, p[n][k][0], p[n][k][1]);
            }
          *to = {even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]};
        });
    if (uniform) scale_high_tokens<Pages>(p, 1 / UniformTile::kHighFactor);
    output += runs[i].tiles * kLanes;
  }
}

// Pages done .. done + Pages - 1 of the list, the stream's next; `first_page`: index of the first
// one in the sequence. Those behind the list's end are the last one again and do not count.
template <int Pages, bool Outliers>
KVPLAN_DEVICE void attend_group(const AttentionView& v, const Work& work, Running& r,
                                Stream<Pages>& stream, const PageList& list, int done,
                                int first_page) {
  StoredNorms norms[Pages];
#pragma unroll
  for (int n = 0; n < Pages; ++n)
    norms[n] = load_norms(list.page(done + n) + work.key_norms, work.norm_bytes[0]);
  Scores<Pages> s;
#pragma unroll
  for (int n = 0; n < Pages; ++n)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) s[n][i][k] = work.bias[k % 2];
  std::uint32_t offset = 0;
  score_runs<Pages>(s, stream, work.runs, 0, work.key_runs, offset, work.query);
#pragma unroll
  for (int n = 0; n < Pages; ++n) {
    float norm[8];
    unpack_norms(norm, norms[n], work.norm_bytes[0]);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) s[n][i][k] *= norm[2 * i + k / 2];
  }
#pragma unroll
  for (int n = 0; n < Pages; ++n)
    norms[n] = load_norms(list.page(done + n) + work.value_norms, work.norm_bytes[1]);
  const int values = work.key_runs + work.key_outlier_runs;
  if constexpr (Outliers) {
    // Outlier channels have a scale of their own per token, so sums of their own.
    if (work.key_outlier_runs > 0) {
      Scores<Pages> sums = {};
      score_runs<Pages>(sums, stream, work.runs, work.key_runs, values, offset,
                        work.query + work.key_tiles * kLanes);
#pragma unroll
      for (int n = 0; n < Pages; ++n) {
        float scale[8];
        unpack_norms(
            scale, load_norms(list.page(done + n) + v.layer.heads[work.head].k.scale_offset, 2), 2);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            s[n][i][k] = fused(sums[n][i][k], scale[2 * i + k / 2], s[n][i][k]);
      }
    }
  }
  if (v.layer.k_mean) {
    if (v.layer.phase_steps > 0) add_centre<Pages>(s, v, work, first_page);
#pragma unroll
    for (int n = 0; n < Pages; ++n)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) s[n][i][k] += work.constant[k % 2];
  }
  if (v.soft_cap > 0) cap<Pages>(s, v.soft_cap);
  mask<Pages>(s, v, work, v.layer.sink_tokens + quant::kPageTokens * first_page,
              quant::kPageTokens * (list.count - done < Pages ? list.count - done : Pages));
  float factor[2];
  update_maximum<Pages>(r, s, factor);
  Weights<Pages> p;
#pragma unroll
  for (int n = 0; n < Pages; ++n) {
    exponentiate<Pages>(s, r, n);
    float norm[8];
    unpack_norms(norm, norms[n], work.norm_bytes[1]);
    make_weights<Pages>(p, s, n, norm);
  }
  value_runs<Pages>(work.output, stream, work.runs, values, values + work.value_runs, offset,
                    factor, p, r);
  if constexpr (Outliers) {
    if (work.value_outlier_runs > 0) {
#pragma unroll
      for (int n = 0; n < Pages; ++n) {
        float scale[8];
        unpack_norms(
            scale, load_norms(list.page(done + n) + v.layer.heads[work.head].v.scale_offset, 2), 2);
        make_weights<Pages>(p, s, n, scale);
      }
      value_runs<Pages>(work.output + work.value_tiles * kLanes, stream, work.runs,
                        values + work.value_runs,
                        values + work.value_runs + work.value_outlier_runs, offset, factor, p, r);
    }
  }
  stream.advance(stream.turn);
  stream.finish_group();
}

// What a segment needs, to the warp's shared memory and registers.
KVPLAN_DEVICE void load_segment(const AttentionView& v, Work& work) {
  const SharedMap& map = v.layer.shared;
  const std::int64_t segment = work.segment;
  const quant::HeadLayout& head = v.layer.heads[work.head];
  auto* query = reinterpret_cast<uint4*>(work.region + map.query_offset);
  const auto* from = reinterpret_cast<const uint4*>(v.query + segment * v.query_tiles * kLanes);
  for (int i = lane(); i < head.k.tiles * kLanes / 2; i += kLanes) query[i] = from[i];
  auto* runs = reinterpret_cast<RunEntry*>(work.region + map.runs_offset);
  int done = 0, tiles = 0;
  for (const quant::SideLayout* side : {&head.k, &head.v}) {
    const int count = side->run_count + side->outlier_runs;
    for (int i = lane(); i < count; i += kLanes) {
      const quant::TileRun run = side->runs[i];
      runs[done + i] = {
          static_cast<std::uint16_t>(map.table_address[run.table % kMaxLevelTables] >> kEntryShift),
          static_cast<std::uint16_t>((run.half != 0 ? 64 : 128) * run.width), tile_kind(run),
          static_cast<std::uint8_t>(run.tiles), 0};
    }
    done += count;
    tiles = side->tiles;
    for (int i = side->run_count; i < count; ++i) tiles -= side->runs[i].tiles;
    (side == &head.k ? work.key_tiles : work.value_tiles) = tiles;
  }
  work.runs = runs;
  work.key_runs = head.k.run_count, work.key_outlier_runs = head.k.outlier_runs;
  work.value_runs = head.v.run_count, work.value_outlier_runs = head.v.outlier_runs;
  work.tile_end = head.k.norm_offset;
  work.key_norms = head.k.norm_offset, work.value_norms = head.v.norm_offset;
  work.norm_bytes[0] = head.k.norm_bytes, work.norm_bytes[1] = head.v.norm_bytes;
  const std::int64_t column = segment * kColumns + 2 * (lane() & 3);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    work.bias[e] = v.bias[column + e];
    work.constant[e] = v.layer.k_mean ? v.constant[column + e] : 0;
  }
  sync_warp();
}

// Pages first .. first + count - 1 of the sequence.
template <int Pages, bool Outliers>
KVPLAN_DEVICE void attend_pages(const AttentionView& v, const Work& work, Running& r, int first,
                                int count) {
  PageList list;
  list.pages = v.layer.pool + v.layer.heads[work.head].block_offset;
  list.blocks =
      v.batch.page_table + std::int64_t{v.batch.slot[work.sequence]} * v.batch.table_stride + first;
  list.block_bytes = v.layer.block_bytes;
  list.count = count;
  list.start();
  const SharedMap& map = v.layer.shared;
  Stream<Pages> stream;
  stream.ring = static_cast<std::uint32_t>(map.rings + warp() * Pages * map.ring_bytes);
  stream.mask = static_cast<std::uint32_t>(map.ring_bytes) - 1;
  stream.end = work.tile_end;
  const std::uint32_t chunks = (work.tile_end + kChunk - 1) / kChunk;
  stream.turn = kChunk * (chunks > kDepth ? chunks : kDepth);
  // Where the lane starts to copy the group that starts at `done`; null behind the end.
  const auto source_of = [&](int done) {
    constexpr int kShare = Stream<Pages>::kLanesPerPage;
    const std::byte* mine = nullptr;
#pragma unroll
    for (int n = 0; n < Pages; ++n) {
      const std::byte* page = list.page(done + n);
      if (lane() / kShare == n && done < count) mine = page + 16 * (lane() % kShare);
    }
    return mine;
  };
  stream.next = source_of(Pages);
  stream.start(source_of(0));
#pragma unroll 1
  for (int done = 0; done < count; done += Pages) {
    attend_group<Pages, Outliers>(v, work, r, stream, list, done, first + done);
    // The stream has gone over to the next group by now, or does so with its next chunk.
    stream.next = source_of(done + 2 * Pages);
    list.go_to(done + Pages);
  }
}

}  // namespace kvplan::kernels
