// How the shared memory of the decode kernel is laid out.

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/tile_plan.h"
#include "kernels/views.h"
#include "schemas/error.h"

namespace kvplan::kernels {
namespace {

constexpr std::size_t kMaxShared = 227 * 1024;
constexpr int kRows = quant::kPageTokens / 16;
constexpr int kLanes = quant::kWarpLanes;

/// First fit of aligned ranges in the shared window.
class SharedSpace {
 public:
  /// -> address, or -1 when it does not fit.
  std::int64_t take(std::size_t bytes, std::size_t alignment) {
    for (std::size_t i = 0; i < gaps_.size(); ++i) {
      const auto [begin, end] = gaps_[i];
      const std::size_t at = (begin + alignment - 1) / alignment * alignment;
      if (at + bytes > end) continue;
      gaps_[i] = {begin, at};
      gaps_.insert(gaps_.begin() + static_cast<std::ptrdiff_t>(i) + 1, {at + bytes, end});
      used_ = std::max(used_, at + bytes);
      return static_cast<std::int64_t>(at);
    }
    return -1;
  }
  std::size_t used() const { return used_ - kSharedBase; }

 private:
  struct Gap {
    std::size_t begin, end;
  };
  std::vector<Gap> gaps_ = {{kSharedBase, kSharedBase + kMaxShared}};
  std::size_t used_ = kSharedBase;
};

std::size_t rounded(std::size_t bytes) { return (bytes + 127) / 128 * 128; }

// Instructions of a warp on a tile (keys and values together, halved), as compiled for sm_90a.
std::uint32_t tile_instructions(const quant::TileRun& run) {
  constexpr std::uint32_t kBytes[] = {0, 28, 29, 36, 44, 71, 126, 0, 25};
  constexpr std::uint32_t kTables[] = {0, 0, 95, 70, 65, 135, 135, 135, 125};
  if (run.code == quant::TileCode::kHalf) return run.half != 0 ? 70 : 30;
  const std::uint32_t full = (run.code == quant::TileCode::kBytes ? kBytes : kTables)[run.width];
  return run.half != 0 ? full / 2 + 20 : full;
}

/// Index in kUniformWidths of a layer, or -1.
int uniform_kind(const quant::LayerFormat& format, int phase_steps, int columns) {
  if (phase_steps > 0 || columns > kColumns / 2) return -1;
  const auto whole = [](const quant::SideLayout& side) {
    return side.run_count == 1 && side.outlier_runs == 0 && side.norm_bytes == 2 &&
           side.runs[0].code == quant::TileCode::kBytes && side.runs[0].half == 0;
  };
  const auto widths = [](const quant::HeadLayout& head) {
    return UniformWidths{head.k.runs[0].width, head.v.runs[0].width, head.k.runs[0].tiles};
  };
  for (const quant::HeadLayout& head : format.heads)
    if (!whole(head.k) || !whole(head.v) || head.k.runs[0].tiles != head.v.runs[0].tiles ||
        widths(head) != widths(format.heads.front()))
      return -1;
  const auto* found =
      std::find(std::begin(kUniformWidths), std::end(kUniformWidths), widths(format.heads.front()));
  return found == std::end(kUniformWidths) ? -1
                                           : static_cast<int>(found - std::begin(kUniformWidths));
}

/// Whether MixedPath attends to a layer.
bool is_mixed(const quant::LayerFormat& format, int phase_steps, int columns) {
  if (columns > kColumns / 2 || phase_steps > kMaxMixedSteps || !has_only_bytes(format))
    return false;
  const int norm_bytes = format.heads.front().k.norm_bytes;
  return norm_bytes > 0 && std::ranges::all_of(format.heads, [&](const quant::HeadLayout& head) {
           return head.k.norm_bytes == norm_bytes && head.v.norm_bytes == norm_bytes;
         });
}

}  // namespace

bool has_only_bytes(const quant::LayerFormat& format) {
  for (const quant::HeadLayout& head : format.heads)
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i)
        if (side->runs[i].code != quant::TileCode::kBytes) return false;
  return true;
}

WorkCosts work_costs(const quant::LayerFormat& format, int phase_steps) {
  constexpr std::uint32_t kPage = 330, kRun = 10;
  const std::uint32_t rotary_step = has_only_bytes(format) ? 14 : 40;
  if (format.heads.size() > kMaxKvHeads)
    throw InternalError("the decode kernel serves at most " + std::to_string(kMaxKvHeads) +
                        " KV heads, found " + std::to_string(format.heads.size()));
  WorkCosts costs;
  for (std::size_t h = 0; h < format.heads.size(); ++h) {
    const quant::HeadLayout& head = format.heads[h];
    std::uint32_t sum = kPage + rotary_step * static_cast<std::uint32_t>(phase_steps);
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i)
        sum += kRun + tile_instructions(side->runs[i]) * side->runs[i].tiles;
    costs.head[h] = sum;
    costs.all += sum;
  }
  return costs;
}

DecodeShape decode_shape(const quant::LayerFormat& format, int head_dim, int phase_steps,
                         bool split_tile, int columns, int multiprocessors) {
  DecodeShape shape;
  shape.blocks = multiprocessors;
  // Tables that a run looks up, the largest first.
  std::vector<int> tables;
  std::size_t query_tiles = 0, value_tiles = 0, slot_bytes = 0, runs = 0;
  for (const quant::HeadLayout& head : format.heads) {
    query_tiles = std::max(query_tiles, static_cast<std::size_t>(head.k.tiles));
    value_tiles = std::max(value_tiles, static_cast<std::size_t>(head.v.tiles));
    const std::uint32_t keys = quant::key_tile_bytes(head);
    slot_bytes = std::max({slot_bytes, std::size_t{keys}, std::size_t{head.page_bytes - keys}});
    runs = std::max(runs, static_cast<std::size_t>(head.k.run_count + head.k.outlier_runs +
                                                   head.v.run_count + head.v.outlier_runs));
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i) {
        const quant::TileRun& run = side->runs[i];
        if (run.code != quant::TileCode::kTable) continue;
        shape.shared.table_width[run.table] = run.width;
        if (std::find(tables.begin(), tables.end(), run.table) == tables.end())
          tables.push_back(run.table);
      }
  }
  const std::size_t output_tiles =
      std::max(value_tiles, static_cast<std::size_t>(head_dim + 15) / 16);
  std::stable_sort(tables.begin(), tables.end(), [&](int a, int b) {
    return table_bytes(shape.shared.table_width[a]) > table_bytes(shape.shared.table_width[b]);
  });
  SharedSpace space;
  const auto take = [&](std::size_t bytes, std::size_t alignment) {
    const std::int64_t at = space.take(bytes, alignment);
    if (at < 0)
      throw InternalError("level tables of a layer do not fit into shared memory: " +
                          std::to_string(tables.size()) + " tables");
    return static_cast<std::int32_t>(at);
  };
  for (const int table : tables) {
    const auto bytes = static_cast<std::size_t>(table_bytes(shape.shared.table_width[table]));
    shape.shared.table_address[table] = take(bytes, bytes);
  }
  const std::size_t rotary_bytes =
      static_cast<std::size_t>(phase_steps) * kRows * kLanes * sizeof(uint4);
  if (rotary_bytes > 0) shape.shared.rotary_tile = take(rotary_bytes, 128);
  if (rotary_bytes > 0 && split_tile) shape.shared.rotary_tile_low = take(rotary_bytes, 128);

  // A warp's parts, one after the other.
  std::size_t warp_bytes = 0;
  const auto part = [&](std::size_t bytes) {
    const std::size_t at = warp_bytes;
    warp_bytes += rounded(bytes);
    return static_cast<std::int32_t>(at);
  };
  constexpr std::size_t kBarrierBytes = 8;
  const std::size_t output_bytes = (columns <= kColumns / 2 ? 2 : 4) * sizeof(float);
  shape.shared.query_offset = part(query_tiles * kLanes * sizeof(uint2));
  shape.shared.output_offset = part(output_tiles * kLanes * output_bytes);
  shape.shared.state_offset = part(sizeof(SegmentState));
  shape.shared.runs_offset = part(runs * sizeof(RunEntry));
  const std::size_t columns_kept = columns <= kColumns / 2 ? kColumns / 2 : kColumns;
  const auto frequencies = static_cast<std::size_t>(8 * phase_steps);
  shape.shared.centre_offset = part(frequencies * columns_kept * sizeof(float2));
  shape.shared.list_offset = part(kPageListBytes);
  shape.shared.barriers_offset = part(8 * kBarrierBytes);
  shape.shared.slot_bytes = static_cast<std::int32_t>(rounded(slot_bytes));
  // Units of two pages hide more latency and share more work, but must leave room for all warps.
  const std::size_t page_slots = 2 * rounded(slot_bytes) + frequencies * sizeof(float2);
  shape.shared.feed_offset = static_cast<std::int32_t>(warp_bytes);
  shape.uniform = uniform_kind(format, phase_steps, columns);
  shape.mixed = shape.uniform < 0 && is_mixed(format, phase_steps, columns);
  if (shape.mixed) {
    shape.shared.mixed_offset = part(mixed_bytes(phase_steps));
    shape.shared.feed_offset = static_cast<std::int32_t>(warp_bytes);
  }
  const std::size_t room = (kMaxShared - space.used()) / 128 * 128;
  if (shape.mixed) {
    // A half of a page at work and one on its way; of most heads halves are smaller, and more.
    for (int warps = kDecodeWarps; warps > 0; --warps) {
      const std::size_t each = room / static_cast<std::size_t>(warps) / 128 * 128;
      if (each < warp_bytes + 2 * rounded(slot_bytes)) continue;
      shape.shared.ring_bytes = static_cast<std::int32_t>(each - warp_bytes);
      shape.shared.warp_region = take(each * static_cast<std::size_t>(warps), 128);
      shape.shared.warp_bytes = static_cast<std::int32_t>(each);
      shape.block_warps = warps;
      shape.shared_bytes = space.used();
      return shape;
    }
    shape.mixed = false;
  }
  if (shape.uniform >= 0) {
    // Keys of a page, values of the one before, and one half on its way.
    constexpr std::size_t kFewestSlots = 3, kMostSlots = 8;
    const std::size_t slot = rounded(slot_bytes);
    for (int warps = kDecodeWarps; warps > 0; --warps) {
      const std::size_t each = room / static_cast<std::size_t>(warps) / 128 * 128;
      const std::size_t slots =
          each < warp_bytes ? 0 : std::min((each - warp_bytes) / slot, kMostSlots);
      if (slots < kFewestSlots) continue;
      const std::size_t bytes = warp_bytes + slots * slot;
      shape.shared.feed_slots = static_cast<std::int32_t>(slots);
      shape.shared.warp_region = take(bytes * static_cast<std::size_t>(warps), 128);
      shape.shared.warp_bytes = static_cast<std::int32_t>(bytes);
      shape.block_warps = warps;
      shape.shared_bytes = space.used();
      return shape;
    }
    shape.uniform = -1;
  }
  for (const int pages : {2, 1}) {
    if (pages == 2 && (columns > kColumns / 2 || !has_only_bytes(format))) continue;
    const std::size_t bytes = warp_bytes + rounded(static_cast<std::size_t>(pages) * page_slots);
    for (int warps = kDecodeWarps; warps > (pages == 2 ? kDecodeWarps - 1 : 0); --warps) {
      SharedSpace with_warps = space;
      const std::int64_t region = with_warps.take(bytes * static_cast<std::size_t>(warps), 128);
      if (region < 0) continue;
      shape.unit_pages = pages;
      shape.shared.warp_region = static_cast<std::int32_t>(region);
      shape.shared.warp_bytes = static_cast<std::int32_t>(bytes);
      shape.block_warps = warps;
      shape.shared_bytes = with_warps.used();
      return shape;
    }
  }
  throw InternalError("no warp of the decode kernel fits into shared memory at head_dim " +
                      std::to_string(head_dim));
}

}  // namespace kvplan::kernels
