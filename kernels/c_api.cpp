// The C ABI: checks pointers, turns errors into statuses.

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "kernels/cache.h"
#include "kernels/runtime.h"

struct kvplan_runtime {
  kvplan::kernels::Cache cache;
};

namespace kvplan::kernels {
namespace {

thread_local std::string last_error;

kvplan_status fail(kvplan_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (const std::bad_alloc&) {
    last_error.clear();
  }
  return status;
}

/// Runs body(); the status and last error of what it throws.
template <class Body>
kvplan_status guarded(Body body) noexcept {
  last_error.clear();
  try {
    body();
    return KVPLAN_OK;
  } catch (const DeviceError& e) {
    return fail(e.status(), e.what());
  } catch (const TooLongError& e) {
    return fail(KVPLAN_TOO_LONG, e.what());
  } catch (const OutOfBlocksError& e) {
    return fail(KVPLAN_OUT_OF_BLOCKS, e.what());
  } catch (const MemoryError& e) {
    return fail(KVPLAN_OUT_OF_MEMORY, e.what());
  } catch (const ArgumentError& e) {
    return fail(KVPLAN_BAD_ARGUMENT, e.what());
  } catch (const InputError& e) {
    return fail(KVPLAN_BAD_PLAN, e.what());
  } catch (const std::bad_alloc&) {
    return fail(KVPLAN_OUT_OF_MEMORY, "the host has not enough memory");
  } catch (const std::exception& e) {
    return fail(KVPLAN_INTERNAL, e.what());
  } catch (...) {
    return fail(KVPLAN_INTERNAL, "unknown error");
  }
}

template <class T>
T& required(T* pointer, const char* name) {
  if (!pointer) throw ArgumentError(std::string(name) + " must not be null");
  return *pointer;
}

const Cache& cache_of(const kvplan_runtime* runtime) { return required(runtime, "runtime").cache; }
Cache& cache_of(kvplan_runtime* runtime) { return required(runtime, "runtime").cache; }

cudaStream_t stream_of(kvplan_stream stream) { return static_cast<cudaStream_t>(stream); }

quant::CacheGeometry cache_geometry(const kvplan_geometry* geometry) {
  const kvplan_geometry& g = required(geometry, "geometry");
  quant::CacheGeometry out;
  out.query_heads = g.query_heads;
  out.max_sequences = g.max_sequences;
  out.max_tokens = g.max_tokens;
  out.blocks = g.blocks;
  out.max_query_tokens = g.max_query_tokens;
  return out;
}

kvplan_size size_of(const quant::CacheSize& size, std::size_t block_bytes) {
  kvplan_size out{};
  out.pages = size.pages;
  out.open = size.open;
  out.tables = size.tables;
  out.statics = size.statics;
  out.workspace = size.workspace;
  out.total = size.total();
  out.block_bytes = block_bytes;
  return out;
}

}  // namespace
}  // namespace kvplan::kernels

using namespace kvplan::kernels;

extern "C" {

const char* kvplan_last_error(void) { return last_error.c_str(); }

kvplan_status kvplan_query_device(int index, kvplan_device_info* info) {
  return guarded([&] {
    required(info, "info");
    *info = query_device(index);
  });
}

kvplan_status kvplan_size_of(const char* plan_path, const kvplan_geometry* geometry,
                             int multiprocessors, kvplan_size* size) {
  return guarded([&] {
    required(plan_path, "plan_path");
    required(size, "size");
    const kvplan::quant::CacheGeometry shape = cache_geometry(geometry);
    if (multiprocessors < 0)
      throw kvplan::ArgumentError("multiprocessors must be at least 0, found " +
                                  std::to_string(multiprocessors));
    if (multiprocessors == 0) multiprocessors = query_device(geometry->device).multiprocessors;
    const CachePlan plan = plan_cache(kvplan::read_plan(plan_path), shape, multiprocessors);
    *size = size_of(plan.size, plan.block_bytes);
  });
}

kvplan_status kvplan_create(const char* plan_path, const kvplan_geometry* geometry,
                            kvplan_runtime** runtime) {
  return guarded([&] {
    required(plan_path, "plan_path");
    required(runtime, "runtime");
    const kvplan::quant::CacheGeometry shape = cache_geometry(geometry);
    *runtime = new kvplan_runtime{{kvplan::read_plan(plan_path), shape, geometry->device}};
  });
}

void kvplan_destroy(kvplan_runtime* runtime) { delete runtime; }

kvplan_status kvplan_runtime_size(const kvplan_runtime* runtime, kvplan_size* size) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    required(size, "size") = size_of(cache.size(), cache.block_bytes());
  });
}

kvplan_status kvplan_runtime_shape(const kvplan_runtime* runtime, kvplan_shape* shape) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    kvplan_shape& out = required(shape, "shape");
    out.num_layers = cache.num_layers();
    out.kv_heads = cache.kv_heads();
    out.query_heads = cache.geometry().query_heads;
    out.head_dim = cache.head_dim();
    out.sink_tokens = cache.sink_tokens();
    out.page_tokens = kvplan::quant::kPageTokens;
  });
}

kvplan_status kvplan_begin_step(kvplan_runtime* runtime, int count, const int* slots,
                                const int* tokens, kvplan_stream stream) {
  return guarded([&] {
    Cache& cache = cache_of(runtime);
    required(slots, "slots");
    required(tokens, "tokens");
    if (count < 1 || count > cache.geometry().max_sequences)
      throw kvplan::ArgumentError("a step has 1 to " +
                                  std::to_string(cache.geometry().max_sequences) +
                                  " sequences, found " + std::to_string(count));
    std::vector<kvplan::quant::SequenceStep> step;
    for (int i = 0; i < count; ++i) step.push_back({slots[i], tokens[i]});
    cache.begin_step(step, stream_of(stream));
  });
}

kvplan_status kvplan_append(kvplan_runtime* runtime, int layer, const void* k, const void* v,
                            kvplan_stream stream) {
  return guarded([&] { cache_of(runtime).append(layer, k, v, stream_of(stream)); });
}

kvplan_status kvplan_attend(kvplan_runtime* runtime, int layer, const void* q,
                            const kvplan_attention* options, void* out, float* lse,
                            kvplan_stream stream) {
  return guarded([&] {
    kvplan::quant::AttentionOptions chosen;
    if (options) chosen = {options->scale, options->soft_cap, options->window};
    AttentionOutput output;
    output.half = static_cast<std::uint16_t*>(out);
    output.lse = lse;
    cache_of(runtime).attend(layer, q, chosen, output, stream_of(stream));
  });
}

kvplan_status kvplan_read_back(kvplan_runtime* runtime, int layer, int slot, int64_t first,
                               int64_t count, void* k, void* v, kvplan_stream stream) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    cache.read_back(layer, kvplan::Side::kKey, slot, first, count, static_cast<std::uint16_t*>(k),
                    nullptr, stream_of(stream));
    cache.read_back(layer, kvplan::Side::kValue, slot, first, count, static_cast<std::uint16_t*>(v),
                    nullptr, stream_of(stream));
  });
}

kvplan_status kvplan_copy_page(kvplan_runtime* runtime, int layer, int slot, int64_t page,
                               void* bytes, size_t capacity, size_t* needed) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    const std::size_t page_bytes = cache.page_bytes(layer);
    if (needed) *needed = page_bytes;
    if (!bytes && capacity == 0 && needed) return;
    required(static_cast<std::byte*>(bytes), "bytes");
    cache.copy_page(layer, slot, page, {static_cast<std::byte*>(bytes), capacity});
  });
}

kvplan_status kvplan_length(const kvplan_runtime* runtime, int slot, int64_t* length) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    required(length, "length") = cache.sequences().length(slot);
  });
}

kvplan_status kvplan_fork(kvplan_runtime* runtime, int from, int to, kvplan_stream stream) {
  return guarded([&] { cache_of(runtime).fork(from, to, stream_of(stream)); });
}

kvplan_status kvplan_release(kvplan_runtime* runtime, int slot) {
  return guarded([&] { cache_of(runtime).release(slot); });
}

kvplan_status kvplan_free_blocks(const kvplan_runtime* runtime, int64_t* blocks) {
  return guarded([&] {
    const Cache& cache = cache_of(runtime);
    required(blocks, "blocks") = cache.sequences().free_blocks();
  });
}

}  // extern "C"
