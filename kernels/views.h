#pragma once
// What kernels are given: plain structs of device pointers and sizes. Private to kernels.

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "quant/cache_size.h"
#include "quant/page_layout.h"

namespace kvplan::kernels {

inline constexpr int kColumns = 8;          // of the queries that one pass over a page serves
inline constexpr int kMaxLevelTables = 16;  // distinct level tables of a layer
inline constexpr int kMaxKvHeads = 128;
inline constexpr int kDecodeWarps = 12;   // of a block, at most: 168 registers per thread
inline constexpr int kMaxBlocks = 256;    // of the grid
inline constexpr float kLowest = -1e30f;  // of a maximum of scores: below every score
inline constexpr float kLog2e = 1.4426950408889634f;
// What fp16 leaves of a number is below 2^-11 of it: scaled by this it keeps its bits in fp16.
inline constexpr float kLowScale = 2048;
inline constexpr std::uint32_t kSharedBase = 1024;  // where the shared window of a block starts

// Level tables in shared memory: an entry holds two halves, repeated for the 32 lanes: the levels
// of a pair of codes or, beyond kMaxPairWidth bits, one level twice.
inline constexpr int kEntryShift = 7;  // an entry takes 128 bytes
inline constexpr int kMaxPairWidth =
    4;  // up to here an entry is a pair of codes, above a single code
constexpr int table_bytes(int width) {
  return 1 << (kEntryShift + (width <= kMaxPairWidth ? 2 * width : width));
}

/// Layers of whole tiles of bytes with fp16 norms whose heads all have the same widths of keys and
/// values, and so a kernel of their own.
struct UniformWidths {
  int keys, values, tiles;  // bits, bits, tiles of 16 channels
  friend constexpr bool operator==(const UniformWidths&, const UniformWidths&) = default;
};
inline constexpr UniformWidths kUniformWidths[] = {
    {2, 2, 8}, {3, 3, 8}, {4, 4, 8}, {8, 8, 8},  {4, 2, 8},  {3, 2, 8},  {2, 2, 4},
    {3, 3, 4}, {4, 4, 4}, {8, 8, 4}, {2, 2, 16}, {3, 3, 16}, {4, 4, 16}, {8, 8, 16}};
/// Beyond so many tiles queries and outputs do not fit into registers.
inline constexpr int kMostUnrolledTiles = 8;
/// Warps of a block, at most: the queries and outputs of eight columns leave room for 8 (255
/// registers per thread).
constexpr int uniform_warps(int columns) { return columns <= kColumns / 2 ? kDecodeWarps : 8; }
inline constexpr int kUniformKinds = static_cast<int>(std::size(kUniformWidths));

inline constexpr int kOpenTokens = quant::kPageTokens;

/// Tiles of 16 channels of a plain vector, in pairs: which channel row `row` of a tile is follows
/// from loads of 8 channels by each of four lanes.
inline constexpr int kSpan = quant::kPlainSpan;
constexpr int plain_tiles(int head_dim) { return (head_dim + kSpan - 1) / kSpan * 2; }
constexpr int plain_channel(int tile, int row) {
  return kSpan * (tile / 2) + 8 * (row % 8 / 2) + 4 * (tile % 2) + 2 * (row / 8) + row % 2;
}

/// The encoder's part of one KV head and side; float as the codec computes.
struct EncoderView {
  std::int32_t fp16 = 0;                   // plain rows, nothing below is used
  std::int32_t transformed = 0;            // n: channels that go through the transform
  std::int32_t coded = 0;                  // c
  float magnitude = 0;                     // of all elements of the analysis matrix; 0: they differ
  const std::int32_t* channels = nullptr;  // [n] ascending
  const std::int32_t* outliers = nullptr;  // [SideLayout::outliers] ascending
  const float* analysis = nullptr;         // [n, c]: transposed; with a magnitude their signs, +-1
  const double* weight = nullptr;          // [c] of the scale rule
  double heaviest = 0;                     // the largest weight in the trellis
};

/// A run of tiles, as a block keeps the lists of them in shared memory.
struct alignas(16) RunEntry {
  std::uint16_t table;  // in memory its index, in shared memory its address >> kEntryShift
  std::uint16_t bytes;  // of a tile; of a trellis 0: its tiles lie in the streams behind the others
  std::uint8_t kind;    // tile_kind
  std::uint8_t tiles;
  std::uint16_t bit, stream_bytes;  // kTrellis: TileRun::bit, SideLayout::stream_bytes
  std::uint8_t unused[6];
  std::uint32_t levels[8];  // kBytes: the bytes of its table
};

/// One number for width, code and half of a run: kBytes has its width, the others more.
inline constexpr int kIntegerKind = 32, kOtherKinds = 32, kTrellisKinds = 52, kHalfKinds = 64;
constexpr std::uint8_t tile_kind(const quant::TileRun& run) {
  const int full = run.code == quant::TileCode::kBytes     ? run.width
                   : run.code == quant::TileCode::kInteger ? kIntegerKind
                   : run.code == quant::TileCode::kTrellis ? kTrellisKinds + run.width
                                                           : kOtherKinds + run.width;
  return static_cast<std::uint8_t>(full + (run.half != 0 ? kHalfKinds : 0));
}

/// The row of a full tile's operands (of keys a column of operand A, of values a row) that the code
/// at `position` of its 16 has in a trellis: a lane's codes are neighbours in a stream. In other
/// tiles it is the position itself.
constexpr int trellis_row(Side side, int position) {
  return side == Side::kKey ? position / 4 * 2 + position % 2 + position % 4 / 2 * 8
                            : position / 2 + position % 2 * 8;
}
/// Tables of a trellis in shared memory: an entry, once for all lanes, holds as two halves the
/// values of two codes in a row; its index is the bits from the first code on that the states of
/// both take.
inline constexpr int kStateBits = 8;
constexpr int trellis_entries(int width) { return 1 << (kStateBits + width); }

inline constexpr std::size_t kPageListBytes = 64;
inline constexpr int kMostSlots = 8;  // of a ring of halves of pages

/// Where the shared memory of a block of the decode kernel holds what: addresses in the shared
/// window (which starts at 1024), and offsets in the parts there.
struct SharedMap {
  std::int32_t tables = 0;                           // behind the last one there is
  std::int32_t table_address[kMaxLevelTables] = {};  // a multiple of the table's size; 0: not there
  std::int32_t table_width[kMaxLevelTables] = {};    // bits of a code
  bool of_trellis[kMaxLevelTables] = {};
  std::int32_t rotary_tile = 0, rotary_tile_low = 0;  // 0: none
  std::int32_t round = 0;                             // Round

  // Of each piece of a round.
  std::int32_t pieces = 0, piece_bytes = 0, most_pieces = 0;
  std::int32_t query_offset = 0;   // uint2 [K tiles][32]: AttentionView, "Queries"
  std::int32_t terms_offset = 0;   // ColumnTerms [8]
  std::int32_t runs_offset = 0;    // RunEntry, of keys and then of values
  std::int32_t centre_offset = 0;  // float2 [pairs of frequencies][4 or 8 columns][2]

  // Of each warp.
  std::int32_t warps = 0, warp_bytes = 0;
  std::int32_t state_offset = 0;               // WarpState
  std::int32_t list_offset = 0;                // PageList
  std::int32_t mixed_offset = 0;               // TileTables; mixed layers only
  std::int32_t barriers_offset = 0;            // of 8 bytes: [2] or one for each slot of a ring
  std::int32_t outputs = 0, output_bytes = 0;  // Output [tiles][32]; before, products of queries
  std::int32_t measures = 0;                   // in outputs, behind the products
  std::int32_t feeds = 0, feed_bytes = 0;      // [2] of slot_bytes, phases; or a
                                               // ring of halves; at last, ResultMemory
  std::int32_t slot_bytes = 0;                 // of one page's half
  std::int32_t feed_slots = 0;                 // uniform layers only
  std::int32_t ring_bytes = 0;                 // mixed layers only
};

/// How long a warp of the decode kernel works on a unit, 1 .. kMostCost; `start` is at most
/// kStartUnits times that.
inline constexpr std::uint32_t kMostCost = 64;
inline constexpr int kStartUnits = 2;
struct WorkCosts {
  std::uint32_t before[kMaxKvHeads + 1] = {};  // sums over the heads before; of all
  std::uint32_t chunk = 1;                     // of fp16 tokens
  std::uint32_t start = 0;                     // of a segment, on top of its first unit
  /// A packed page of head h.
  constexpr std::uint32_t head(int h) const { return before[h + 1] - before[h]; }
};
/// From the instructions that the tiles of a head take. InternalError beyond kMaxKvHeads.
WorkCosts work_costs(const quant::LayerFormat& format, int phase_steps);

/// Which codes the runs of a layer have, and so what attention to its pages has to know.
enum class LayerCodes : std::uint8_t {
  kBytes,    // kBytes alone: no 16-bit arithmetic
  kTrellis,  // kTrellis, and kBytes
  kOther,    // anything but kTrellis
  kAny,
};
/// Whether there are outputs that go through no transform: of fp16 heads and outlier channels.
constexpr bool has_direct(LayerCodes codes) {
  return codes == LayerCodes::kOther || codes == LayerCodes::kAny;
}

constexpr bool has_trellis(LayerCodes codes) {
  return codes == LayerCodes::kTrellis || codes == LayerCodes::kAny;
}

/// A set of KV heads.
struct HeadSet {
  std::uint32_t bits[kMaxKvHeads / 32] = {};
  constexpr void add(int head) { bits[head / 32] |= 1u << head % 32; }
  constexpr bool has(int head) const { return (bits[head / 32] >> head % 32 & 1) != 0; }
};

/// One layer of the cache.
struct LayerView {
  int kv_heads = 0, head_dim = 0, sink_tokens = 0;
  int scale_rule = 0;                        // quant::ScaleRule
  const quant::HeadLayout* heads = nullptr;  // [kv_heads]
  const RunEntry* runs = nullptr;            // [kv_heads][most_runs] of keys, then of values
  int most_runs = 0;                         // of a head, both sides
  std::byte* pool = nullptr;                 // [blocks][block_bytes]
  std::uint32_t block_bytes = 0;
  std::uint16_t* sinks = nullptr;  // fp16 [max_sequences][2][kv_heads][sink_tokens][head_dim]
  std::uint16_t* open = nullptr;   // fp16 [max_sequences][2][kv_heads][64][head_dim], row =
                                   // (position - sink_tokens) % 64
  // Level tables: [tables][256] each.
  const float* levels = nullptr;
  const float* boundaries = nullptr;      // midpoints, [tables][255]
  const EncoderView* encoders = nullptr;  // [2][kv_heads]
  HeadSet fp16[2];                        // heads stored as fp16, of keys and values
  // Synthesis matrices, for reading back: [kv_heads][head_dim][head_dim], row = channel, column =
  // storage coordinate (zero columns beyond coded, zero rows at outliers).
  const float* synthesis[2] = {};   // of keys, of values
  const float2* k_terms = nullptr;  // [kv_heads][16 tiles]: step and step * byte_offset of a
                                    // storage coordinate; step 0 unless its levels are bytes
  // Attention: q' = k_matrix q with the transposed synthesis of keys, out = v_matrix o + mean with
  // that of values, as operands B (transform.cuh), divided by a power of two so that fp16 holds
  // them.
  const uint4* k_matrix = nullptr;  // [kv_heads][tiles][tiles][2][32], tiles = ceil(head_dim / 16):
                                    // (16 rows, 16 columns), fp16 and 2048 times what it left
  const uint4* v_matrix = nullptr;
  const float2* matrix_scales = nullptr;  // [kv_heads] of k_matrix and v_matrix
  const float* k_mean = nullptr;          // [kv_heads][head_dim] before rotary; null: not centred
  const float* v_mean = nullptr;          // [kv_heads][head_dim]
  // Rotary geometry, for the centring of keys.
  int pairs = 0;        // rotary_dim / 2; 0 without rotary embedding
  int pair_stride = 1;  // pair j: channels j * stride and j * stride + distance
  int pair_distance = 1;
  int phase_steps = 0;                 // pairs rounded up to a multiple of 8, over 8
  const float2* page_phase = nullptr;  // [max pages of a sequence][phase_steps][2][8] cos, sin of
                                       // inv_freq * (sink_tokens + 64 p + 32 h), h the half page
  const double* inv_freq = nullptr;    // [pairs]
  const uint4* rotary_tile =
      nullptr;  // [phase_steps][4][32 lanes]: operand A of cos, sin(inv_freq_f * j), j = 0..63,
                // fp16; row 16 i + .., columns (cos, sin) of frequencies 8 s + 2 t and 8 s + 2 t +
                // 1
  const uint4* rotary_tile_low =
      nullptr;  // what fp16 rounding left of it, scaled by 2048; null: not needed
  WorkCosts costs;
  int uniform = -1;    // index in kUniformWidths, or -1
  bool mixed = false;  // MixedPath attends
  SharedMap shared;
  std::size_t shared_bytes = 0;  // of a block of the decode kernel
  LayerCodes codes = LayerCodes::kAny;
};

/// The batch of a step; entry i is one sequence. Device pointers.
struct BatchView {
  int sequences = 0;
  int max_new_tokens = 0;                       // largest length - length_before
  const std::int32_t* slot = nullptr;           // [sequences]
  const std::int32_t* length_before = nullptr;  // [sequences]
  const std::int32_t* length = nullptr;         // [sequences] after the step's tokens
  const std::int32_t* first_row = nullptr;      // [sequences] of its tokens in k, v, q, out
  const std::int32_t* page_table = nullptr;     // [max_sequences][table_stride] block numbers
  int table_stride = 0;
};

/// Attention of one layer. Columns of a KV head: c = (query token of the sequence) * queries_per_kv
/// + query head within the group; 8 columns are one column block. A *segment* is (sequence, KV
/// head, column block): (i * kv_heads + head) * column_blocks + block.
///
/// Queries. Fragments of 16-bit tiles (all but kBytes) are operand B of mma.m16n8k16: lane 4g+t
/// holds matrix column g, rows 2t, 2t+1 (x) and 2t+8, 2t+9 (y) of the tile, fp16; rows are the
/// tile's coordinates, scores come out in units of log2; matrix column 2c + e is column c + 4e of
/// the segment. Half tiles: y = 0. kInteger: the plain query at the outlier channels. Fragments of
/// kBytes tiles are operand B of m16n8k32, signed bytes: lane 4g+t holds rows 2t, 2t+8, 2t+1, 2t+9
/// of column g / 2 (x) and g / 2 + 4 (y): of the integer q' * step / unit = 256 high + low the high
/// digit where g is even, the low one (-128..127) where it is odd.
///
/// Parts. What a block finds of a segment's packed pages is a part; a segment that several blocks
/// share is finished by the one that arrives last, which takes the parts in the order of blocks. A
/// state is (m, l) of a column: m in log2 units, l = sum of 2^(score - m); a column that reads
/// nothing has m = -1e30, l = 0. Outputs of a part are accumulator fragments: lane 4g+t holds
/// coordinates g, g + 8 of column t, and of column t + 4 where there are more than four: sum of
/// 2^(score - m) * norm * level.
struct AttentionView {
  LayerView layer;
  BatchView batch;
  int queries_per_kv = 0;
  int column_blocks = 0;
  float scale = 1;                   // of the scores, natural units
  float soft_cap = 0;                // 0: none
  std::int64_t window = 0;           // 0: none
  const std::uint16_t* q = nullptr;  // fp16 [rows][query_heads][head_dim]
  std::uint16_t* out = nullptr;      // fp16, as q; or null
  float* out_float = nullptr;        // float, as q; or null
  float* lse = nullptr;              // [rows][query_heads] natural log-sum-exp, or null

  std::int32_t* arrived = nullptr;  // [segments] units whose results are in memory; 0 between calls
  float2* part_state = nullptr;     // [blocks * kBlockParts][8]
  float* part_output = nullptr;     // [blocks * kBlockParts][output_tiles][32][2 or 4]
  int output_tiles = 0;             // the most V tiles of a head (outlier tiles too)
  // Of chunks of fp16 tokens (sinks, open page).
  float2* plain_state = nullptr;  // [segments][plain_chunks][8]
  float* plain_output = nullptr;  // [segments][plain_chunks][4 or 8][head_dim]
  int plain_chunks = 0;           // quant::plain_chunks
  int decode_blocks = 0;          // grid
  int block_warps = 0;
};

/// Columns of a segment that any sequence of the batch may use.
constexpr int columns_in_use(const AttentionView& v) {
  const int columns = v.batch.max_new_tokens * v.queries_per_kv;
  return columns < kColumns ? columns : kColumns;
}

/// What append() brings; first what every step reads.
struct AppendView {
  BatchView batch;
  const std::uint16_t* k = nullptr;  // fp16 [rows][kv_heads][head_dim] after rotary
  const std::uint16_t* v = nullptr;
  LayerView layer;
};

/// De-quantised vectors of one slot, positions first .. first + count - 1.
struct ReadBackView {
  LayerView layer;
  int slot = 0, length = 0;
  std::int64_t first = 0, count = 0;
  const std::int32_t* page_table = nullptr;  // of all slots
  int table_stride = 0;
  int side = 0;  // 0 keys, 1 values
  std::uint16_t* x =
      nullptr;               // fp16 [count][kv_heads][head_dim] plain domain, after rotary; or null
  float* x_float = nullptr;  // the same as float; or null
  float* codes = nullptr;  // float [count][kv_heads][head_dim] level * norm in storage order before
                           // synthesis; or null (sinks and the open page: 0)
};

/// Pages of a sequence of `length` tokens: full pages, and how many positions are before the open
/// page.
constexpr int full_pages(int length, int sink_tokens) {
  return length > sink_tokens ? (length - sink_tokens) / quant::kPageTokens : 0;
}

// Launchers. They check nothing but what they would crash on, never synchronise or allocate.
cudaError_t append(const AppendView& view, cudaStream_t stream);
cudaError_t attend(const AttentionView& view, cudaStream_t stream);
cudaError_t read_back(const ReadBackView& view, cudaStream_t stream);

/// The grid of the decode kernel and its shared memory; a pure function of the layer and of the
/// columns (1..8) that a segment uses at most.
struct DecodeShape {
  int blocks = 0, block_warps = 0;
  int uniform = -1;  // as in LayerView
  bool mixed = false;
  std::size_t shared_bytes = 0;
  SharedMap shared;
};
LayerCodes layer_codes(const quant::LayerFormat& format);
/// InputError when not even one warp fits.
DecodeShape decode_shape(const quant::LayerFormat& format, int head_dim, int phase_steps,
                         bool split_tile, int columns, int multiprocessors);
/// Allows the decode kernels that much shared memory; once per device.
cudaError_t configure_decode(std::size_t shared_bytes);

}  // namespace kvplan::kernels
