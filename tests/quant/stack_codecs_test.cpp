// What serving stacks store, against re-implementations of their kernels in numpy and torch
// (make_stack_golden.py), and what plans that name a side's own codec refuse.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "schemas/error.h"
#include "tests/quant/codec_fixtures.h"
#include "tests/temporary_folder.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

/// Bytes of one head of 64 values as hexadecimal digits; an empty value: as the key.
struct GoldenRow {
  const char* name;
  std::string key, value;
};

std::vector<float> golden_vector() {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i)
    x[static_cast<std::size_t>(i)] = static_cast<float>(i * 37 % 101 - 50) / 16;
  return x;
}

std::string hexadecimal(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte b : bytes) {
    text += "0123456789abcdef"[std::to_integer<int>(b) >> 4];
    text += "0123456789abcdef"[std::to_integer<int>(b) & 15];
  }
  return text;
}

class StackCodecs : public ::testing::TestWithParam<GoldenRow> {};

TEST_P(StackCodecs, MatchTheStacks) {
  const PlanBundle bundle = baseline(GetParam().name, small_model(1));
  const KvShape shape{1, 1, 64};
  const std::vector<float> x = golden_vector();
  EXPECT_EQ(hexadecimal(encoded(*make_codec(bundle, 0, Side::kKey), shape, x)), GetParam().key);
  EXPECT_EQ(hexadecimal(encoded(*make_codec(bundle, 1, Side::kValue), shape, x)),
            GetParam().value.empty() ? GetParam().key : GetParam().value);
}

INSTANTIATE_TEST_SUITE_P(
    Golden, StackCodecs,
    ::testing::Values(
        GoldenRow{"int8_per_token_head",
                  "81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc3a98f654b10f6dcb"
                  "2986e4429ffd5bb91775d2308eec4aa70563c01e7cda38952693c93c",
                  ""},
        GoldenRow{"int4_per_token_head",
                  "a13ffa3b9477655126684c2e99033787aa87535d43529787c27246709c54023747447c40", ""},
        GoldenRow{"turboquant_4bit_nc",
                  "a7679bf6366699669466e366996633666799f63366996633663e660966336699634b",
                  "602bd7935e0ac6823df9b5612ce8945f1bc7834e0ab6723de9a5612cd8945f1bab3640c2"},
        GoldenRow{"turboquant_3bit_nc", "eb56eecb466ee1966fe4966c1bb9271bb925dbb3115bb291634b",
                  "58338757b18616af620e2d7ecd1c5ec59a59bc8a39b47835253b40c2"},
        GoldenRow{"lmdeploy_int8",
                  "005ebd1a78d63391f04dab0866c42180de3b99f754b30f6ecc2987e642a1ff5cba1775d4308fed4a"
                  "a80563c21f7ddb3897f552b00d6bca2685e3409efd59b8144626f857",
                  ""},
        GoldenRow{"lmdeploy_int4",
                  "b0167bc2378de349ae056ab0267cd2389de359af156bc1268cd2489ef459bf15ab368047", ""},
        GoldenRow{"lmdeploy_turbo",
                  "bb35cbc33dfc939f3339c3c33c3c9393393c73933937c3033c3c93933939c3c3634bb827",
                  "515ae525527e85075958252552528585634b"},
        GoldenRow{"kvtuner:2+pertoken", "2b400000789e779ee79de7b90b40003c9224912489244927", ""},
        GoldenRow{
            "kvtuner:4+pertoken",
            "ab360000602cd8945f1bc6824efab5713ce8a46f7736003c1bc6824e09b5713de8a4602bd7935f1a", ""},
        GoldenRow{"hf:3+g64", "58338757b18616af620e2d7ecd1c5ec59a59bc8a39b478354992643f000048c0",
                  ""},
        GoldenRow{"hf:4+g32",
                  "602bd7934e0ac6823df9a5612ce8945f5555d53e000048c01bd7834e0ab6723df9a5602cd8945f1b"
                  "efeece3e000040c0",
                  ""},
        GoldenRow{"q6_0",
                  "402efc11aacc55bbc06680f86fe65ed64dc43ca32ba21a81f87020ae5533ea443fa940fea12bc34a"
                  "d45cd47ef67f078f09a128b2",
                  ""},
        GoldenRow{"q4_0+wht=64",
                  "86b9b8779999b6279990797b9999b7b7999986b9989927b799907bfb9999b7b799997b7b", ""},
        GoldenRow{"q8_0+wht=16",
                  "c628d70330d6e17fd6d6edd6d6d6d6d6d6d62303dc2a362ad67fedd62a2a2a2ad6d65d2af322c500"
                  "0900007f12000000000000000c0224e029a12020f2e0e0e020202020",
                  ""},
        GoldenRow{"q5_1+wht=64",
                  "1334bcc09000200019cd6866009c666fc7c066660c0c6666b43586c52c0c44c0dfddb292dddf2909"
                  "dddd9292dddd2929",
                  ""}),
    [](const auto& row) { return test_name(row.param.name); });

/// A side of codec `name` and the given width.
PlanBundle with_side(const std::string& name, int width, Side side = Side::kKey,
                     const ModelSpec& model = small_model()) {
  PlanBundle bundle = baseline("fp16", model);
  for (LayerPlan& layer : bundle.plan.layers) {
    layer.side(side).codec = name;
    for (HeadPlan& head : layer.side(side).heads) head.widths = {width};
  }
  return bundle;
}

TEST(SideCodec, SidesOfAPlanStoreWithCodecsOfTheirOwn) {
  PlanBundle bundle = with_side("q8_0+wht=64", 8);
  bundle.plan.layers[0].v.codec = "q4_0+wht=64";
  for (HeadPlan& head : bundle.plan.layers[0].v.heads) head.widths = {4};
  EXPECT_DOUBLE_EQ(measured_effective_bits(bundle), (8.5 + 4.5 + 8.5 + 16) / 4);
  bundle.plan.effective_bits = measured_effective_bits(bundle);
  const TemporaryFolder folder;
  write_plan(bundle, folder.path() / "plan");
  const PlanBundle read = read_plan(folder.path() / "plan");
  const KvShape shape{5, 3, 64};
  const std::vector<float> x = gaussian(shape);
  EXPECT_EQ(encoded(*make_codec(read, 0, Side::kValue), shape, x),
            encoded(*make_codec(baseline("q4_0+wht=64"), 1, Side::kValue), shape, x));
  EXPECT_EQ(round_trip(*make_codec(read, 1, Side::kValue), shape, x), x);
}

TEST(SideCodec, PublishedCodecsKeepTheirBytes) {
  const KvShape shape{40, 3, 64};
  const std::vector<float> x = gaussian(shape);
  for (const auto& [name, width] : std::initializer_list<std::pair<const char*, int>>{
           {"q5_1", 5}, {"kivi:2", 2}, {"turboquant:3+rht+nc", 3}, {"fp8_e4m3", 8}, {"mxfp4", 4}}) {
    PlanBundle own = with_side(name, width);
    own.plan.seed = 11;
    EXPECT_EQ(encoded(*make_codec(own, 1, Side::kKey), shape, x),
              encoded(*make_codec(baseline(name), 1, Side::kKey), shape, x))
        << name;
  }
}

TEST(SideCodec, StaticScalesAreOfAHeadOfATensorOrOne) {
  PlanBundle bundle = with_side("fp8_e4m3", 8);
  bundle.tensors.layers.resize(2);
  for (LayerTensors& layer : bundle.tensors.layers) {
    layer.k.absmax = Array<float>({3});
    layer.k.absmax.data = {448, 896, 1792};
  }
  std::vector<float> x(3 * 64, 1.0625f);  // a tie of e4m3 at scale 1
  const auto read_with = [&](const char* name) {
    for (LayerPlan& layer : bundle.plan.layers) layer.k.codec = name;
    const auto x_hat = round_trip(*make_codec(bundle, 0, Side::kKey), {1, 3, 64}, x);
    return std::vector<float>{x_hat[0], x_hat[64], x_hat[128]};
  };
  x[64] = x[128] = 300;
  EXPECT_THAT(read_with("fp8_e4m3"), ::testing::ElementsAre(1.0f, 288.0f, 288.0f));
  x = std::vector<float>(3 * 64, 0.0048828125f);  // 2.5 steps of the subnormals at scale 1
  EXPECT_THAT(read_with("fp8_e4m3"), ::testing::ElementsAre(0.00390625f, 0.00390625f, 0.0078125f));
  EXPECT_THAT(read_with("fp8_e4m3+tensor"),
              ::testing::ElementsAre(0.0078125f, 0.0078125f, 0.0078125f));
  EXPECT_THAT(read_with("fp8_e4m3+unit"),
              ::testing::ElementsAre(0.00390625f, 0.00390625f, 0.00390625f));
}

TEST(SideCodec, ConstantVectorsAndHugeValuesStayFinite) {
  const KvShape shape{2, 1, 64};
  for (const auto* name :
       {"int8_per_token_head", "int4_per_token_head", "turboquant_k8v4", "turboquant_4bit_nc",
        "turboquant_3bit_nc", "lmdeploy_int8", "lmdeploy_int4", "lmdeploy_turbo", "kvtuner:2",
        "kvtuner:8+pertoken", "hf:1+g32", "q6_0+wht=64", "fp8_e4m3+unit", "nvfp4+unit"}) {
    const PlanBundle bundle = baseline(name, small_model(1));
    for (const float value : {0.0f, 1.0f, -60000.0f})
      for (const Side side : kSides) {
        const auto x_hat =
            round_trip(*make_codec(bundle, 0, side), shape, std::vector<float>(128, value));
        EXPECT_TRUE(std::ranges::all_of(x_hat, [](float x) { return std::isfinite(x); }))
            << name << " " << value << " " << side_name(side);
      }
  }
}

TEST(SideCodec, RefusesWhatItCannotStore) {
  const auto refusal = [](const std::string& name, int width,
                          const ModelSpec& model = small_model()) {
    try {
      make_codec(with_side(name, width, Side::kValue, model), 1, Side::kValue);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string("nothing was refused");
  };
  using ::testing::HasSubstr;
  EXPECT_THAT(refusal("q4_0", 8), HasSubstr("at 4 bits"));
  EXPECT_THAT(refusal("q4_0", 8), HasSubstr("/layers/1/v/codec"));
  EXPECT_THAT(refusal("lmdeploy_turbo", 3), HasSubstr("at 2 bits"));
  EXPECT_THAT(refusal("turbo3", 3), HasSubstr("there is no such codec"));
  EXPECT_THAT(refusal("q4_0+wht=48", 4), HasSubstr("power of two"));
  EXPECT_THAT(refusal("q4_0+wht=128", 4), HasSubstr("power of two"));
  EXPECT_THAT(refusal("q4_0+wht=64+wht=64", 4), HasSubstr("twice"));
  EXPECT_THAT(refusal("kivi:2+wht=64", 2), HasSubstr("no option of kivi"));
  EXPECT_THAT(refusal("fp8_e5m2+unit", 8), HasSubstr("no option of fp8_e5m2"));
  EXPECT_THAT(refusal("turboquant:3+centre", 3), HasSubstr("neither means"));
  EXPECT_THAT(refusal("turboquant_4bit_nc", 4, small_model(2, 80)), HasSubstr("power of two"));
  EXPECT_THAT(refusal("q4_0", 4, small_model(1, 80)), HasSubstr("multiple of 32"));
  EXPECT_THAT(refusal("hf:0+g64", 0), HasSubstr("1 to 8 bits"));
}

}  // namespace
}  // namespace kvplan::quant
