#include "studies/study.h"

#include <gtest/gtest.h>

#include <set>

namespace kvplan::studies {
namespace {

TEST(StudyResult, VerdictFollowsFromChecks) {
  StudyResult confirmed;
  confirmed.near(Role::kClaim, "as published", 1.02, 1, .05);
  confirmed.near(Role::kExplanation, "not needed", 5, 1, .05);
  EXPECT_EQ(confirmed.verdict(), Verdict::kConfirmed);

  StudyResult explained;
  explained.near(Role::kClaim, "as published", 1.2, 1, .05);
  explained.near_relative(Role::kExplanation, "under another count", 1.2, 1.2, .01);
  EXPECT_EQ(explained.verdict(), Verdict::kExplained);

  StudyResult refuted;
  refuted.at_most(Role::kClaim, "as published", 1.2, 1);
  EXPECT_EQ(refuted.verdict(), Verdict::kRefuted);
  refuted.holds(Role::kExplanation, "nor for another reason", false);
  EXPECT_EQ(refuted.verdict(), Verdict::kRefuted);

  StudyResult nothing;
  nothing.exact(Role::kReference, "a figure", 2, 3);
  EXPECT_EQ(nothing.verdict(), Verdict::kNotRun);
  EXPECT_EQ(nothing.missed_references(), 1);
}

TEST(StudyResult, NotANumberPassesNoCheck) {
  StudyResult result;
  result.at_least(Role::kClaim, "not a number", 0.0 / 0.0, 0);
  EXPECT_EQ(result.verdict(), Verdict::kRefuted);
}

TEST(Studies, HaveUniqueIdsAndSources) {
  std::set<std::string> ids;
  for (const Study& study : all_studies()) {
    SCOPED_TRACE(study.info.id);
    EXPECT_TRUE(ids.insert(study.info.id).second);
    EXPECT_FALSE(study.info.title.empty());
    EXPECT_FALSE(study.info.claim.empty());
    EXPECT_FALSE(study.info.source.empty());
    EXPECT_FALSE(study.info.explanation.empty());
    EXPECT_TRUE(study.run);
  }
}

}  // namespace
}  // namespace kvplan::studies
