// Results do not depend on which block of a grid arrives last at a segment.

#include "tests/kernels/attention_step.h"
#include "tests/kernels/emulated/cuda_host.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;
using quant::testing::calibrated_plan;

struct LastBlockFirst {
  LastBlockFirst() { emulated::host().last_block_first = true; }
  ~LastBlockFirst() { emulated::host().last_block_first = false; }
};

struct BlockOrderCase {
  const char* name;
  std::function<PlanBundle()> make;
  int queries_per_kv;
};

PlanBundle uniform_plan() {
  PlanBundle bundle = quant::testing::rotated_plan("turboquant:2", 64);
  bundle.plan.codebooks[2] = "uniform";
  return bundle;
}

class BlockOrder : public ::testing::TestWithParam<BlockOrderCase> {};

TEST_P(BlockOrder, ChangesNoByteOfAttention) {
  AttentionOnLayer attention(GetParam().make(),
                             {"Shared", GetParam().queries_per_kv, {500, 3, 68}, {502, 4, 69}});
  for (const int blocks : {2, 5, 40}) {
    SCOPED_TRACE(blocks);
    const AttentionResult forwards = attention.attend(blocks, 2);
    const LastBlockFirst order;
    EXPECT_EQ(attention.attend(blocks, 2), forwards);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Plans, BlockOrder,
    ::testing::Values(
        BlockOrderCase{"Uniform", uniform_plan, 2},
        BlockOrderCase{"UniformEightColumns", uniform_plan, 4},
        BlockOrderCase{"Mixed",
                       [] { return calibrated_plan(64, 16, {{6, 4, 2, 0}}, {{5, 2, 2, 0}}); }, 2},
        BlockOrderCase{"AnyTiles",
                       [] {
                         return calibrated_plan(64, 16, {{16, 16, 16, 16}, {7, 3, 2, 0}},
                                                {{16, 16, 16, 16}, {3, 3, 2, 1}});
                       },
                       5}),
    [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace kvplan::kernels
