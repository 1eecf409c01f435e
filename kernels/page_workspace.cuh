#pragma once
// What a block that packs pages has in shared memory. Private to append.

#include "kernels/page_words.cuh"
#include "kernels/ptx.cuh"
#include "kernels/trellis_encoder.cuh"
#include "kernels/views.h"
#include "quant/page_layout.h"

namespace kvplan::kernels {

using quant::kPageTokens;

inline constexpr int kMaxThreads = 256;          // of a block: one for each coordinate
inline constexpr int kParts = 4;                 // of the sums of a token over its coordinates
inline constexpr int kStride = kPageTokens + 4;  // of a row of shared memory, in floats
inline constexpr int kChunk = 8;   // columns of the analysis matrix that are copied together
inline constexpr int kChunks = 3;  // in shared memory

/// Of a block, in shared memory.
struct Workspace {
  float* x;          // [head_dim][kStride] channels in the order of the transform, then outliers;
                     // after it coordinates, then outliers
  float* analysis;   // [kChunks][kChunk][coded], where codes and sums are later
  std::byte* codes;  // codes_offset(head_dim): of the coordinates, then of outliers
  double (*sums)[kParts][kPageTokens];  // [4] y^2, weighted y^2, y c, c^2
  double* weight;                       // [coded]
  float *levels, *boundaries;           // those of width b from index 2^b on
  quant::TileRun* runs;                 // as SideLayout::runs
  std::uint16_t* place;                 // [head_dim] row of x of a channel
  // Where a head of the layer has a trellis:
  float* error_weight;  // [coded] of its squared errors
  std::byte* scratch;   // of the warps: TrellisScratch

  static constexpr std::size_t kSumsBytes = 4 * kParts * kPageTokens * sizeof(double);
  static constexpr std::size_t kLevels = 512;

  KVPLAN_DEVICE explicit Workspace(int head_dim) {
    std::byte* const memory = shared_memory();
    x = reinterpret_cast<float*>(memory);
    codes = reinterpret_cast<std::byte*>(x + head_dim * kStride);
    analysis = reinterpret_cast<float*>(codes);
    sums = reinterpret_cast<double(*)[kParts][kPageTokens]>(codes + codes_offset(head_dim));
    weight = reinterpret_cast<double*>(sums + 4);
    levels = reinterpret_cast<float*>(weight + head_dim);
    boundaries = levels + kLevels;
    runs = reinterpret_cast<quant::TileRun*>(boundaries + kLevels);
    place = reinterpret_cast<std::uint16_t*>(runs + quant::kMaxTileRuns);
    scratch = memory + (bytes(head_dim) + 15) / 16 * 16;
    error_weight = reinterpret_cast<float*>(scratch);
    scratch += (head_dim * sizeof(float) + 15) / 16 * 16;
  }
  /// 57,264 with 128 channels: 4 blocks of a multiprocessor.
  static constexpr std::size_t bytes(int head_dim) {
    const auto d = static_cast<std::size_t>(head_dim);
    return d * (kStride * sizeof(float) + sizeof(double) + sizeof(std::uint16_t)) +
           static_cast<std::size_t>(codes_offset(head_dim)) + kSumsBytes +
           2 * kLevels * sizeof(float) + quant::kMaxTileRuns * sizeof(quant::TileRun);
  }
  /// Where a head of the layer has a trellis.
  static std::size_t bytes_with_trellis(int head_dim, int block_threads) {
    const auto d = static_cast<std::size_t>(head_dim);
    return (bytes(head_dim) + 15) / 16 * 16 + (d * sizeof(float) + 15) / 16 * 16 +
           static_cast<std::size_t>(block_threads / quant::kWarpLanes *
                                    TrellisScratch::bytes(head_dim));
  }
};
static_assert(kChunks * kChunk * kMaxThreads * sizeof(float) <=
              codes_offset(kMaxThreads) + Workspace::kSumsBytes);

}  // namespace kvplan::kernels
