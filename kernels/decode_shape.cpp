// How the shared memory of the decode kernel is laid out.

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/round.h"
#include "kernels/tile_plan.h"
#include "kernels/views.h"
#include "schemas/error.h"

namespace kvplan::kernels {
namespace {

constexpr std::size_t kMaxShared = 227 * 1024;
constexpr int kRows = quant::kPageTokens / 16;
constexpr int kLanes = quant::kWarpLanes;

[[noreturn]] void refuse_plan() {
  throw InputError("plan.json", "/layers",
                   "the tables of a layer leave attention no room in the shared memory of a "
                   "multiprocessor; plan with fewer different widths in a layer, or with codebooks "
                   "on bytes (lloyd_max_byte, uniform)");
}

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
  /// -> address. InputError when it does not fit.
  std::int64_t require(std::size_t bytes, std::size_t alignment) {
    const std::int64_t at = take(bytes, alignment);
    if (at < 0) refuse_plan();
    return at;
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

/// Its parts, one after the other, aligned to 16 bytes.
class Record {
 public:
  std::int32_t take(std::size_t bytes) {
    const std::size_t at = end_;
    end_ += (bytes + 15) / 16 * 16;
    return static_cast<std::int32_t>(at);
  }
  std::int32_t end() const { return static_cast<std::int32_t>(end_); }

 private:
  std::size_t end_ = 0;
};

constexpr std::size_t kBarrierBytes = 8;
// Of the pieces of a round together, unless even one takes more.
constexpr std::size_t kMostPieceBytes = 28 * 1024;

// Instructions of a warp on a tile (keys and values together, halved), as compiled for sm_90a.
std::uint32_t tile_instructions(const quant::TileRun& run) {
  constexpr std::uint32_t kBytes[] = {0, 28, 28, 36, 52, 69, 120, 0, 26};
  constexpr std::uint32_t kTables[] = {0, 0, 95, 70, 65, 135, 135, 135, 125};
  if (run.code == quant::TileCode::kHalf) return run.half != 0 ? 70 : 30;
  if (run.code == quant::TileCode::kTrellis) return run.half != 0 ? 110 : 165;
  const std::uint32_t full = (run.code == quant::TileCode::kBytes ? kBytes : kTables)[run.width];
  return run.half != 0 ? full / 2 + 20 : full;
}

/// Places the level tables that runs look up, the largest first, each on a multiple of its size.
void place_tables(const quant::LayerFormat& format, SharedSpace& space, SharedMap& map) {
  std::vector<int> tables;
  for (const quant::HeadLayout& head : format.heads)
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i) {
        const quant::TileRun& run = side->runs[i];
        const bool trellis = run.code == quant::TileCode::kTrellis;
        if (run.code != quant::TileCode::kTable && !trellis) continue;
        if (std::ranges::find(tables, run.table) != tables.end()) continue;
        tables.push_back(run.table);
        map.table_width[run.table] = run.width;
        map.of_trellis[run.table] = trellis;
        map.tables = std::max(map.tables, run.table + 1);
      }
  const auto bytes = [&](int table) {
    const int width = map.table_width[table];
    return static_cast<std::size_t>(map.of_trellis[table] ? 4 * trellis_entries(width)
                                                          : table_bytes(width));
  };
  std::ranges::stable_sort(tables, std::ranges::greater{}, bytes);
  for (const int table : tables)
    map.table_address[table] = static_cast<std::int32_t>(space.require(bytes(table), bytes(table)));
}

/// Index in kUniformWidths of a layer, or -1.
int uniform_kind(const quant::LayerFormat& format, int phase_steps) {
  if (phase_steps > 0) return -1;
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
bool is_mixed(const quant::LayerFormat& format, int columns) {
  if (columns > kColumns / 2 || layer_codes(format) != LayerCodes::kBytes) return false;
  const int norm_bytes = format.heads.front().k.norm_bytes;
  return norm_bytes > 0 && std::ranges::all_of(format.heads, [&](const quant::HeadLayout& head) {
           return head.k.norm_bytes == norm_bytes && head.v.norm_bytes == norm_bytes;
         });
}

}  // namespace

LayerCodes layer_codes(const quant::LayerFormat& format) {
  bool trellis = false, other = false;
  for (const quant::HeadLayout& head : format.heads)
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i) {
        const quant::TileCode code = side->runs[i].code;
        trellis = trellis || code == quant::TileCode::kTrellis;
        other = other || (code != quant::TileCode::kTrellis && code != quant::TileCode::kBytes);
      }
  if (other) return trellis ? LayerCodes::kAny : LayerCodes::kOther;
  return trellis ? LayerCodes::kTrellis : LayerCodes::kBytes;
}

WorkCosts work_costs(const quant::LayerFormat& format, int phase_steps) {
  constexpr std::uint32_t kPage = 330, kRun = 10, kChunk = 600, kStart = 900;
  const std::uint32_t rotary_step = layer_codes(format) == LayerCodes::kBytes ? 34 : 40;
  if (format.heads.size() > kMaxKvHeads)
    throw InternalError("the decode kernel serves at most " + std::to_string(kMaxKvHeads) +
                        " KV heads, found " + std::to_string(format.heads.size()));
  std::vector<std::uint32_t> instructions;
  for (const quant::HeadLayout& head : format.heads) {
    std::uint32_t& sum =
        instructions.emplace_back(kPage + rotary_step * static_cast<std::uint32_t>(phase_steps));
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i)
        sum += kRun + tile_instructions(side->runs[i]) * side->runs[i].tiles;
  }
  // In units that leave room for long lines in 32 bits.
  const std::uint32_t most = std::max(*std::ranges::max_element(instructions), kChunk);
  const auto scaled = [&](std::uint32_t cost) {
    return std::max(1u, (cost * kMostCost + most / 2) / most);
  };
  WorkCosts costs;
  costs.chunk = scaled(kChunk);
  costs.start = scaled(kStart);
  for (std::size_t h = 0; h < instructions.size(); ++h)
    costs.before[h + 1] = costs.before[h] + scaled(instructions[h]);
  return costs;
}

DecodeShape decode_shape(const quant::LayerFormat& format, int head_dim, int phase_steps,
                         bool split_tile, int columns, int multiprocessors) {
  DecodeShape shape;
  shape.blocks = std::min(multiprocessors, kMaxBlocks);
  std::size_t query_tiles = 0, value_tiles = 0, slot_bytes = 0, runs = 0;
  for (const quant::HeadLayout& head : format.heads) {
    query_tiles = std::max(query_tiles, static_cast<std::size_t>(head.k.tiles));
    value_tiles = std::max(value_tiles, static_cast<std::size_t>(head.v.tiles));
    const std::uint32_t keys = quant::key_tile_bytes(head);
    slot_bytes = std::max({slot_bytes, std::size_t{keys}, std::size_t{head.page_bytes - keys}});
    runs = std::max(runs, static_cast<std::size_t>(head.k.run_count + head.k.outlier_runs +
                                                   head.v.run_count + head.v.outlier_runs));
  }
  SharedSpace space;
  place_tables(format, space, shape.shared);
  const SharedSpace behind_tables = space;
  /// What a block has once: of the rotary tile the first `rows` blocks of 16 positions.
  const auto place_block = [&](int rows) {
    space = behind_tables;
    const std::size_t bytes = static_cast<std::size_t>(phase_steps * rows * kLanes) * sizeof(uint4);
    const auto take = [&](std::size_t part) {
      return static_cast<std::int32_t>(space.require(part, 128));
    };
    if (bytes > 0) shape.shared.rotary_tile = take(bytes);
    if (bytes > 0 && split_tile) shape.shared.rotary_tile_low = take(bytes);
    shape.shared.round = take(rounded(sizeof(Round)));
  };

  const int columns_kept = columns <= kColumns / 2 ? kColumns / 2 : kColumns;
  const auto frequencies = static_cast<std::size_t>(8 * phase_steps);
  Record piece, warp;
  shape.shared.query_offset = piece.take(query_tiles * kLanes * sizeof(uint2));
  shape.shared.terms_offset = piece.take(kColumns * sizeof(ColumnTerms));
  shape.shared.runs_offset = piece.take(runs * sizeof(RunEntry));
  shape.shared.centre_offset =
      piece.take(frequencies * static_cast<std::size_t>(columns_kept) * sizeof(float2));
  shape.shared.piece_bytes = piece.end();
  shape.shared.state_offset = warp.take(sizeof(WarpState));
  shape.shared.list_offset = warp.take(kPageListBytes);
  shape.uniform = uniform_kind(format, phase_steps);
  shape.mixed = shape.uniform < 0 && is_mixed(format, columns);
  shape.shared.mixed_offset = warp.take(shape.mixed ? sizeof(TileTables) : 0);
  shape.shared.barriers_offset = warp.take(kMostSlots * kBarrierBytes);
  shape.shared.warp_bytes = warp.end();
  const std::size_t output_tiles =
      std::max(value_tiles, static_cast<std::size_t>(plain_tiles(head_dim)));
  shape.shared.output_bytes = static_cast<std::int32_t>(
      rounded(output_tiles * kLanes * static_cast<std::size_t>(columns_kept) / 2 * sizeof(float)));
  const std::size_t slot = rounded(slot_bytes);
  shape.shared.slot_bytes = static_cast<std::int32_t>(slot);

  /// Room for `warps` of them with feeds of feed_bytes, and for the pieces of a round.
  const auto place = [&](int warps, std::size_t feed_bytes) {
    const auto all = [&](std::size_t bytes) { return static_cast<std::size_t>(warps) * bytes; };
    const auto outputs = all(static_cast<std::size_t>(shape.shared.output_bytes)),
               feeds = all(feed_bytes);
    int pieces = kMaxPieces;
    for (; pieces > 0; --pieces) {
      const ResultMemory results(head_dim, columns_kept, pieces, has_direct(layer_codes(format)));
      const int rows = pieces * columns_kept;
      const auto products = static_cast<std::size_t>(4 * rows * results.stride);
      const auto measures = static_cast<std::size_t>(8 * rows * (results.stride / 16));
      shape.shared.measures = static_cast<std::int32_t>(products);
      const auto kept = static_cast<std::size_t>(pieces * shape.shared.piece_bytes);
      if (static_cast<std::size_t>(results.bytes) <= feeds && products + measures <= outputs &&
          kept <= (pieces > 1 ? kMostPieceBytes : kMaxShared))
        break;
    }
    if (pieces == 0) return false;
    SharedSpace with = space;
    const std::int64_t at[] = {
        with.take(static_cast<std::size_t>(pieces * shape.shared.piece_bytes), 128),
        with.take(all(static_cast<std::size_t>(shape.shared.warp_bytes)), 128),
        with.take(outputs, 128), with.take(feeds, 128)};
    for (const std::int64_t address : at)
      if (address < 0) return false;
    shape.shared.most_pieces = pieces;
    shape.shared.pieces = static_cast<std::int32_t>(at[0]);
    shape.shared.warps = static_cast<std::int32_t>(at[1]);
    shape.shared.outputs = static_cast<std::int32_t>(at[2]);
    shape.shared.measures += shape.shared.outputs;
    shape.shared.feeds = static_cast<std::int32_t>(at[3]);
    shape.shared.feed_bytes = static_cast<std::int32_t>(feed_bytes);
    shape.block_warps = warps;
    shape.shared_bytes = with.used();
    return true;
  };

  if (shape.mixed) {
    // Room for half a page of any head; of most heads it is room for pages.
    std::size_t half = 0, page = 0;
    for (const quant::HeadLayout& head : format.heads) {
      const std::size_t phases = 2 * frequencies * sizeof(float2);
      half = std::max({half, quant::key_tile_bytes(head) + phases,
                       std::size_t{head.page_bytes} - quant::key_tile_bytes(head)});
      page = std::max(page, head.page_bytes + phases);
    }
    place_block(kHalfPageRows);
    const std::size_t least = std::max(half, page * 3 / 4);
    for (int warps = kMixedWarps; warps >= kMixedWarps / 2; --warps)
      for (std::size_t ring = kMaxShared / static_cast<std::size_t>(warps) / 128 * 128;
           ring >= least; ring -= 128)
        if (place(warps, ring)) {
          shape.shared.ring_bytes = static_cast<std::int32_t>(ring);
          return shape;
        }
    shape.mixed = false;
  }
  place_block(kRows);
  if (shape.uniform >= 0) {
    // Halves of pages: keys of a page, values of the one before, and one half on its way; loops
    // hold one half at a time.
    const int tiles = kUniformWidths[shape.uniform].tiles;
    const std::size_t fewest = tiles <= kMostUnrolledTiles ? 3 : 2;
    for (int warps = uniform_warps(columns); warps > 0; --warps)
      for (std::size_t slots = static_cast<std::size_t>(kMostSlots); slots >= fewest; --slots)
        if (place(warps, slots * slot)) {
          shape.shared.feed_slots = static_cast<std::int32_t>(slots);
          return shape;
        }
    shape.uniform = -1;
  }
  for (int warps = kDecodeWarps; warps > 0; --warps)
    if (place(warps, rounded(2 * slot + 2 * frequencies * sizeof(float2)))) return shape;
  refuse_plan();
}

}  // namespace kvplan::kernels
