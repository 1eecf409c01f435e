#pragma once
// The device memory of the CUDA runtime, buffer by buffer, before anything is allocated. The
// runtime takes the sizes of its allocations from here, so what `kvplan size` prints is what it
// uses.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "quant/kv_cache.h"
#include "quant/page_layout.h"
#include "schemas/plan.h"

namespace kvplan::quant {

/// Every buffer starts on a multiple of this and is charged so.
inline constexpr std::size_t kBufferAlignment = 256;
constexpr std::size_t buffer_bytes(std::size_t bytes) {
  return (bytes + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

/// Columns of the queries that one pass over a page serves: (query token, query head of the group).
inline constexpr int kQueryColumns = 8;
/// Channels of an fp16 token that are read together: two tiles of outputs.
inline constexpr int kPlainSpan = 32;
/// Rotary pairs that one step of the centring product takes.
inline constexpr int kPhasePairs = 8;
/// sizeof(kernels::EncoderView) and sizeof(kernels::RunEntry), which kernels asserts.
inline constexpr std::size_t kEncoderViewBytes = 56, kRunEntryBytes = 48;

/// Runs of the head with the most of them, both sides together.
std::size_t most_runs(const LayerFormat& format);

/// The fp16 tokens of a sequence, sinks and open page, are read in chunks of so many.
inline constexpr int kPlainChunk = 16;
constexpr int plain_chunks(int sink_tokens) {
  return (sink_tokens + kPageTokens - 1 + kPlainChunk - 1) / kPlainChunk;
}
/// Partial results that a block of the decode kernel may leave.
inline constexpr int kBlockParts = 10;

/// The grid of the decode kernel. The default is that of an H200.
struct DecodeGrid {
  int blocks = 132;
};

/// ArgumentError, naming the field, for a geometry that the plan or the cache cannot have.
void require_geometry(const Plan& plan, const CacheGeometry& geometry);

/// Pages that a sequence of max_tokens fills.
std::int64_t pages_per_sequence(const CacheGeometry& geometry, int sink_tokens);

/// Blocks of each layer's pool: geometry.blocks, or by default enough for max_sequences of
/// max_tokens.
std::int64_t pool_blocks(const CacheGeometry& geometry, int sink_tokens);

/// Steps of kPhasePairs pairs in the centring product of a layer; 0 when its keys are not centred
/// or have no rotary embedding.
int phase_steps(const LayerFormat& format);

/// For each layer the first one with the same rotary embedding, whose tables it uses too.
std::vector<std::size_t> rotary_owners(std::span<const LayerFormat> layers);

/// Bytes of the buffers of one layer (kernels::LayerView), each before rounding to
/// kBufferAlignment.
struct LayerBuffers {
  std::size_t pool = 0;   // [blocks][block_bytes]
  std::size_t sinks = 0;  // fp16 [max_sequences][2][kv_heads][sink_tokens][head_dim]
  std::size_t open = 0;   // fp16 [max_sequences][2][kv_heads][64][head_dim]

  std::size_t layouts = 0;     // HeadLayout [kv_heads]
  std::size_t runs = 0;        // kernels::RunEntry [kv_heads][most runs of a head, both sides]
  std::size_t levels = 0;      // float [tables][256]
  std::size_t boundaries = 0;  // float [tables][255]
  std::size_t encoders = 0;    // kernels::EncoderView [2][kv_heads]
  std::size_t channels = 0;    // int32, of all heads and sides: transformed and outlier channels
  std::size_t analysis = 0;    // float [c,n] of all heads and sides
  std::size_t weights = 0;     // double [c] of all heads and sides
  std::size_t synthesis = 0;   // float [kv_heads][head_dim][head_dim], of keys and again of values
  std::size_t k_terms = 0;     // float2 [kv_heads][16 tiles]
  std::size_t k_matrix = 0;    // uint4 [kv_heads][tiles][tiles][2][32], tiles = ceil(head_dim / 16)
  std::size_t v_matrix = 0;
  std::size_t matrix_scales = 0;  // float2 [kv_heads]
  std::size_t k_mean = 0;         // float [kv_heads][head_dim]; 0: not centred
  std::size_t v_mean = 0;

  // 0 unless the layer is its rotary owner.
  std::size_t inv_freq = 0;         // double [pairs]
  std::size_t page_phase = 0;       // float2 [pages_per_sequence][phase_steps][2][kPhasePairs]
  std::size_t rotary_tile = 0;      // uint4 [phase_steps][4][32]
  std::size_t rotary_tile_low = 0;  // as rotary_tile
};
std::vector<LayerBuffers> layer_buffers(std::span<const LayerFormat> layers, int sink_tokens,
                                        const CacheGeometry& geometry);

/// Bytes of the buffers that all layers share (kernels::BatchView, kernels::AttentionView), each
/// before rounding. segments = max_sequences * kv_heads * column blocks of max_query_tokens; parts
/// = blocks of the grid * kBlockParts; columns: 4 when the columns of a KV head never are more,
/// else 8.
struct SharedBuffers {
  std::size_t page_table = 0;  // int32 [max_sequences][pages_per_sequence]
  std::size_t batch = 0;       // int32 [4][max_sequences]: slot, length before, length, first row

  std::size_t arrived = 0;       // int32 [segments]
  std::size_t part_state = 0;    // float2 [parts][8]
  std::size_t part_output = 0;   // float [parts][most V tiles of a head][32][columns / 2]
  std::size_t plain_state = 0;   // float2 [segments][plain_chunks][8]
  std::size_t plain_output = 0;  // float [segments][plain_chunks][columns][head_dim]
};
SharedBuffers shared_buffers(std::span<const LayerFormat> layers, int sink_tokens,
                             const CacheGeometry& geometry, const DecodeGrid& grid = {});

/// The sum of all of the above, rounded buffer by buffer. Errors of page_format and
/// require_geometry.
CacheSize cache_size(const PlanBundle& bundle, const CacheGeometry& geometry,
                     const DecodeGrid& grid = {});

}  // namespace kvplan::quant
