// Kept files of earlier builds (tests/data/formats): whatever changes, they stay readable and mean
// what they meant. A file is added when a format changes, never changed.

#include <gtest/gtest.h>

#include <filesystem>

#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/validation.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

const std::filesystem::path kFormats = KVPLAN_FORMATS_FOLDER;

TEST(OldFormats, PlansOfVersion1) {
  const PlanBundle plan = read_plan(kFormats / "v1/plan");
  EXPECT_EQ(plan.plan.codec, "calibrated");
  EXPECT_EQ(plan.plan.model.head_dim, 16);
  EXPECT_EQ(plan.plan.layers.at(0).k.heads.at(0).widths, (std::vector{4, 2}));
  EXPECT_EQ(plan.plan.codebooks.at(2), "uniform");
  EXPECT_EQ(plan.tensors.levels.at(2).size(), 4u);
  EXPECT_EQ(plan.tensors.layers.at(0).k.analysis.shape, (std::vector<std::int64_t>{1, 16, 16}));

  const PlanBundle rotated = read_plan(kFormats / "v1/plan-rotated");
  EXPECT_EQ(rotated.plan.codec, "rotated");
  EXPECT_EQ(rotated.plan.rotation.kind, "haar");
}

TEST(OldFormats, PlansBeforeVariantsAndTrials) {
  const PlanBundle old = read_plan(kFormats / "v1/plan-before-variants");
  EXPECT_EQ(old.plan.variant, RotatedVariant{});
  EXPECT_TRUE(old.plan.trials.empty());
  // Beside the fields that it lacks it is the plan of today.
  EXPECT_EQ(plan_json(old), plan_json(read_plan(kFormats / "v1/plan")));
}

TEST(OldFormats, ProfilesOfVersion1) {
  const Profile profile = read_profile(kFormats / "v1/profile");
  EXPECT_EQ(profile.windows.size(), 2u);
  EXPECT_EQ(profile.tokens, 24);
  EXPECT_EQ(profile.layers.at(0).k.cross.shape, (std::vector<std::int64_t>{2, 1, 8, 8}));
}

TEST(OldFormats, ValidationsOfVersion1) {
  const Validation validation = read_validation(kFormats / "v1/validation.json");
  EXPECT_EQ(validation.candidates.at(0).kl.mean, 0.032);
  const Validation old = read_validation(kFormats / "v1/validation-before-tasks.json");
  EXPECT_EQ(old.candidates.at(0).runtime, "cpu");
  EXPECT_EQ(validation_json(old), validation_json(validation));
}

TEST(OldFormats, OtherVersionsAreRefusedWithBothNumbers) {
  test::TemporaryFolder folder;
  std::filesystem::copy(kFormats / "v1/plan", folder / "plan");
  test::replace_in_file(folder / "plan/plan.json", "\"version\": 1", "\"version\": 2");
  const InputError error = test::refused([&] { read_plan(folder / "plan"); });
  EXPECT_EQ(error.field(), "/version");
  EXPECT_NE(std::string(error.what()).find("newer kvplan"), std::string::npos) << error.what();
}

}  // namespace
}  // namespace kvplan
