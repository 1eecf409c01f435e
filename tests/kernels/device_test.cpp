#include <gtest/gtest.h>

#include <cstring>

#include "kernels/runtime.h"

namespace {

TEST(Device, NullInfoIsRefusedWithText) {
  EXPECT_EQ(kvplan_query_device(0, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_NE(std::strstr(kvplan_last_error(), "null"), nullptr);
}

TEST(Device, AnswersOrSaysWhyNot) {
  kvplan_device_info info{};
  const auto status = kvplan_query_device(0, &info);
  if (status == KVPLAN_OK) {
    EXPECT_GE(info.compute_capability, 80);
    EXPECT_GT(info.memory_bytes, size_t{1} << 30);
    EXPECT_STREQ(kvplan_last_error(), "");
    EXPECT_EQ(kvplan_query_device(9999, &info), KVPLAN_BAD_ARGUMENT);
  } else {
    EXPECT_TRUE(status == KVPLAN_NO_DEVICE || status == KVPLAN_OLD_DEVICE) << status;
    EXPECT_GT(std::strlen(kvplan_last_error()), 20u);
    EXPECT_EQ(info.multiprocessors, 0);
  }
}

}  // namespace
