#include "kernels/static_data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/device_memory.h"
#include "quant/packing.h"
#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::kernels {
namespace {

constexpr std::size_t kLevels = 256, kBoundaries = 255;  // of a table, whatever its width
constexpr int kTileTokens = 16;                          // rows of an operand A
constexpr int kTiles = quant::kPageTokens / kTileTokens;
// Above this ratio of |mean|^2 to the energy of the deviations the rounding of the rotary tile to
// fp16 (relative 2^-11) counts beside the error of the codes.
constexpr double kSplitRatio = 16;

static_assert(sizeof(EncoderView) == quant::kEncoderViewBytes);
static_assert(sizeof(RunEntry) == quant::kRunEntryBytes);

std::size_t size(int n) { return static_cast<std::size_t>(n); }

/// Fills the image part by part.
class ImageWriter {
 public:
  explicit ImageWriter(const std::byte* device) : device_(device) {}

  /// The next part, zeroed, to be filled before the next call; `on_device` is where it will be, or
  /// null for 0 bytes.
  template <class T>
  std::span<T> take(std::size_t bytes, const T*& on_device) {
    on_device = nullptr;
    if (bytes == 0) return {};
    const std::size_t offset = parts_.take(bytes);
    image_.resize(parts_.end());
    on_device = reinterpret_cast<const T*>(device_ + offset);
    return {reinterpret_cast<T*>(image_.data() + offset), bytes / sizeof(T)};
  }
  std::vector<std::byte> finish() { return std::move(image_); }

 private:
  const std::byte* device_;
  Parts parts_;
  std::vector<std::byte> image_;
};

/// Appends `values` to what was written to `part` before.
template <class T, class Source>
const T* append_to(std::span<T> part, std::size_t& used, const T* on_device, const Source& values) {
  const T* const at = values.empty() ? nullptr : on_device + used;
  std::ranges::copy(values, part.subspan(used).begin());
  used += values.size();
  return at;
}

void write_tables(const quant::LayerFormat& format, const quant::LayerBuffers& bytes,
                  ImageWriter& image, LayerView& view) {
  const auto levels = image.take(bytes.levels, view.levels);
  for (std::size_t t = 0; t < format.tables.size(); ++t)
    std::ranges::copy(format.tables[t], levels.subspan(t * kLevels).begin());
  const auto boundaries = image.take(bytes.boundaries, view.boundaries);
  for (const quant::TransformCodecSpec* const spec : {&format.k, &format.v})
    for (const quant::HeadTransform& head : spec->heads)
      for (const quant::CodeRun& run : head.runs) {
        const auto table = std::ranges::find(format.tables, run.levels) - format.tables.begin();
        std::ranges::copy(
            run.boundaries,
            boundaries.subspan(static_cast<std::size_t>(table) * kBoundaries).begin());
      }
}

/// Bytes 4 word .. of a run's levels; of 5 and 6 bits those of positive codes.
std::uint32_t table_word(const quant::TileRun& run, std::span<const float> levels, int word) {
  const int first = run.width > 4 ? 1 << (run.width - 1) : 0;
  const int count = run.width > 4 ? 1 << (run.width - 1) : 1 << run.width;
  std::uint32_t bytes = 0;
  for (int i = 4 * word; i < 4 * word + 4 && i < count; ++i) {
    const float byte = levels[size(first + i)] / run.step - run.byte_offset;
    bytes |= (static_cast<std::uint32_t>(std::lround(byte)) & 0xff) << 8 * (i % 4);
  }
  return bytes;
}

void write_runs(const quant::LayerFormat& format, const quant::LayerBuffers& bytes,
                ImageWriter& image, LayerView& view) {
  view.most_runs = static_cast<int>(quant::most_runs(format));
  const auto entries = image.take(bytes.runs, view.runs);
  auto entry = entries.begin();
  for (const quant::HeadLayout& head : format.heads) {
    auto next = entry;
    for (const quant::SideLayout* side : {&head.k, &head.v})
      for (int i = 0; i < side->run_count + side->outlier_runs; ++i, ++next) {
        const quant::TileRun& run = side->runs[i];
        next->table = run.table;
        if (run.code != quant::TileCode::kTrellis)
          next->bytes = static_cast<std::uint16_t>(quant::tile_bytes(run.width, run.half != 0));
        next->bit = run.bit;
        next->stream_bytes = static_cast<std::uint16_t>(side->stream_bytes);
        next->kind = tile_kind(run);
        next->tiles = static_cast<std::uint8_t>(run.tiles);
        if (run.code == quant::TileCode::kBytes)
          for (int word = 0; word < 8; ++word)
            next->levels[word] = table_word(run, format.tables[run.table], word);
      }
    entry += view.most_runs;
  }
}

/// LayerView::k_terms.
void write_terms(const quant::LayerFormat& format, std::size_t coordinates,
                 std::span<float2> terms) {
  for (std::size_t h = 0; h < format.heads.size(); ++h) {
    const quant::SideLayout& keys = format.heads[h].k;
    for (int r = 0; r < keys.run_count; ++r) {
      const quant::TileRun& run = keys.runs[r];
      if (run.code != quant::TileCode::kBytes) continue;
      const int count = run.tiles * quant::tile_coordinates(run.half != 0);
      for (int i = run.coordinate; i < run.coordinate + count; ++i)
        terms[h * coordinates + size(i)] = {run.step, run.step * run.byte_offset};
    }
  }
}

/// What all elements are but for their signs; 0: they differ.
float common_magnitude(std::span<const float> matrix) {
  const float magnitude = matrix.empty() ? 0 : std::abs(matrix.front());
  const bool all = std::ranges::all_of(matrix, [&](float x) { return std::abs(x) == magnitude; });
  return all ? magnitude : 0;
}

/// EncoderView::analysis.
std::vector<float> analysis_operand(const quant::HeadTransform& head, float magnitude) {
  const std::size_t coded = size(head.coded()), n = size(head.transformed());
  std::vector<float> operand(head.analysis.size());
  for (std::size_t i = 0; i < coded; ++i)
    for (std::size_t j = 0; j < n; ++j) {
      const float x = head.analysis[i * n + j];
      operand[j * coded + i] = magnitude > 0 ? std::copysign(1.0f, x) : x;
    }
  return operand;
}

void write_encoders(const quant::LayerFormat& format, const quant::LayerBuffers& bytes,
                    ImageWriter& image, LayerView& view) {
  const std::int32_t* device_channels;
  const float* device_analysis;
  const double* device_weights;
  std::size_t channels_used = 0, analysis_used = 0, weights_used = 0;
  std::vector<EncoderView> encoders;
  const auto for_each_head = [&](auto visit) {
    for (const quant::TransformCodecSpec* const spec : {&format.k, &format.v})
      for (const quant::HeadTransform& head : spec->heads) visit(head);
  };
  for_each_head([&](const quant::HeadTransform& head) {
    EncoderView& encoder = encoders.emplace_back();
    encoder.fp16 = head.fp16;
    encoder.transformed = head.transformed();
    encoder.coded = head.coded();
    encoder.magnitude = common_magnitude(head.analysis);
    for (const quant::CodeRun& run : head.runs)
      for (int i = run.begin; run.trellis() && i < run.end; ++i)
        encoder.heaviest = std::max(encoder.heaviest, head.weight[size(i)]);
  });
  const auto channels = image.take(bytes.channels, device_channels);
  auto encoder = encoders.begin();
  for_each_head([&](const quant::HeadTransform& head) {
    encoder->channels = append_to(channels, channels_used, device_channels, head.channels);
    encoder->outliers = append_to(channels, channels_used, device_channels, head.outliers);
    ++encoder;
  });
  const auto analysis = image.take(bytes.analysis, device_analysis);
  encoder = encoders.begin();
  for_each_head([&](const quant::HeadTransform& head) {
    encoder->analysis = append_to(analysis, analysis_used, device_analysis,
                                  analysis_operand(head, encoder->magnitude));
    ++encoder;
  });
  const auto weights = image.take(bytes.weights, device_weights);
  encoder = encoders.begin();
  for_each_head([&](const quant::HeadTransform& head) {
    (encoder++)->weight = append_to(weights, weights_used, device_weights, head.weight);
  });
  for (std::size_t i = 0; i < encoders.size(); ++i)
    if (encoders[i].fp16 != 0)
      view.fp16[i / size(view.kv_heads)].add(static_cast<int>(i % size(view.kv_heads)));
  std::ranges::copy(encoders, image.take(bytes.encoders, view.encoders).begin());
}

/// By storage coordinate of a head of `side`: the row that it has in the operands of its tiles.
std::vector<std::size_t> operand_rows(const quant::SideLayout& layout, Side side, std::size_t d) {
  std::vector<std::size_t> rows(d);
  for (std::size_t i = 0; i < d; ++i) rows[i] = i;
  for (int r = 0; r < layout.run_count; ++r) {
    const quant::TileRun& run = layout.runs[r];
    if (run.code != quant::TileCode::kTrellis || run.half != 0) continue;
    for (int i = 0; i < run.tiles * quant::kTileCoordinates; ++i) {
      const int position = i % quant::kTileCoordinates;
      rows[size(run.coordinate + i)] =
          size(run.coordinate + i - position + trellis_row(side, position));
    }
  }
  return rows;
}

/// Calls set(head, channel, storage coordinate, its row in operands, value) for the synthesis
/// matrices of a side; fp16 heads have the unit matrix.
template <class Set>
void for_each_synthesis(const quant::LayerFormat& format, Side side, Set set) {
  const quant::TransformCodecSpec& spec = side == Side::kKey ? format.k : format.v;
  const std::size_t d = size(spec.geometry.head_dim);
  for (std::size_t h = 0; h < spec.heads.size(); ++h) {
    const quant::HeadTransform& head = spec.heads[h];
    if (head.fp16)
      for (std::size_t i = 0; i < d; ++i) set(h, i, i, i, 1.0f);
    const std::size_t coded = size(head.coded());
    const std::vector<std::size_t> rows = operand_rows(format.heads[h].side(side), side, d);
    for (std::size_t j = 0; j < head.channels.size(); ++j)
      for (std::size_t i = 0; i < coded; ++i)
        set(h, size(head.channels[j]), i, rows[i], head.synthesis[j * coded + i]);
  }
}

/// A power of two that brings the largest number to at most 2^14.
float matrix_scale(std::span<const float> matrix) {
  float most = 0;
  for (const float x : matrix) most = std::max(most, std::abs(x));
  float scale = 1;
  while (most > 16384 * scale) scale *= 2;
  return scale;
}

/// Rows of a head's matrix as operands B: LayerView::k_matrix.
void write_operands(std::span<const float> matrix, std::size_t d, float scale,
                    std::span<uint4> operands) {
  const std::size_t tiles = (d + kTileTokens - 1) / kTileTokens;
  const auto halves = [&](std::size_t row, std::size_t column, bool rest) {
    std::uint32_t pair = 0;
    for (std::size_t i = 0; i < 2; ++i) {
      const float x = row < d && column + i < d ? matrix[row * d + column + i] / scale : 0;
      const std::uint16_t high = quant::to_half(x);
      const std::uint16_t half =
          rest ? quant::to_half((x - quant::from_half(high)) * kLowScale) : high;
      pair |= std::uint32_t{half} << 16 * i;
    }
    return pair;
  };
  std::size_t at = 0;
  for (std::size_t tile = 0; tile < tiles; ++tile)
    for (std::size_t step = 0; step < tiles; ++step)
      for (const bool rest : {false, true})
        for (std::size_t lane = 0; lane < quant::kWarpLanes; ++lane) {
          const std::size_t row = kTileTokens * tile + lane / 4;
          const std::size_t column = kTileTokens * step + 2 * (lane % 4);
          operands[at++] = {halves(row, column, rest), halves(row, column + 8, rest),
                            halves(row + 8, column, rest), halves(row + 8, column + 8, rest)};
        }
}

void write_means(const quant::TransformCodecSpec& spec, std::size_t bytes, ImageWriter& image,
                 const float*& on_device) {
  const auto means = image.take(bytes, on_device);
  for (std::size_t i = 0; i < means.size(); ++i) {
    // Heads stored as fp16 are not centred.
    const bool centred = !spec.heads[i / size(spec.geometry.head_dim)].fp16;
    means[i] = centred ? static_cast<float>(spec.mean->means()[i]) : 0;
  }
}

/// Operand A of the 64 positions of a page: rows 16 i + .. are positions, columns (cos, sin) of
/// eight frequencies.
struct RotaryTile {
  std::vector<uint4> high, low;
};

RotaryTile make_rotary_tile(std::span<const double> inv_freq, int phase_steps) {
  struct Pair {
    std::uint32_t high = 0, low = 0;
  };
  const auto halves = [&](int frequency, int position) {
    Pair pair;
    if (size(frequency) >= inv_freq.size()) return pair;
    const double angle = inv_freq[size(frequency)] * position;
    const double exact[2] = {quant::portable_cos(angle), quant::portable_sin(angle)};
    for (int i = 0; i < 2; ++i) {
      const std::uint16_t high = quant::to_half(static_cast<float>(exact[i]));
      const double rest = exact[i] - quant::from_half(high);
      const std::uint16_t low = quant::to_half(static_cast<float>(rest * kLowScale));
      pair.high |= std::uint32_t{high} << 16 * i;
      pair.low |= std::uint32_t{low} << 16 * i;
    }
    return pair;
  };
  RotaryTile tile;
  for (int step = 0; step < phase_steps; ++step)
    for (int i = 0; i < kTiles; ++i)
      for (int lane = 0; lane < quant::kWarpLanes; ++lane) {
        const int row = kTileTokens * i + lane / 4, frequency = 8 * step + 2 * (lane % 4);
        const Pair a0 = halves(frequency, row), a1 = halves(frequency, row + 8);
        const Pair a2 = halves(frequency + 1, row), a3 = halves(frequency + 1, row + 8);
        tile.high.push_back({a0.high, a1.high, a2.high, a3.high});
        tile.low.push_back({a0.low, a1.low, a2.low, a3.low});
      }
  return tile;
}

void write_rotary(const quant::RotaryMean& mean, int sink_tokens, const quant::LayerBuffers& bytes,
                  ImageWriter& image, LayerView& view) {
  const std::span<const double> inv_freq = mean.inv_freq();
  std::ranges::copy(inv_freq, image.take(bytes.inv_freq, view.inv_freq).begin());
  const auto phases = image.take(bytes.page_phase, view.page_phase);
  constexpr std::size_t kPairs = quant::kPhasePairs;
  const std::size_t stride = 2 * kPairs * size(view.phase_steps);
  for (std::size_t page = 0; page * stride < phases.size(); ++page)
    for (std::size_t half = 0; half < 2; ++half)
      for (std::size_t j = 0; j < inv_freq.size(); ++j) {
        const double position =
            sink_tokens + static_cast<double>(2 * page + half) * (quant::kPageTokens / 2);
        const double angle = inv_freq[j] * position;
        phases[page * stride + (j / kPairs * 2 + half) * kPairs + j % kPairs] = {
            static_cast<float>(quant::portable_cos(angle)),
            static_cast<float>(quant::portable_sin(angle))};
      }
  const RotaryTile tile = make_rotary_tile(inv_freq, view.phase_steps);
  std::ranges::copy(tile.high, image.take(bytes.rotary_tile, view.rotary_tile).begin());
  std::ranges::copy(tile.low, image.take(bytes.rotary_tile_low, view.rotary_tile_low).begin());
}

}  // namespace

bool needs_split_tile(const PlanBundle& bundle, const quant::LayerFormat& format,
                      std::size_t layer) {
  const quant::TransformCodecSpec& spec = format.k;
  if (!spec.mean) return false;
  if (bundle.plan.codec != "calibrated") return true;
  const std::size_t d = size(spec.geometry.head_dim);
  for (std::size_t h = 0; h < spec.heads.size(); ++h) {
    if (spec.heads[h].fp16) continue;
    double mean = 0, deviation = 0;
    for (const double x : spec.mean->means().subspan(h * d, d)) mean += x * x;
    for (const float a : bundle.tensors.layers[layer].k.synthesis.row(h))
      deviation += double{a} * a;
    if (mean > kSplitRatio * deviation) return true;
  }
  return false;
}

StaticData make_static_data(const PlanBundle& bundle, std::span<const quant::LayerFormat> formats,
                            const quant::CacheGeometry& geometry, const std::byte* device) {
  const int sink_tokens = bundle.plan.sink_tokens;
  const auto buffers = quant::layer_buffers(formats, sink_tokens, geometry);
  const auto owners = quant::rotary_owners(formats);
  ImageWriter image(device);
  StaticData data;
  for (std::size_t l = 0; l < formats.size(); ++l) {
    const quant::LayerFormat& format = formats[l];
    const quant::LayerBuffers& bytes = buffers[l];
    if (format.tables.size() > size(kMaxLevelTables))
      throw InputError("plan.json", "/layers/" + std::to_string(l),
                       "the CUDA runtime holds at most " + std::to_string(kMaxLevelTables) +
                           " different sets of levels in a layer, found " +
                           std::to_string(format.tables.size()));
    LayerView& view = data.layers.emplace_back();
    view.kv_heads = format.k.geometry.kv_heads;
    view.head_dim = format.k.geometry.head_dim;
    view.sink_tokens = sink_tokens;
    view.scale_rule = static_cast<int>(format.k.scale_rule);
    view.block_bytes = format.block_bytes;
    std::ranges::copy(format.heads, image.take(bytes.layouts, view.heads).begin());
    view.codes = layer_codes(format);
    write_runs(format, bytes, image, view);
    write_tables(format, bytes, image, view);
    write_encoders(format, bytes, image, view);

    const std::size_t d = size(view.head_dim);
    const auto k_synthesis = image.take(bytes.synthesis, view.synthesis[0]);
    std::vector<float> k_rows(k_synthesis.size());  // transposed
    for_each_synthesis(
        format, Side::kKey,
        [&](std::size_t h, std::size_t channel, std::size_t i, std::size_t row, float a) {
          k_synthesis[(h * d + channel) * d + i] = k_rows[(h * d + row) * d + channel] = a;
        });
    const auto v_synthesis = image.take(bytes.synthesis, view.synthesis[1]);
    std::vector<float> v_rows(v_synthesis.size());
    for_each_synthesis(
        format, Side::kValue,
        [&](std::size_t h, std::size_t channel, std::size_t i, std::size_t row, float a) {
          v_synthesis[(h * d + channel) * d + i] = v_rows[(h * d + channel) * d + row] = a;
        });
    const std::size_t coordinates = (d + kTileTokens - 1) / kTileTokens * kTileTokens;
    write_terms(format, coordinates, image.take(bytes.k_terms, view.k_terms));
    std::vector<float2> scales;
    const auto operands_of = [&](std::span<const float> rows, std::span<uint4> to, auto scale_of) {
      const std::size_t heads = rows.size() / (d * d), part = to.size() / heads;
      for (std::size_t h = 0; h < heads; ++h) {
        const auto matrix = rows.subspan(h * d * d, d * d);
        if (scales.size() <= h) scales.push_back({1, 1});
        float& scale = scale_of(scales[h]);
        scale = matrix_scale(matrix);
        write_operands(matrix, d, scale, to.subspan(h * part, part));
      }
    };
    operands_of(k_rows, image.take(bytes.k_matrix, view.k_matrix),
                [](float2& s) -> float& { return s.x; });
    operands_of(v_rows, image.take(bytes.v_matrix, view.v_matrix),
                [](float2& s) -> float& { return s.y; });
    std::ranges::copy(scales, image.take(bytes.matrix_scales, view.matrix_scales).begin());
    write_means(format.k, bytes.k_mean, image, view.k_mean);
    write_means(format.v, bytes.v_mean, image, view.v_mean);

    if (!format.k.mean) continue;
    view.pairs = static_cast<int>(format.k.mean->inv_freq().size());
    view.pair_stride = format.k.mean->pair_stride();
    view.pair_distance = format.k.mean->pair_distance();
    view.phase_steps = quant::phase_steps(format);
    if (owners[l] == l) {
      write_rotary(*format.k.mean, sink_tokens, bytes, image, view);
    } else {
      const LayerView& owner = data.layers[owners[l]];
      view.inv_freq = owner.inv_freq;
      view.page_phase = owner.page_phase;
      view.rotary_tile = owner.rotary_tile;
      view.rotary_tile_low = owner.rotary_tile_low;
    }
  }
  // Owners lend their low tile even when they do without it themselves.
  for (std::size_t l = 0; l < formats.size(); ++l)
    if (!needs_split_tile(bundle, formats[l], l)) data.layers[l].rotary_tile_low = nullptr;
  data.image = image.finish();
  return data;
}

}  // namespace kvplan::kernels
