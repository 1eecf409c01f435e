#pragma once
// Product of a head's [head_dim, head_dim] float matrix with 16 columns by one block: what
// `read_back` does with its transforms, in float. The matrix goes through shared
// memory in chunks of rows, so that a block's columns share every load.

#include "kernels/ptx.cuh"
#include "kernels/transform.cuh"

namespace kvplan::kernels {

inline constexpr int kProductThreads = 512;
inline constexpr int kPartStride = kProductColumns + 1;

constexpr int product_rows(int depth) { return depth > 64 && depth <= 128 ? 128 : 64; }
/// Threads that share an output, each with a part of the depth.
constexpr int product_splits(int depth) { return kProductThreads / 2 / product_rows(depth); }
constexpr std::size_t product_bytes(int depth) {
  return sizeof(float) *
         static_cast<std::size_t>(product_rows(depth) * (depth + 4) + depth * kProductColumns +
                                  product_splits(depth) * product_rows(depth) * kPartStride);
}

struct Product {
  int depth, rows, splits;
  float* matrix;   // [rows][depth + 4]
  float* columns;  // [depth][16]
  float* parts;    // [splits][rows][17]

  KVPLAN_DEVICE Product(std::byte* shared, int head_dim)
      : depth(head_dim),
        rows(product_rows(head_dim)),
        splits(product_splits(head_dim)),
        matrix(reinterpret_cast<float*>(shared)),
        columns(matrix + rows * (head_dim + 4)),
        parts(columns + head_dim * kProductColumns) {}

  /// Copies row source(row) of `depth` floats; 0 where it is null.
  template <class Source>
  KVPLAN_DEVICE void load(Source source) const {
    constexpr int kLoaded =
        8;  // by a thread before it stores: round trips to memory are what costs
    const int quads = depth / 4, all = rows * quads;
    for (int first = thread(); first < all; first += kLoaded * kProductThreads) {
      float4 loaded[kLoaded];
#pragma unroll
      for (int k = 0; k < kLoaded; ++k) {
        const int i = first + k * kProductThreads;
        const float* const from = i < all ? source(i / quads) : nullptr;
        loaded[k] =
            from != nullptr ? reinterpret_cast<const float4*>(from)[i % quads] : float4{0, 0, 0, 0};
      }
#pragma unroll
      for (int k = 0; k < kLoaded; ++k) {
        const int i = first + k * kProductThreads;
        if (i < all)
          reinterpret_cast<float4*>(matrix + i / quads * (depth + 4))[i % quads] = loaded[k];
      }
    }
  }

  /// parts = matrix columns; a thread owns a row and 8 columns. Columns from `used` on may stay as
  /// they are.
  KVPLAN_DEVICE void run(int used) const {
    constexpr int kOwn = kProductColumns / 2;
    const int row = thread() % rows, group = thread() / rows;
    const int first = group % 2 * kOwn, split = group / 2;
    if (first >= used) return;
    float sum[kOwn] = {};
    const int quads = depth / 4;
    for (int quad = quads * split / splits; quad < quads * (split + 1) / splits; ++quad) {
      const float4 m = reinterpret_cast<const float4*>(matrix + row * (depth + 4))[quad];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float factor = e == 0 ? m.x : e == 1 ? m.y : e == 2 ? m.z : m.w;
        const auto* const x =
            reinterpret_cast<const float4*>(columns + (4 * quad + e) * kProductColumns + first);
        const float4 low = x[0], high = x[1];
        sum[0] = fused(factor, low.x, sum[0]);
        sum[1] = fused(factor, low.y, sum[1]);
        sum[2] = fused(factor, low.z, sum[2]);
        sum[3] = fused(factor, low.w, sum[3]);
        sum[4] = fused(factor, high.x, sum[4]);
        sum[5] = fused(factor, high.y, sum[5]);
        sum[6] = fused(factor, high.z, sum[6]);
        sum[7] = fused(factor, high.w, sum[7]);
      }
    }
    float* const to = parts + (split * rows + row) * kPartStride + first;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) to[c] = sum[c];
  }

  KVPLAN_DEVICE float result(int row, int column) const {
    float sum = 0;
    for (int split = 0; split < splits; ++split)
      sum += parts[(split * rows + row) * kPartStride + column];
    return sum;
  }
};

}  // namespace kvplan::kernels
