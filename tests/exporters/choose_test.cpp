// Bytes of formats against published tables, and the search against trying everything.

#include "exporters/choose.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "schemas/error.h"
#include "tests/exporters/plans.h"

namespace kvplan::exporters {
namespace {

CacheShape shape_with(int layers, int kv_heads, int head_dim) {
  ModelSpec model;
  model.num_layers = layers;
  model.query_heads = model.kv_heads = kv_heads;
  model.head_dim = head_dim;
  return shape_of(model);
}

struct Slot {
  const char *target, *k, *v;
  int head_dim;
  std::int64_t bytes;
};

class SlotBytes : public testing::TestWithParam<Slot> {};

TEST_P(SlotBytes, AreThoseOfTheStack) {
  const Slot& slot = GetParam();
  const CacheShape shape = shape_with(8, 1, slot.head_dim);
  const auto [target, options] = parse_stack(slot.target);
  const Stack stack = make_stack(target, shape, "llama", options);
  const LayerFormat formats = {stack.format_index(slot.k), stack.format_index(slot.v)};
  EXPECT_EQ(stack.bytes(shape.layers[0], formats), slot.bytes);
}

// vLLM: slot_size_aligned of its TurboQuantConfig; ggml: type sizes of ggml-common.h.
INSTANTIATE_TEST_SUITE_P(
    Tables, SlotBytes,
    testing::Values(
        Slot{"vllm", "turboquant_k8v4", "turboquant_k8v4 (V)", 64, 100},
        Slot{"vllm", "turboquant_k8v4", "turboquant_k8v4 (V)", 128, 196},
        Slot{"vllm", "turboquant_k8v4", "turboquant_k8v4 (V)", 256, 388},
        Slot{"vllm", "turboquant_4bit_nc", "turboquant_4bit_nc (V)", 64, 70},
        Slot{"vllm", "turboquant_4bit_nc", "turboquant_4bit_nc (V)", 128, 134},
        Slot{"vllm", "turboquant_4bit_nc", "turboquant_4bit_nc (V)", 256, 262},
        Slot{"vllm", "turboquant_k3v4_nc", "turboquant_k3v4_nc (V)", 64, 62},
        Slot{"vllm", "turboquant_k3v4_nc", "turboquant_k3v4_nc (V)", 128, 118},
        Slot{"vllm", "turboquant_k3v4_nc", "turboquant_k3v4_nc (V)", 256, 230},
        Slot{"vllm", "turboquant_3bit_nc", "turboquant_3bit_nc (V)", 64, 54},
        Slot{"vllm", "turboquant_3bit_nc", "turboquant_3bit_nc (V)", 128, 102},
        Slot{"vllm", "turboquant_3bit_nc", "turboquant_3bit_nc (V)", 256, 198},
        Slot{"vllm", "turboquant_k3v4_nc", "turboquant_k3v4_nc (V)", 8, 14},  // 13, made even
        Slot{"vllm", "fp8", "fp8 (V)", 128, 256},
        Slot{"vllm", "int8_per_token_head", "int8_per_token_head (V)", 128, 264},
        Slot{"vllm", "int4_per_token_head", "int4_per_token_head (V)", 128, 136},
        Slot{"vllm", "nvfp4", "nvfp4 (V)", 128, 144}, Slot{"vllm", "auto", "auto", 64, 256},
        Slot{"llamacpp", "q8_0", "q4_0", 64, 68 + 36},
        Slot{"llamacpp", "q5_0", "f16", 64, 44 + 128},
        Slot{"llamacpp:ik", "q6_0", "q4_0", 64, 52 + 36},
        Slot{"llamacpp:thetom", "turbo2", "turbo4", 128, 34 + 68},
        Slot{"llamacpp:thetom", "turbo3", "turbo3", 64, 100},  // padded to 128
        Slot{"llamacpp:buun", "turbo1_tcq", "turbo8", 128, 20 + 130},
        Slot{"lmdeploy", "turbo_quant", "turbo_quant (V)", 128, 64 + 4 + 32 + 2},
        Slot{"kvtuner", "4", "2", 64, 2 * 20 + 2 * 12}, Slot{"hf", "3", "8", 64, 32 + 72}));

/// Everything that the stack can be told, one by one.
void for_each_assignment(const Stack& stack, const CacheShape& shape,
                         const std::function<void(const std::vector<LayerFormat>&)>& visit) {
  const int layers = shape.num_layers();
  if (stack.segments) {
    const int types = static_cast<int>(stack.formats.size());
    std::vector<std::vector<int>> sides;
    for (int base = 0; base < types; ++base)
      for (int first = 0; first < types; ++first)
        for (int last = 0; last < types; ++last)
          for (int n = 0; n <= layers; ++n)
            for (int m = 0; m <= layers; ++m) {
              std::vector<int> side;
              for (int l = 0; l < layers; ++l)
                side.push_back(l >= layers - m ? last : l < n ? first : base);
              sides.push_back(side);
            }
    std::ranges::sort(sides);
    sides.erase(std::unique(sides.begin(), sides.end()), sides.end());
    for (const auto& k : sides)
      for (const auto& v : sides) {
        std::vector<LayerFormat> formats;
        for (std::size_t l = 0; l < k.size(); ++l) formats.push_back({k[l], v[l]});
        visit(formats);
      }
    return;
  }
  for (const Setting& setting : stack.settings) {
    std::vector<LayerFormat> formats(static_cast<std::size_t>(layers));
    const std::function<void(std::size_t)> descend = [&](std::size_t l) {
      if (l == formats.size()) return visit(formats);
      for (const LayerFormat& choice : setting.choices[l]) {
        formats[l] = choice;
        descend(l + 1);
      }
    };
    descend(0);
  }
}

struct SearchCase {
  const char* stack;
  int layers, head_dim;
};

class Search : public testing::TestWithParam<SearchCase> {};

TEST_P(Search, FindsWhatTryingEverythingFinds) {
  const SearchCase& c = GetParam();
  const CacheShape shape = shape_with(c.layers, 3, c.head_dim);
  const auto [target, options] = parse_stack(c.stack);
  const Stack stack = make_stack(target, shape, "llama", options);
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    // Whole costs tie often, as those of --allow-lower do; some formats are forbidden.
    std::vector<double> costs;
    for (std::size_t i = 0; i < 2 * shape.layers.size() * stack.formats.size(); ++i)
      costs.push_back(random() % 9 == 0 ? kForbidden : static_cast<double>(random() % 5));
    const auto cost = [&](int layer, Side side, const Format& format) {
      const auto index = static_cast<std::size_t>(&format - stack.formats.data());
      return costs[(2 * static_cast<std::size_t>(layer) + static_cast<std::size_t>(side)) *
                       stack.formats.size() +
                   index];
    };
    const auto total = [&](const std::vector<LayerFormat>& formats) {
      double cost_sum = 0;
      std::int64_t bytes = 0;
      int plain = 0;
      for (std::size_t l = 0; l < formats.size(); ++l) {
        bytes += stack.bytes(shape.layers[l], formats[l]);
        for (const Side side : kSides) {
          const Format& format = stack.formats[static_cast<std::size_t>(formats[l].of(side))];
          cost_sum += cost(static_cast<int>(l), side, format);
          plain += format.plain() ? 1 : 0;
        }
      }
      return std::tuple(cost_sum, bytes, plain);
    };
    std::int64_t least = kNoLimit, most = 0;
    for_each_assignment(stack, shape, [&](const auto& formats) {
      const auto [cost_sum, bytes, plain] = total(formats);
      if (cost_sum == kForbidden) return;
      least = std::min(least, bytes);
      most = std::max(most, bytes);
    });
    for (const std::int64_t limit : {kNoLimit, least - 1, least, (least + most) / 2, most}) {
      if (least == kNoLimit) break;
      auto best = std::tuple(kForbidden, std::int64_t{0}, 0);
      for_each_assignment(stack, shape, [&](const auto& formats) {
        const auto found = total(formats);
        if (std::get<1>(found) <= limit) best = std::min(best, found);
      });
      const auto chosen = choose(stack, shape, cost, limit);
      ASSERT_EQ(chosen.has_value(), std::get<0>(best) != kForbidden) << limit;
      if (!chosen) continue;
      EXPECT_EQ(total(chosen->layers), best) << limit;
      EXPECT_EQ(chosen->bytes_per_token, std::get<1>(best));
    }
    if (least == kNoLimit) {
      EXPECT_FALSE(choose(stack, shape, cost));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Stacks, Search,
    testing::Values(SearchCase{"vllm", 8, 64}, SearchCase{"vllm:nvfp4", 6, 64},
                    SearchCase{"modelopt", 6, 64}, SearchCase{"llamacpp", 5, 64},
                    SearchCase{"llamacpp:ik", 4, 64}, SearchCase{"llamacpp:thetom", 8, 64},
                    SearchCase{"llamacpp:buun", 3, 128}, SearchCase{"kvtuner:hqq", 3, 64},
                    SearchCase{"lmdeploy", 4, 64}));

TEST(Segments, LayersOfTheLastRunWin) {
  const Segments s{.base = 0, .first = 1, .first_count = 3, .last = 2, .last_count = 2};
  std::vector<int> formats;
  for (int l = 0; l < 4; ++l) formats.push_back(s.format_of(l, 4));
  EXPECT_THAT(formats, testing::ElementsAre(1, 1, 2, 2));
}

TEST(MakeStack, RefusesWhatNobodyCanHold) {
  const CacheShape plain = shape_with(4, 1, 64);
  EXPECT_THROW(make_stack("vllm", plain, "llama", {.dtypes = {"octave_4"}}), ArgumentError);
  EXPECT_THROW(make_stack("llamacpp", plain, "llama", {.dialect = "other"}), ArgumentError);
  EXPECT_THROW(make_stack("kvtuner", plain, "llama", {.backend = "quanto"}), ArgumentError);
  EXPECT_THROW(make_stack("ollama", plain, "llama"), ArgumentError);
  EXPECT_THROW(parse_stack("lmdeploy:int2"), ArgumentError);
  EXPECT_THROW(make_stack("sglang", plain, "gpt2"), InputError);
  EXPECT_THROW(make_stack("llamacpp", shape_with(4, 1, 80), "llama"), InputError);
  EXPECT_THROW(
      make_stack("vllm", shape_with(4, 1, 96), "llama", {.dtypes = {"turboquant_4bit_nc"}}),
      InputError);
  CacheShape latent = plain;
  latent.layers[2].kind = "mla";
  for (const std::string_view target : kTargets)
    EXPECT_THROW(make_stack(target, latent, "llama"), InputError) << target;
  // Heads of 96 leave vLLM the dtypes that take any head.
  const Stack stack = make_stack("vllm", shape_with(4, 1, 96), "llama");
  std::vector<std::string> names;
  for (const Setting& setting : stack.settings) names.push_back(setting.name);
  EXPECT_THAT(names, testing::ElementsAre("fp8", "int8_per_token_head"));
}

}  // namespace
}  // namespace kvplan::exporters
