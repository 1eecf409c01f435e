#include "kernels/cuda_cache.h"

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/cache.h"
#include "quant/cache_size.h"

namespace kvplan::kernels {
namespace {

/// Device memory that grows with what it has to hold.
class Scratch {
 public:
  template <class T>
  T* room(std::size_t count) {
    const std::size_t bytes = quant::buffer_bytes(std::max<std::size_t>(count * sizeof(T), 1));
    if (memory_.bytes() < bytes) memory_ = DeviceMemory(bytes);
    return reinterpret_cast<T*>(memory_.data());
  }
  template <class T>
  const T* copy_in(std::span<const T> values) {
    T* const to = room<T>(values.size());
    check(cudaMemcpy(to, values.data(), values.size_bytes(), cudaMemcpyHostToDevice),
          "copying to the device");
    return to;
  }

 private:
  DeviceMemory memory_;
};

template <class T>
void copy_out(const T* from, std::span<T> to) {
  check(cudaMemcpy(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost),
        "copying from the device");
}

void require_size(const char* name, std::size_t found, std::size_t expected) {
  if (found != expected)
    throw ArgumentError(std::string(name) + " has " + std::to_string(found) + " values, expected " +
                        std::to_string(expected));
}

class CudaCache : public quant::KvCache {
 public:
  CudaCache(const PlanBundle& bundle, const quant::CacheGeometry& geometry, int device)
      : cache_(bundle, geometry, device) {}

  const quant::CacheGeometry& geometry() const override { return cache_.geometry(); }
  std::int64_t length(int slot) const override { return cache_.sequences().length(slot); }
  void begin_step(std::span<const quant::SequenceStep> step) override {
    cache_.begin_step(step, kStream);
  }
  void append(int layer, std::span<const std::uint16_t> k,
              std::span<const std::uint16_t> v) override {
    const CurrentDevice current(cache_.device());
    require_size("k", k.size(), step_values(cache_.kv_heads()));
    require_size("v", v.size(), step_values(cache_.kv_heads()));
    cache_.append(layer, first_.copy_in(k), second_.copy_in(v), kStream);
    check(cudaStreamSynchronize(kStream), "appending");
  }
  void attend(int layer, std::span<const std::uint16_t> q, const quant::AttentionOptions& options,
              std::span<float> out, std::span<float> lse) override {
    const CurrentDevice current(cache_.device());
    require_size("q", q.size(), step_values(geometry().query_heads));
    require_size("out", out.size(), q.size());
    if (!lse.empty())
      require_size("lse", lse.size(), q.size() / static_cast<std::size_t>(cache_.head_dim()));
    AttentionOutput output;
    output.single = second_.room<float>(out.size());
    output.lse = lse.empty() ? nullptr : third_.room<float>(lse.size());
    cache_.attend(layer, first_.copy_in(q), options, output, kStream);
    copy_out(output.single, out);
    if (!lse.empty()) copy_out(output.lse, lse);
  }
  void read_back(int layer, Side side, int slot, std::int64_t first, std::int64_t count,
                 std::span<float> x) const override {
    const CurrentDevice current(cache_.device());
    const auto row =
        static_cast<std::size_t>(cache_.kv_heads()) * static_cast<std::size_t>(cache_.head_dim());
    require_size("x", x.size(), static_cast<std::size_t>(std::max<std::int64_t>(count, 0)) * row);
    Scratch scratch;
    float* const on_device = scratch.room<float>(x.size());
    cache_.read_back(layer, side, slot, first, count, nullptr, on_device, kStream);
    copy_out(on_device, x);
  }
  void fork(int from, int to) override { cache_.fork(from, to, kStream); }
  void release(int slot) override { cache_.release(slot); }
  std::size_t free_blocks() const override {
    return static_cast<std::size_t>(cache_.sequences().free_blocks());
  }

 private:
  static constexpr cudaStream_t kStream = nullptr;  // the default one
  std::size_t step_values(int heads) const {
    return static_cast<std::size_t>(cache_.step_rows()) * static_cast<std::size_t>(heads) *
           static_cast<std::size_t>(cache_.head_dim());
  }

  Cache cache_;
  Scratch first_, second_, third_;
};

}  // namespace

std::unique_ptr<quant::KvCache> make_cuda_cache(const PlanBundle& bundle,
                                                const quant::CacheGeometry& geometry, int device) {
  return std::make_unique<CudaCache>(bundle, geometry, device);
}

}  // namespace kvplan::kernels
