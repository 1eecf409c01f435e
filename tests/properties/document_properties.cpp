// Documents come back as they were written; merging profiles does not depend on order or grouping.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/validation.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

double any_positive() {
  return std::ldexp(1 + *rc::gen::inRange(0, 1 << 20) * 0x1p-20, *rc::gen::inRange(-40, 40));
}

std::string any_text() { return *rc::gen::container<std::string>(rc::gen::inRange<char>(1, 127)); }

RC_GTEST_PROP(Documents, PlanComesBack, ()) {
  PlanBundle bundle = test::example_plan();
  Plan& plan = bundle.plan;
  plan.model.architecture = any_text();
  plan.context = *rc::gen::inRange<std::int64_t>(0, std::int64_t{1} << 40);
  plan.seed = *rc::gen::arbitrary<std::uint64_t>();
  plan.budget.value = any_positive();
  plan.predicted_kl = any_positive();
  plan.provenance.program = any_text();
  plan.rotation.seed = *rc::gen::arbitrary<std::uint64_t>();
  for (LayerPlan& layer : plan.layers)
    for (const Side side : kSides)
      for (HeadPlan& head : layer.side(side).heads) {
        head.widths = {*rc::gen::element(2, 4), *rc::gen::element(0, 2)};
        std::sort(head.widths.rbegin(), head.widths.rend());
      }
  for (auto& value : bundle.tensors.layers[0].k.lambda.data)
    value = static_cast<float>(any_positive());
  const test::TemporaryFolder folder;
  write_plan(bundle, folder / "a");
  const PlanBundle back = read_plan(folder / "a");
  RC_ASSERT(back.plan.model == plan.model);
  RC_ASSERT(back.plan.layers == plan.layers);
  RC_ASSERT(back.plan.seed == plan.seed);
  RC_ASSERT(back.plan.budget == plan.budget);
  RC_ASSERT(back.plan.predicted_kl == plan.predicted_kl);
  RC_ASSERT(back.plan.provenance == plan.provenance);
  RC_ASSERT(back.tensors.layers[0].k.lambda == bundle.tensors.layers[0].k.lambda);
  RC_ASSERT(plan_json(back) == test::read_bytes(folder / "a/plan.json"));
}

RC_GTEST_PROP(Documents, ValidationComesBack, ()) {
  Validation validation = test::example_validation();
  validation.candidates[0].kl.mean = any_positive();
  validation.candidates[0].name = any_text();
  validation.seed = *rc::gen::arbitrary<std::uint64_t>();
  const test::TemporaryFolder folder;
  test::write_bytes(folder / "validation.json", validation_json(validation));
  RC_ASSERT(validation_json(read_validation(folder / "validation.json")) ==
            validation_json(validation));
}

/// Profiles of disjoint runs of windows, of sizes 1..3.
std::vector<Profile> any_shards() {
  std::vector<Profile> shards;
  std::int64_t first = 0;
  const int count = *rc::gen::inRange(2, 5);
  for (int i = 0; i < count; ++i) {
    const auto windows = *rc::gen::inRange<std::int64_t>(1, 4);
    shards.push_back(test::example_profile(first, windows));
    first += windows;
  }
  return shards;
}

Profile merged(const std::vector<Profile>& parts) {
  const std::vector<std::string> names(parts.size(), "part");
  return merge_profiles(parts, {}, names);
}

/// The sums of examples.h are exact, so equality is asked for, not closeness.
bool equal(const Profile& a, const Profile& b) {
  return profile_json(a) == profile_json(b) && a.layers == b.layers && a.windows == b.windows;
}

RC_GTEST_PROP(Merge, DoesNotDependOnTheOrder, ()) {
  const auto shards = any_shards();
  auto shuffled = shards;
  for (std::size_t i = shuffled.size(); i > 1; --i)
    std::swap(shuffled[i - 1],
              shuffled[static_cast<std::size_t>(*rc::gen::inRange<int>(0, static_cast<int>(i)))]);
  RC_ASSERT(equal(merged(shards), merged(shuffled)));
}

RC_GTEST_PROP(Merge, DoesNotDependOnTheGrouping, ()) {
  const auto shards = any_shards();
  const auto cut = *rc::gen::inRange<std::ptrdiff_t>(1, static_cast<std::ptrdiff_t>(shards.size()));
  const Profile left = merged({shards.begin(), shards.begin() + cut});
  const Profile right = merged({shards.begin() + cut, shards.end()});
  RC_ASSERT(equal(merged(shards), merged({left, right})));
}

}  // namespace
}  // namespace kvplan
