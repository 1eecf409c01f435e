#include "kernels/decode_linear.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/runtime.h"
#include "quant/baselines.h"
#include "quant/codebook.h"
#include "quant/codec.h"
#include "quant/random.h"

namespace kvplan::kernels {
namespace {

struct DeviceFree {
  void operator()(void* p) const { cudaFree(p); }
};
template <class T>
std::unique_ptr<T, DeviceFree> to_device(const std::vector<T>& host) {
  void* p = nullptr;
  EXPECT_EQ(cudaMalloc(&p, host.size() * sizeof(T)), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
            cudaSuccess);
  return std::unique_ptr<T, DeviceFree>(static_cast<T*>(p));
}

struct Case {
  int bits;
  std::int64_t tokens;
  int kv_heads, head_dim;
};

class DecodeLinear : public testing::TestWithParam<Case> {};

TEST_P(DecodeLinear, EqualsTheCpuReferenceBitForBit) {
  kvplan_device_info info;
  if (kvplan_query_device(0, &info) != KVPLAN_OK) GTEST_SKIP() << kvplan_last_error();
  const auto [bits, tokens, kv_heads, head_dim] = GetParam();
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 1;
  model.query_heads = model.kv_heads = kv_heads;
  model.head_dim = model.rotary_dim = head_dim;
  const auto bundle =
      quant::baseline_plan("turboquant:" + std::to_string(bits), model, 0, 1024, 7,
                           std::vector<double>(static_cast<std::size_t>(head_dim / 2), 0.1));
  const auto codec = quant::make_codec(bundle, 0, Side::kKey);
  const quant::KvShape shape{tokens, kv_heads, head_dim};
  quant::RandomStream draws(3, quant::StreamPurpose::kTest, static_cast<std::uint32_t>(bits));
  std::vector<float> x(static_cast<std::size_t>(shape.elements()));
  for (auto& v : x) v = static_cast<float>(3 * draws.next_normal());
  std::vector<std::byte> codes(codec->packed_bytes(shape));
  codec->encode(shape, 0, x, codes);
  std::vector<float> expected(x.size()), found(x.size());
  codec->decode_transformed(shape, codes, expected);

  const auto d_codes = to_device(codes);
  const auto d_levels = to_device(quant::lloyd_max_beta(bits, head_dim).levels);
  const auto d_y = to_device(std::vector<float>(x.size(), -1e30f));
  ASSERT_EQ(decode_linear({d_codes.get(), tokens * kv_heads, head_dim, bits, d_levels.get()},
                          d_y.get(), nullptr),
            cudaSuccess);
  ASSERT_EQ(
      cudaMemcpy(found.data(), d_y.get(), found.size() * sizeof(float), cudaMemcpyDeviceToHost),
      cudaSuccess);
  EXPECT_EQ(found, expected);
}

INSTANTIATE_TEST_SUITE_P(Widths, DecodeLinear,
                         testing::Values(Case{1, 1, 1, 64}, Case{2, 3, 2, 64}, Case{3, 65, 3, 64},
                                         Case{4, 127, 1, 128}, Case{5, 7, 2, 80},
                                         Case{6, 33, 4, 96}, Case{7, 5, 1, 72},
                                         Case{8, 64, 2, 256}));

TEST(DecodeLinearArguments, AreChecked) {
  float y = 0;
  const float levels[2] = {-1, 1};
  const std::byte codes[3] = {};
  EXPECT_EQ(decode_linear({nullptr, 1, 8, 1, levels}, &y, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(decode_linear({codes, 1, 8, 9, levels}, &y, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(decode_linear({codes, 0, 8, 1, levels}, &y, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(decode_linear({codes, 1, 8, 1, levels}, nullptr, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace kvplan::kernels
