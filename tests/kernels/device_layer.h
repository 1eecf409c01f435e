#pragma once
// One layer of the cache in device memory as the runtime lays it out, with its contents on the
// host, for tests of single kernels. The same tests run on a GPU and on the emulated device.

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/device_memory.h"
#include "kernels/runtime.h"
#include "kernels/static_data.h"
#include "kernels/views.h"
#include "quant/cache_size.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::kernels::testing {

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host)
      : count_(host.size()), memory_(host.size() * sizeof(T)) {
    check(cudaMemcpy(memory_.data(), host.data(), memory_.bytes(), cudaMemcpyHostToDevice), "copy");
  }
  /// Bytes that read as NaN.
  explicit DeviceArray(std::size_t count)
      : DeviceArray([count] {
          std::vector<T> poison(count);
          std::memset(static_cast<void*>(poison.data()), 0xff, count * sizeof(T));
          return poison;
        }()) {}
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    check(cudaDeviceSynchronize(), "kernel");
    check(cudaMemcpy(values.data(), memory_.data(), memory_.bytes(), cudaMemcpyDeviceToHost),
          "copy");
    return values;
  }

 private:
  std::size_t count_;
  DeviceMemory memory_;
};

/// What a layer of the cache holds, on the host.
struct LayerContents {
  std::vector<std::byte> pool;
  std::vector<std::uint16_t> sinks, open;
};

/// The same on the device.
struct DeviceContents {
  explicit DeviceContents(const LayerContents& host)
      : pool(host.pool), sinks(host.sinks), open(host.open) {}
  void attach(LayerView& view) const {
    view.pool = pool.data();
    view.sinks = sinks.data();
    view.open = open.data();
  }
  DeviceArray<std::byte> pool;
  DeviceArray<std::uint16_t> sinks, open;
};

constexpr int kSpareBlocks = 3;

/// A layer with sequences in slots that are not in order and pages in blocks that are not in order.
class DeviceLayer {
 public:
  DeviceLayer(PlanBundle plan, int layer, int sequences, int max_tokens)
      : bundle(std::move(plan)),
        formats(quant::page_format(bundle)),
        format(formats[size(layer)]),
        slots(sequences + 2),
        pages(max_tokens / quant::kPageTokens + 1) {
    quant::CacheGeometry cache;
    cache.query_heads = bundle.plan.model.query_heads;
    cache.max_sequences = slots;
    cache.max_tokens = max_tokens;
    cache.blocks = slots * pages;
    statics_ = DeviceMemory(make_static_data(bundle, formats, cache, nullptr).image.size());
    const StaticData data = make_static_data(bundle, formats, cache, statics_.data());
    check(cudaMemcpy(statics_.data(), data.image.data(), data.image.size(), cudaMemcpyHostToDevice),
          "copy");
    view = data.layers[size(layer)];
    view.costs = work_costs(format, quant::phase_steps(format));

    // 7 steps on, round a pool of a size that 7 does not divide.
    const int count = slots * pages, round = count % 7 == 0 ? count + 1 : count;
    for (int i = 0; i < count; ++i) blocks_.push_back(7 * i % round + 1);
    page_table_.emplace(blocks_);
    for (const Side side : {Side::kKey, Side::kValue})
      codecs.push_back(quant::make_codec(bundle, layer, side));
    const auto rows = size(slots) * 2 * size(view.kv_heads) * size(view.head_dim);
    contents.pool.assign(size(count + kSpareBlocks) * format.block_bytes, std::byte{0xff});
    contents.sinks.assign(rows * size(view.sink_tokens), 0xffff);
    contents.open.assign(rows * size(kOpenTokens), 0xffff);
  }

  /// Slot of sequence i.
  int slot(int i) const { return slots - 1 - i; }
  std::int32_t block(int slot, int page) const { return blocks_[size(slot * pages + page)]; }
  std::span<const std::uint16_t> plain_row(const LayerContents& from, int slot, int side, int head,
                                           int position) const {
    const bool sink = position < view.sink_tokens;
    const int rows = sink ? view.sink_tokens : kOpenTokens;
    const int row = sink ? position : (position - view.sink_tokens) % kOpenTokens;
    const auto index = size(((slot * 2 + side) * view.kv_heads + head) * rows + row);
    return std::span(sink ? from.sinks : from.open)
        .subspan(index * size(view.head_dim), size(view.head_dim));
  }

  /// Puts a sequence of `length` tokens into `contents` as the CPU codec and page layout do. x: k,
  /// v fp16 [length, kv_heads, head_dim].
  void store(int slot, int length, const std::vector<std::uint16_t> (&x)[2]) {
    const int full = full_pages(length, view.sink_tokens);
    const auto d = size(view.head_dim), token = d * size(view.kv_heads);
    for (int side = 0; side < 2; ++side) {
      for (int position = 0; position < length; ++position) {
        const int beyond = position - view.sink_tokens;
        if (beyond >= 0 && beyond < full * quant::kPageTokens) continue;
        for (int head = 0; head < view.kv_heads; ++head) {
          const auto row = plain_row(contents, slot, side, head, position);
          std::copy_n(x[side].begin() +
                          static_cast<std::ptrdiff_t>(size(position) * token + size(head) * d),
                      d, const_cast<std::uint16_t*>(row.data()));
        }
      }
      for (int page = 0; page < full; ++page) store_page(slot, page, side, x[side]);
    }
  }

  /// Linear codes of a page of all heads.
  std::vector<std::byte> linear(int page, int side, const std::vector<std::uint16_t>& x) const {
    const int first = view.sink_tokens + page * quant::kPageTokens;
    const quant::KvShape shape{quant::kPageTokens, view.kv_heads, view.head_dim};
    const auto token = size(view.kv_heads) * size(view.head_dim);
    std::vector<float> floats(size(shape.elements()));
    for (std::size_t i = 0; i < floats.size(); ++i)
      floats[i] = quant::from_half(x[size(first) * token + i]);
    std::vector<std::byte> codes(codecs[size(side)]->packed_bytes(shape));
    codecs[size(side)]->encode(shape, first, floats, codes);
    return codes;
  }

  /// The batch of a step of sequences 0 ..: from `before` to `after` tokens each.
  struct Batch {
    std::vector<DeviceArray<std::int32_t>> arrays;
    BatchView view;
    int rows = 0;
  };
  Batch batch(const std::vector<int>& before, const std::vector<int>& after) const {
    Batch b;
    std::vector<std::int32_t> slot_of, first;
    for (std::size_t i = 0; i < before.size(); ++i) {
      slot_of.push_back(slot(static_cast<int>(i)));
      first.push_back(b.rows);
      b.rows += after[i] - before[i];
      b.view.max_new_tokens = std::max(b.view.max_new_tokens, after[i] - before[i]);
    }
    for (const std::vector<int>& values : {slot_of, before, after, first})
      b.arrays.emplace_back(values);
    b.view.sequences = static_cast<int>(before.size());
    b.view.slot = b.arrays[0].data();
    b.view.length_before = b.arrays[1].data();
    b.view.length = b.arrays[2].data();
    b.view.first_row = b.arrays[3].data();
    b.view.page_table = page_table_->data();
    b.view.table_stride = pages;
    return b;
  }
  const std::int32_t* page_table() const { return page_table_->data(); }

  PlanBundle bundle;
  std::vector<quant::LayerFormat> formats;
  const quant::LayerFormat& format;
  int slots, pages;
  LayerView view;                                     // pool, sinks and open not set
  std::vector<std::unique_ptr<quant::Codec>> codecs;  // keys, values
  LayerContents contents;

 private:
  void store_page(int slot, int page, int side, const std::vector<std::uint16_t>& x) {
    const std::vector<std::byte> codes = linear(page, side, x);
    const std::size_t stride = codes.size() / quant::kPageTokens;
    std::size_t offset = 0;
    for (std::size_t head = 0; head < format.heads.size(); ++head) {
      const quant::HeadLayout& layout = format.heads[head];
      const quant::SideLayout& one = side == 0 ? layout.k : layout.v;
      quant::to_page(
          one, side == 0 ? Side::kKey : Side::kValue, std::span(codes).subspan(offset), stride,
          std::span(contents.pool)
              .subspan(size(block(slot, page)) * format.block_bytes + layout.block_offset,
                       layout.page_bytes));
      offset += quant::linear_bytes(one);
    }
  }

  DeviceMemory statics_;
  std::vector<std::int32_t> blocks_;  // [slots][pages]
  std::optional<DeviceArray<std::int32_t>> page_table_;
};

/// N(0,1) halves [tokens, kv_heads, head_dim].
inline std::vector<std::uint16_t> random_halves(std::size_t count, std::uint32_t draw) {
  quant::RandomStream random(5, quant::StreamPurpose::kTest, draw);
  std::vector<std::uint16_t> x(count);
  for (std::uint16_t& h : x) h = quant::to_half(static_cast<float>(random.next_normal()));
  return x;
}

class OnDevice : public ::testing::TestWithParam<quant::testing::PagedPlan> {
 protected:
  void SetUp() override {
    kvplan_device_info info;
    if (kvplan_query_device(0, &info) != KVPLAN_OK) GTEST_SKIP() << kvplan_last_error();
  }
};

}  // namespace kvplan::kernels::testing
