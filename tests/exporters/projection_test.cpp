// What projections keep, raise, lower and lose.

#include "exporters/projection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "quant/codec.h"
#include "schemas/error.h"
#include "tests/exporters/plans.h"

namespace kvplan::exporters {
namespace {

using test::items;
using test::make_plan;
using test::uniform_plan;
using testing::Contains;
using testing::ElementsAre;

Projection project_to(std::string_view name, const PlanBundle& bundle, bool allow_lower = false) {
  const auto [target, options] = parse_stack(name);
  return project(bundle, make_stack(target, shape_of(bundle.plan), "llama", options),
                 {.allow_lower = allow_lower});
}

TEST(LayerRanges, JoinsNeighbours) {
  EXPECT_EQ(layer_ranges({0, 1, 26, 27}), "0-1,26-27");
  EXPECT_EQ(layer_ranges({3}), "3");
  EXPECT_EQ(layer_ranges({}), "all");
}

TEST(WantedWidth, RoundsMeansUp) {
  EXPECT_EQ(wanted_width({.bits = 3.25, .heads = {}}), 4);
  EXPECT_EQ(wanted_width({.bits = 3.0000000001, .heads = {}}), 3);
  EXPECT_EQ(wanted_width({.bits = 16, .heads = {}}), 16);
  EXPECT_EQ(wanted_width({.bits = 0, .heads = {}}), 0);
}

TEST(Projection, TakesTheFewestBytesWideEnough) {
  const auto p = project_to("llamacpp", make_plan({{4.25, 3}, {2, 4}, {5, 1}}));
  EXPECT_EQ(p.format(0, Side::kKey).name, "q5_0");
  EXPECT_EQ(p.format(0, Side::kValue).name, "q4_0");
  EXPECT_EQ(p.report.bytes_per_token, 3 * 2 * (44 + 36));
  EXPECT_DOUBLE_EQ(p.report.export_bits, 5);
}

TEST(Projection, NamesForcedLayersOfVllm) {
  const auto p = project_to("vllm", uniform_plan(8, 4, 4));
  EXPECT_EQ(p.setting, "int4_per_token_head");  // no boundary: fewer bytes in a model this short
  const auto q = project_to("vllm:turboquant_4bit_nc", uniform_plan(8, 4, 4));
  EXPECT_THAT(items(q.report), Contains("FORCED16/forced/0-1,6-7"));
  EXPECT_EQ(q.report.bytes_per_token, 2 * (4 * 70 + 4 * 256));
}

TEST(Projection, WithoutPermissionNothingIsLowered) {
  const PlanBundle plan = make_plan({{4, 4}, {16, 16}, {4, 4}});
  EXPECT_THROW(project_to("kvtuner", plan), InputError);
  EXPECT_THROW(project_to("lmdeploy", plan), InputError);
  EXPECT_THROW(project_to("sglang", plan), InputError);
  const auto p = project_to("kvtuner", plan, true);
  EXPECT_EQ(p.format(1, Side::kKey).width, 8);
  EXPECT_THAT(items(p.report), Contains("BITS/lowered/1"));
  EXPECT_LE(p.report.bytes_per_token, plan.plan.bytes_per_token);
  EXPECT_EQ(project_to("sglang", plan, true).format(1, Side::kKey).name, "fp8");
}

TEST(Projection, RefusalNamesLayerFieldAndRemedy) {
  try {
    project_to("kvtuner", make_plan({{4, 4}, {4, 16}}));
    FAIL();
  } catch (const InputError& error) {
    EXPECT_EQ(error.field(), "/layers/1/v/bits");
    EXPECT_THAT(error.what(), testing::HasSubstr("--allow-lower"));
  }
}

struct Feature {
  const char* name;
  std::function<void(PlanBundle&)> use;
  std::string item;
};

class Losses : public testing::TestWithParam<Feature> {};

TEST_P(Losses, AreReportedWhenUsedAndOnlyThen) {
  PlanBundle plan = uniform_plan(4, 4, 4, "q4_0");
  EXPECT_THAT(items(project_to("llamacpp", plan).report), ElementsAre());
  GetParam().use(plan);
  EXPECT_THAT(items(project_to("llamacpp", plan).report), ElementsAre(GetParam().item));
}

INSTANTIATE_TEST_SUITE_P(
    Features, Losses,
    testing::Values(
        Feature{"bits", [](PlanBundle& p) { p.plan.layers[2].k.bits = 3.5; }, "BITS/raised/2"},
        Feature{"heads",
                [](PlanBundle& p) {
                  p.plan.layers[1].v.heads[0].widths = {3};
                  p.plan.layers[1].v.heads[1].widths = {5};
                },
                "HEADS/lost/1"},
        Feature{"groups",
                [](PlanBundle& p) {
                  for (auto& head : p.plan.layers[0].k.heads) head.widths = {5, 3};
                },
                "GROUPS/lost/0"},
        Feature{"outliers", [](PlanBundle& p) { p.plan.layers[3].k.heads[1].outliers = {7}; },
                "OUTLIERS/lost/3"},
        Feature{"centre", [](PlanBundle& p) { p.plan.centre = true; }, "CENTRE/lost/all"},
        Feature{"codec", [](PlanBundle& p) { p.plan.codec = "int"; }, "CODEC/lost/all"},
        Feature{"sinks", [](PlanBundle& p) { p.plan.sink_tokens = 4; }, "SINKS/lost/all"},
        Feature{"window", [](PlanBundle& p) { p.plan.window = 64; }, "WINDOW/lost/all"}),
    [](const auto& info) { return info.param.name; });

TEST(Losses, OfRotations) {
  PlanBundle plan = uniform_plan(4, 4, 4, "rotated");
  plan.plan.rotation.kind = "hadamard";
  // Mainline's tiles are whole heads of 64; the rotated codec itself is another one.
  auto report = project_to("llamacpp", plan).report;
  EXPECT_THAT(items(report), ElementsAre("CODEC/lost/all"));
  plan.plan.rotation.kind = "signed_hadamard";
  EXPECT_THAT(items(project_to("llamacpp", plan).report),
              ElementsAre("ROTATION/lost/all", "CODEC/lost/all"));
  plan.plan.rotation.kind = "hadamard";
  PlanBundle wide = uniform_plan(4, 4, 4, "rotated", {.head_dim = 128});
  wide.plan.rotation.kind = "hadamard";
  report = project_to("llamacpp", wide).report;  // K tile 128, V tile 64
  ASSERT_THAT(items(report), ElementsAre("ROTATION/lost/all", "CODEC/lost/all"));
  EXPECT_EQ(report.items[0].plan, "V hadamard");
  EXPECT_EQ(report.items[0].exported, "hadamard 64");
  EXPECT_THAT(items(project_to("llamacpp:ik", wide).report), ElementsAre("CODEC/lost/all"));
  EXPECT_THAT(items(project_to("hf", wide).report),
              ElementsAre("ROTATION/lost/all", "CODEC/lost/all"));
}

TEST(Losses, CalibratedPlansLoseTheirTransform) {
  const auto report = project_to("llamacpp", uniform_plan(4, 4, 4, "calibrated")).report;
  EXPECT_THAT(items(report), ElementsAre("TRANSFORM/lost/all", "CODEC/lost/all"));
}

TEST(Losses, PlansOfTheStacksOwnCodecsLoseNothing) {
  struct Own {
    const char *stack, *codec;
    double bits;
  };
  for (const auto& [stack, codec, bits] :
       {Own{"llamacpp", "q8_0", 8}, Own{"llamacpp", "q5_0", 5}, Own{"modelopt", "nvfp4", 4},
        Own{"kvtuner", "kivi", 3}, Own{"llamacpp", "fp16", 16}}) {
    SCOPED_TRACE(codec);
    EXPECT_THAT(items(project_to(stack, uniform_plan(4, bits, bits, codec)).report), ElementsAre());
  }
}

TEST(LossReport, PredictsFromRotatedCost) {
  const auto report = project_to("llamacpp", uniform_plan(4, 4, 8, "q4_0")).report;
  ASSERT_TRUE(report.export_predicted_kl);
  EXPECT_NEAR(*report.export_predicted_kl, 4 * (0.2 * 0.00738 + 0.1 * 0.0000287), 1e-9);
  PlanBundle unknown = uniform_plan(4, 4, 4);
  unknown.plan.layers[1].rotated_cost_v.reset();
  EXPECT_FALSE(project_to("llamacpp", unknown).report.export_predicted_kl);
}

TEST(LossReport, JsonHasTheFieldsOfItsSpecification) {
  const auto json = nlohmann::json::parse(
      loss_report_json(project_to("vllm:turboquant_4bit_nc", uniform_plan(8, 4, 4)).report));
  for (const char* field : {"target", "target_version", "plan_bits", "export_bits",
                            "plan_predicted_kl", "export_predicted_kl", "bytes_per_token", "items"})
    EXPECT_TRUE(json.contains(field)) << field;
  const auto& item = json["items"][0];
  EXPECT_EQ(item["code"], "FORCED16");
  EXPECT_EQ(item["class"], "forced");
  EXPECT_EQ(item["layers"], "0-1,6-7");
  EXPECT_EQ(item["plan"], "K4V4");
  EXPECT_EQ(item["export"], "K16V16");
}

/// Plans in bytes of `as_plan` are those of the report, measured on the codecs' buffers.
TEST(AsPlan, CodecsTakeTheReportedBytes) {
  for (const char* stack : {"llamacpp", "llamacpp:ik", "vllm", "kv-scales", "modelopt", "kvtuner",
                            "hf", "lmdeploy", "vllm:turboquant_4bit_nc", "vllm:nvfp4"}) {
    SCOPED_TRACE(stack);
    const PlanBundle plan = make_plan({{4, 3}, {5, 4}, {6, 4}, {4, 2}, {8, 8}});
    const Projection p = project_to(stack, plan);
    const PlanBundle what = as_plan(p, plan);
    EXPECT_NEAR(quant::measured_effective_bits(what), p.report.export_bits, 1e-9);
  }
}

TEST(AsPlan, RefusesFormatsWithoutACodec) {
  const PlanBundle plan = uniform_plan(4, 2, 2, "int", {.head_dim = 128});
  EXPECT_THROW(as_plan(project_to("llamacpp:buun", plan), plan), InputError);
}

}  // namespace
}  // namespace kvplan::exporters
