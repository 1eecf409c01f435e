// De-quantised vectors of a slot: for attention over history with other kernels, and debugging.

#include <cmath>

#include "kernels/log_norm.cuh"
#include "kernels/page_access.cuh"
#include "kernels/product.cuh"
#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

using quant::kPageTokens;

constexpr int kTokens = kProductColumns;  // of a block
constexpr float kIntegerOffset = 128;

std::size_t shared_bytes(int head_dim) {
  return product_bytes(head_dim) + static_cast<std::size_t>(head_dim * kPartStride) * sizeof(float);
}

/// A token of the block.
struct Token {
  int position = 0;
  const std::uint16_t* row = nullptr;  // of a sink or the open page
  const std::byte* page = nullptr;     // else
  int in_page = 0;

  KVPLAN_DEVICE Token(const ReadBackView& v, int head, int token) {
    const LayerView& layer = v.layer;
    const std::int64_t index = std::int64_t{block()} * kTokens + token;
    if (index >= v.count) return;
    position = static_cast<int>(v.first + index);
    const int beyond = position - layer.sink_tokens;
    if (beyond < 0 || beyond / kPageTokens >= full_pages(v.length, layer.sink_tokens)) {
      row = plain_row(layer, v.slot, v.side, head, position);
      return;
    }
    in_page = beyond % kPageTokens;
    const std::int64_t entry = std::int64_t{v.slot} * v.table_stride + beyond / kPageTokens;
    page = page_of(layer, v.page_table[entry], head);
  }
  KVPLAN_DEVICE bool packed() const { return page != nullptr; }
};

KVPLAN_DEVICE float norm_of(const quant::SideLayout& layout, const Token& token) {
  const std::byte* const at =
      token.page + layout.norm_offset +
      quant::token_index(token.in_page) * static_cast<std::size_t>(layout.norm_bytes);
  return layout.norm_bytes == 1 ? log8_value(*reinterpret_cast<const std::int8_t*>(at))
                                : from_half(*reinterpret_cast<const std::uint16_t*>(at));
}

KVPLAN_DEVICE float scale_of(const quant::SideLayout& layout, const Token& token) {
  return from_half(reinterpret_cast<const std::uint16_t*>(
      token.page + layout.scale_offset)[quant::token_index(token.in_page)]);
}

/// The level of code `i` of a run of a trellis: its state is the 8 bits from the code on.
KVPLAN_DEVICE float trellis_level(const quant::SideLayout& layout, const quant::TileRun& run,
                                  int side, const Token& token, int i, const float* levels) {
  const int bit = run.bit + i * run.width, bytes = layout.stream_bytes;
  const auto byte = [&](int b) {
    const std::size_t at =
        quant::stream_byte(side == kKeys ? Side::kKey : Side::kValue, bytes, token.in_page, b);
    return std::to_integer<std::uint32_t>(token.page[run.offset + at]);
  };
  const int first = bit / 8, second = first + 1 == bytes ? 0 : first + 1;
  return levels[(byte(first) | byte(second) << 8) >> bit % 8 & 0xff];
}

/// Codes of packed tokens: level * norm to `columns`, outliers and fp16 heads to `direct`.
KVPLAN_DEVICE void unpack(const ReadBackView& v, const quant::SideLayout& layout,
                          const std::int32_t* outliers, int head, const Product& product,
                          float* direct) {
  using quant::TileCode;
  const int column = thread() % kTokens;
  const Token token(v, head, column);
  if (!token.packed()) return;
  const float norm = layout.norm_bytes > 0 ? norm_of(layout, token) : 0;
  const float scale = layout.outliers > 0 ? scale_of(layout, token) : 0;
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const bool half_tile = run.half != 0;
    const int size = quant::tile_coordinates(half_tile);
    const float* const levels = v.layer.levels + run.table * 256;
    for (int i = thread() / kTokens; i < run_coordinates(run); i += kProductThreads / kTokens) {
      if (run.code == TileCode::kTrellis) {
        product.columns[(run.coordinate + i) * kProductColumns + column] =
            trellis_level(layout, run, v.side, token, i, levels) * norm;
        continue;
      }
      const std::byte* const tile =
          token.page + run.offset + i / size * quant::tile_bytes(run.width, half_tile);
      const std::uint32_t code = read_code(tile, v.side, run, {token.in_page, i % size});
      const int coordinate = run.coordinate + i;
      if (run.code == TileCode::kInteger)
        direct[outliers[coordinate] * kPartStride + column] =
            scale * (static_cast<float>(code) - kIntegerOffset);
      else if (run.code == TileCode::kHalf)
        direct[coordinate * kPartStride + column] = from_half(static_cast<std::uint16_t>(code));
      else
        product.columns[coordinate * kProductColumns + column] = levels[code] * norm;
    }
  }
}

KVPLAN_DEVICE void add_mean(const ReadBackView& v, int head, float* direct) {
  const LayerView& layer = v.layer;
  const float* const means = v.side == kKeys ? layer.k_mean : layer.v_mean;
  if (means == nullptr) return;
  const float* const mean = means + head * layer.head_dim;
  const int pairs = v.side == kKeys ? layer.pairs : 0, column = thread() % kTokens;
  const Token token(v, head, column);
  if (!token.packed()) return;
  for (int i = thread() / kTokens; i < pairs; i += kProductThreads / kTokens) {
    const int a = i * layer.pair_stride, b = a + layer.pair_distance;
    const double angle = token.position * layer.inv_freq[i];
    const double c = std::cos(angle), s = std::sin(angle);
    direct[a * kPartStride + column] += static_cast<float>(mean[a] * c - mean[b] * s);
    direct[b * kPartStride + column] += static_cast<float>(mean[b] * c + mean[a] * s);
  }
  for (int i = 2 * pairs + thread() / kTokens; i < layer.head_dim; i += kProductThreads / kTokens)
    direct[i * kPartStride + column] += mean[i];
}

/// Rows `first` .. of the synthesis matrix.
KVPLAN_DEVICE void load_synthesis(const ReadBackView& v, int head, const Product& product,
                                  int first) {
  const int d = v.layer.head_dim;
  product.load([&](int row) -> const float* {
    if (first + row >= d) return nullptr;
    return v.layer.synthesis[v.side] + (std::int64_t{head} * d + first + row) * d;
  });
}

/// Block (16 positions, KV head).
__global__ void __launch_bounds__(kProductThreads) read_back_kernel(const ReadBackView v) {
  const int head = block_y(), d = v.layer.head_dim;
  const Product product(shared_memory(), d);
  auto* const direct = reinterpret_cast<float*>(shared_memory() + product_bytes(d));
  const quant::SideLayout& layout = side_layout(v.layer, v.side, head);
  const EncoderView& encoder = v.layer.encoders[v.side * v.layer.kv_heads + head];
  const auto place = [&](int column) {  // of the vector in x
    const std::int64_t index = std::int64_t{block()} * kTokens + column;
    return (index * v.layer.kv_heads + head) * d;
  };
  const bool transformed = encoder.fp16 == 0;
  for (int i = thread(); i < d * kTokens; i += kProductThreads) {
    const int channel = i / kTokens, column = i % kTokens;
    const Token token(v, head, column);
    product.columns[i] = 0;
    direct[channel * kPartStride + column] =
        token.row != nullptr ? from_half(token.row[channel]) : 0;
  }
  sync_block();
  unpack(v, layout, encoder.outliers, head, product, direct);
  sync_block();
  if (transformed) add_mean(v, head, direct);
  const std::int64_t left = v.count - std::int64_t{block()} * kTokens;
  const int tokens = left < kTokens ? static_cast<int>(left) : kTokens;
  for (int i = thread(); v.codes != nullptr && i < tokens * d; i += kProductThreads)
    v.codes[place(i / d) + i % d] = product.columns[i % d * kProductColumns + i / d];
  for (int first = 0; first < d; first += product.rows) {
    if (transformed) {
      load_synthesis(v, head, product, first);
      sync_block();
      product.run(kTokens);
    }
    sync_block();
    for (int i = thread(); i < tokens * product.rows; i += kProductThreads) {
      const int column = i / product.rows, row = i % product.rows, channel = first + row;
      if (channel >= d) continue;
      float x = direct[channel * kPartStride + column];
      if (transformed) x += product.result(row, column);
      if (v.x != nullptr) v.x[place(column) + channel] = to_half(x);
      if (v.x_float != nullptr) v.x_float[place(column) + channel] = x;
    }
    sync_block();
  }
}

}  // namespace

cudaError_t read_back(const ReadBackView& view, cudaStream_t stream) {
  if (view.count == 0) return cudaSuccess;
  LaunchShape shape;
  shape.blocks = static_cast<int>((view.count + kTokens - 1) / kTokens);
  shape.blocks_y = view.layer.kv_heads;
  shape.threads = kProductThreads;
  shape.shared_bytes = shared_bytes(view.layer.head_dim);
  shape.stream = stream;
  const cudaError_t allowed = allow_shared(read_back_kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(read_back_kernel, shape, view);
}

}  // namespace kvplan::kernels
