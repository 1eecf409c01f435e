#pragma once
// The paged cache on the GPU: device memory, the host's bookkeeping and the launches of a step.
// The C ABI and CudaCache are thin layers over it. Private to kernels.

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/device_memory.h"
#include "kernels/sequences.h"
#include "kernels/views.h"
#include "quant/cache_size.h"
#include "quant/kv_cache.h"

namespace kvplan::kernels {

/// What is known of a cache before anything is allocated.
struct CachePlan {
  std::vector<quant::LayerFormat> formats;
  std::vector<DecodeShape> decode_shapes;  // per layer
  quant::DecodeGrid grid;                  // the largest of them
  quant::CacheGeometry geometry;           // with the number of blocks that the pool gets
  quant::CacheSize size;
  std::size_t block_bytes = 0;  // of one block in all layers
};

/// InputError for a plan that the runtime cannot hold, ArgumentError for a geometry outside its
/// limits.
CachePlan plan_cache(const PlanBundle& bundle, const quant::CacheGeometry& geometry,
                     int multiprocessors);

/// Where attend() writes, on the device, aligned to 16 bytes (lse: 4); null for what is not wanted.
struct AttentionOutput {
  std::uint16_t* half = nullptr;  // fp16 [rows, query_heads, head_dim]
  float* single = nullptr;        // the same as float
  float* lse = nullptr;           // [rows, query_heads]
};

/// ArgumentError when attention of a step would outgrow the 32 bits that it counts its work in
/// (round.cuh). max_query_tokens: of the cache.
void require_line(const StepChange& step, int sink_tokens, int kv_heads, int queries_per_kv,
                  int max_query_tokens);

/// Calls throw ArgumentError and the errors of errors.h, and have then changed nothing. The work of
/// one cache has to be ordered on the device: one stream, or streams joined by events.
class Cache {
 public:
  /// Allocates and uploads; synchronises.
  Cache(const PlanBundle& bundle, const quant::CacheGeometry& geometry, int device);
  /// Waits for the device.
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  const quant::CacheGeometry& geometry() const { return geometry_; }
  const quant::CacheSize& size() const { return size_; }
  std::size_t block_bytes() const { return block_bytes_; }  // in all layers
  const Sequences& sequences() const { return sequences_; }
  int device() const { return device_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  int kv_heads() const { return layers_.front().kv_heads; }
  int head_dim() const { return layers_.front().head_dim; }
  int sink_tokens() const { return layers_.front().sink_tokens; }
  /// Tokens of the step at work.
  int step_rows() const { return step_.rows; }

  void begin_step(std::span<const quant::SequenceStep> step, cudaStream_t stream);
  /// k, v: fp16 [rows, kv_heads, head_dim] on the device, as all that follows.
  void append(int layer, const void* k, const void* v, cudaStream_t stream);
  void attend(int layer, const void* q, const quant::AttentionOptions& options,
              const AttentionOutput& output, cudaStream_t stream);
  /// x: fp16 [count, kv_heads, head_dim]; x_float: the same as float; either may be null. Until a
  /// layer has the tokens of the step, the slots of the step have their former length there.
  void read_back(int layer, Side side, int slot, std::int64_t first, std::int64_t count,
                 std::uint16_t* x, float* x_float, cudaStream_t stream) const;
  /// Bytes of a page of all KV heads.
  std::size_t page_bytes(int layer) const { return checked_layer(layer).block_bytes; }
  /// To the host; synchronises.
  void copy_page(int layer, int slot, std::int64_t page, std::span<std::byte> bytes) const;
  void fork(int from, int to, cudaStream_t stream);
  /// A step that the slot belongs to ends.
  void release(int slot);

 private:
  static constexpr std::size_t kStagings = 8;
  /// Pinned memory of a step on its way to the device.
  struct Staging {
    explicit Staging(std::size_t bytes) : memory(bytes) {}
    PinnedMemory memory;
    Event sent;
  };

  Cache(CachePlan plan, const PlanBundle& bundle, int device);
  void place_layers(const PlanBundle& bundle, const CachePlan& plan);
  void place_batch(const quant::SharedBuffers& buffers);
  void place_workspace(const CachePlan& plan, const quant::SharedBuffers& buffers);
  const LayerView& checked_layer(int layer) const;
  /// Tokens of a slot that a layer holds.
  std::int64_t stored_length(int layer, int slot) const;
  void require_step() const;
  /// ArgumentError when some layers have the tokens of the step and others lack them.
  void require_whole_step(const char* before) const;

  int device_;
  quant::CacheGeometry geometry_;
  quant::CacheSize size_;
  std::size_t block_bytes_;
  Sequences sequences_;

  DeviceMemory pages_, open_, tables_, statics_, workspace_;
  std::vector<LayerView> layers_;
  std::vector<AttentionView> attention_;  // per layer, all but what a call brings
  BatchView batch_;
  std::array<std::int32_t*, 4> batch_arrays_{};  // slot, length before, length, first row
  std::int32_t* page_table_ = nullptr;
  std::vector<Staging> stagings_;
  std::size_t next_staging_ = 0;

  StepChange step_;
  bool step_open_ = false;      // append() and attend() are welcome
  std::vector<bool> appended_;  // per layer, in this step
};

}  // namespace kvplan::kernels
