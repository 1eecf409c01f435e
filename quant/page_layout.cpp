#include "quant/page_layout.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "quant/byte_levels.h"
#include "quant/codec_checks.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kSignWidth = 1;
constexpr double kLevelTolerance = 1e-6;  // relative
constexpr std::size_t kMaxTables = 256;   // TileRun::table is a byte

std::uint32_t rounded_up(std::uint32_t bytes) {
  constexpr auto kUnit = static_cast<std::uint32_t>(kPageAlignment);
  return (bytes + kUnit - 1) / kUnit * kUnit;
}

/// InputError unless two levels are -x and x: the kernels read a code of one bit as a sign.
void require_mirrored(std::span<const float> levels) {
  if (std::abs(levels[0] + levels[1]) <= kLevelTolerance * levels[1]) return;
  throw InputError("plan.safetensors", "levels.1",
                   "pages hold codes of one bit as signs; expected levels -x and x, found " +
                       std::to_string(levels[0]) + " and " + std::to_string(levels[1]));
}

/// Lays out the heads of one layer, handing out level tables.
class LayerBuilder {
 public:
  LayerBuilder(LayerFormat& format, int layer) : format_(format), layer_(layer) {}

  void add_head(std::size_t index) {
    HeadLayout head;
    page_bytes_ = 0;
    lay_tiles(head.k, format_.k, Side::kKey, index);
    lay_tiles(head.v, format_.v, Side::kValue, index);
    for (SideLayout* const side : {&head.k, &head.v})
      side->norm_offset = take(kPageTokens * static_cast<std::size_t>(side->norm_bytes));
    for (SideLayout* const side : {&head.k, &head.v})
      side->scale_offset = take(side->outliers > 0 ? kPageTokens * kScaleBytes : 0);
    head.page_bytes = rounded_up(page_bytes_);
    head.block_offset = format_.block_bytes;
    format_.block_bytes += head.page_bytes;
    format_.heads.push_back(head);
  }

 private:
  void lay_tiles(SideLayout& layout, const TransformCodecSpec& spec, Side side, std::size_t index) {
    const HeadTransform& head = spec.heads[index];
    const std::string pointer =
        side_pointer(layer_, side) + "/heads/" + std::to_string(index) + "/";
    if (head.fp16) {
      layout.coded = spec.geometry.head_dim;
      TileRun run;
      run.code = TileCode::kHalf;
      run.width = kFp16Width;
      layout.run_count = add_runs(layout, run, layout.coded, pointer + "widths");
      return;
    }
    layout.coded = head.coded();
    layout.norm_bytes = spec.norm == NormFormat::kLog8 ? 1 : 2;
    for (const CodeRun& codes : head.runs) {
      if (codes.trellis()) continue;
      if (codes.width == kSignWidth) require_mirrored(codes.levels);
      TileRun run;
      run.width = static_cast<std::uint8_t>(codes.width);
      run.table = table_of(codes.levels, pointer + "widths");
      run.coordinate = static_cast<std::uint16_t>(codes.begin);
      if (const auto bytes = byte_levels(codes.levels)) {
        run.code = TileCode::kBytes;
        run.step = bytes->step;
        run.byte_offset = bytes->offset;
      }
      layout.run_count += add_runs(layout, run, codes.end - codes.begin, pointer + "widths");
    }
    lay_streams(layout, head, pointer);
    layout.outliers = static_cast<std::int32_t>(head.outliers.size());
    TileRun run;
    run.code = TileCode::kInteger;
    run.width = kOutlierWidth;
    layout.outlier_runs = add_runs(layout, run, layout.outliers, pointer + "outliers");
  }

  /// The runs of the head's trellis, which are its last ones.
  void lay_streams(SideLayout& layout, const HeadTransform& head, const std::string& pointer) {
    int bits = 0;
    const int first = layout.run_count;
    for (const CodeRun& codes : head.runs) {
      if (!codes.trellis()) continue;
      TileRun run;
      run.code = TileCode::kTrellis;
      run.width = static_cast<std::uint8_t>(codes.width);
      run.table = table_of(codes.levels, pointer + "widths");
      run.coordinate = static_cast<std::uint16_t>(codes.begin);
      run.bit = static_cast<std::uint16_t>(bits);
      layout.run_count += add_runs(layout, run, codes.end - codes.begin, pointer + "widths");
      bits += codes.width * (codes.end - codes.begin);
    }
    layout.stream_bytes = bits / 8;
    layout.stream_offset = take(kPageTokens * static_cast<std::size_t>(layout.stream_bytes));
    for (int r = first; r < layout.run_count; ++r) layout.runs[r].offset = layout.stream_offset;
  }

  /// Full tiles, then the half tile that is left; returns how many runs that takes.
  int add_runs(SideLayout& layout, TileRun run, int coordinates, const std::string& field) {
    if (coordinates % tile_coordinates(true) != 0)
      throw InputError("plan.json", field,
                       "a page holds tiles of 16 coordinates of one width and half tiles of 8; "
                       "expected a multiple of 8 coordinates, found " +
                           std::to_string(coordinates));
    TileRun* const first = layout.runs + layout.run_count;
    TileRun* next = first;
    const bool stored = run.code != TileCode::kTrellis;  // as tiles
    run.tiles = static_cast<std::uint16_t>(coordinates / kTileCoordinates);
    if (run.tiles > 0) {
      if (stored) run.offset = take(run.tiles * tile_bytes(run.width, false));
      *next++ = run;
    }
    if (coordinates % kTileCoordinates != 0) {
      const int before = run.tiles * kTileCoordinates;
      run.coordinate = static_cast<std::uint16_t>(run.coordinate + before);
      if (!stored) run.bit = static_cast<std::uint16_t>(run.bit + before * run.width);
      run.tiles = 1;
      run.half = 1;
      if (stored) run.offset = take(tile_bytes(run.width, true));
      *next++ = run;
    }
    for (const TileRun* r = first; r != next; ++r) layout.tiles += r->tiles;
    return static_cast<int>(next - first);
  }

  std::uint32_t take(std::size_t bytes) {
    const std::uint32_t offset = rounded_up(page_bytes_);
    page_bytes_ = offset + static_cast<std::uint32_t>(bytes);
    return offset;
  }

  std::uint8_t table_of(const std::vector<float>& levels, const std::string& field) {
    auto& tables = format_.tables;
    const auto found = std::ranges::find(tables, levels);
    const auto index = static_cast<std::size_t>(found - tables.begin());
    if (index == kMaxTables)
      throw InputError("plan.json", field,
                       "a layer of the cache holds at most 256 different sets of levels");
    if (found == tables.end()) tables.push_back(levels);
    return static_cast<std::uint8_t>(index);
  }

  static constexpr int kScaleBytes = 2;

  LayerFormat& format_;
  int layer_;
  std::uint32_t page_bytes_ = 0;  // of the head at work
};

}  // namespace

std::vector<LayerFormat> page_format(const PlanBundle& bundle) {
  if (bundle.plan.page_tokens != kPageTokens)
    throw InputError("plan.json", "/page_tokens",
                     "the CUDA runtime and the paged cache have pages of " +
                         std::to_string(kPageTokens) + " tokens, found " +
                         std::to_string(bundle.plan.page_tokens));
  std::vector<LayerFormat> layers(bundle.plan.layers.size());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const int layer = static_cast<int>(l);
    layers[l].k = transform_spec(bundle, layer, Side::kKey);
    layers[l].v = transform_spec(bundle, layer, Side::kValue);
    LayerBuilder builder(layers[l], layer);
    for (std::size_t head = 0; head < layers[l].k.heads.size(); ++head) builder.add_head(head);
  }
  return layers;
}

}  // namespace kvplan::quant
