// De-quantised vectors of `read_back` against the CPU codec.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/views.h"
#include "tests/kernels/device_layer.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;

constexpr int kLength = 4 + 2 * 64 + 11;
// Sums of up to 256 products in another order.
constexpr float kTolerance = 1e-5f;

class ReadBack : public OnDevice {};

TEST_P(ReadBack, GivesWhatTheCodecDecodes) {
  DeviceLayer layer(GetParam().make(), 0, 1, 200);
  const auto token = size(layer.view.kv_heads) * size(layer.view.head_dim);
  const std::vector<std::uint16_t> x[2] = {random_halves(kLength * token, 1),
                                           random_halves(kLength * token, 2)};
  const int slot = layer.slot(0);
  layer.store(slot, kLength, x);
  const DeviceContents device(layer.contents);
  const quant::KvShape page_shape{quant::kPageTokens, layer.view.kv_heads, layer.view.head_dim};
  for (int side = 0; side < 2; ++side) {
    SCOPED_TRACE(side == 0 ? "keys" : "values");
    std::vector<float> expected;
    for (const std::uint16_t half : x[side]) expected.push_back(quant::from_half(half));
    for (int page = 0; page < full_pages(kLength, layer.view.sink_tokens); ++page) {
      const int first = layer.view.sink_tokens + page * quant::kPageTokens;
      layer.codecs[size(side)]->decode(
          page_shape, first, layer.linear(page, side, x[side]),
          std::span(expected).subspan(size(first) * token, size(page_shape.elements())));
    }
    for (const auto& [first, count] : {std::pair{0, kLength}, {67, 3}, {5, 17}, {kLength, 0}}) {
      const DeviceArray<std::uint16_t> halves(size(count) * token + 1);
      const DeviceArray<float> floats(size(count) * token + 1);
      ReadBackView view;
      view.layer = layer.view;
      device.attach(view.layer);
      view.slot = slot;
      view.length = kLength;
      view.first = first;
      view.count = count;
      view.page_table = layer.page_table();
      view.table_stride = layer.pages;
      view.side = side;
      view.x = halves.data();
      view.x_float = floats.data();
      ASSERT_EQ(read_back(view, nullptr), cudaSuccess);
      const auto found = floats.host();
      const auto found_halves = halves.host();
      float largest = 0, worst = 0;
      std::size_t rounded_otherwise = 0;
      for (std::size_t i = 0; i < size(count) * token; ++i) {
        const float want = expected[size(first) * token + i];
        largest = std::max(largest, std::abs(want));
        worst = std::max(worst, std::abs(found[i] - want));
        if (std::isnan(found[i])) worst = INFINITY;
        rounded_otherwise += found_halves[i] != quant::to_half(found[i]);
      }
      EXPECT_LE(worst, kTolerance * largest) << "from position " << first;
      EXPECT_EQ(rounded_otherwise, 0u);
      EXPECT_TRUE(std::isnan(found.back())) << "written past the end";
    }
  }
}

TEST_P(ReadBack, GivesTheTransformedCoordinates) {
  DeviceLayer layer(GetParam().make(), 0, 1, 200);
  for (const auto* const spec : {&layer.format.k, &layer.format.v})
    for (const auto& head : spec->heads)
      if (head.fp16 || !head.outliers.empty()) return;  // without transformed domain
  const auto token = size(layer.view.kv_heads) * size(layer.view.head_dim);
  const int length = layer.view.sink_tokens + quant::kPageTokens;
  const std::vector<std::uint16_t> x[2] = {random_halves(size(length) * token, 3),
                                           random_halves(size(length) * token, 4)};
  layer.store(layer.slot(0), length, x);
  const DeviceContents device(layer.contents);
  const quant::KvShape shape{quant::kPageTokens, layer.view.kv_heads, layer.view.head_dim};
  for (int side = 0; side < 2; ++side) {
    std::vector<float> expected(size(shape.elements()));
    layer.codecs[size(side)]->decode_transformed(shape, layer.linear(0, side, x[side]), expected);
    const DeviceArray<float> codes(expected.size());
    ReadBackView view;
    view.layer = layer.view;
    device.attach(view.layer);
    view.slot = layer.slot(0);
    view.length = length;
    view.first = layer.view.sink_tokens;
    view.count = quant::kPageTokens;
    view.page_table = layer.page_table();
    view.table_stride = layer.pages;
    view.side = side;
    view.codes = codes.data();
    ASSERT_EQ(read_back(view, nullptr), cudaSuccess);
    EXPECT_EQ(codes.host(), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, ReadBack, ::testing::ValuesIn(quant::testing::paged_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace kvplan::kernels
