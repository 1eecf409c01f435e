// What only an emulated device can show: missing and old devices, full memory, capture.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/cuda_cache.h"
#include "kernels/runtime.h"
#include "schemas/error.h"
#include "tests/kernels/emulated/cuda_host.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::kernels::emulated {
namespace {

using namespace kvplan::quant::testing;
using ::testing::HasSubstr;

class DeviceErrors : public ::testing::Test {
 protected:
  ~DeviceErrors() override { host() = {}; }
};

TEST_F(DeviceErrors, MissingAndOldDevicesAreNamed) {
  kvplan_device_info info{};
  host().devices = 0;
  EXPECT_EQ(kvplan_query_device(0, &info), KVPLAN_NO_DEVICE);
  host() = {};
  host().driver_version = 0;
  EXPECT_EQ(kvplan_query_device(0, &info), KVPLAN_NO_DEVICE);
  host() = {};
  host().driver_version = 12080;
  EXPECT_EQ(kvplan_query_device(0, &info), KVPLAN_OLD_DEVICE);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("12.8"));
  EXPECT_THAT(kvplan_last_error(), HasSubstr("update the NVIDIA driver"));
  host() = {};
  host().compute_capability = 75;
  EXPECT_EQ(kvplan_query_device(0, &info), KVPLAN_OLD_DEVICE);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("7.5"));
  EXPECT_EQ(info.multiprocessors, 0);
}

quant::CacheGeometry geometry_of(const PlanBundle& bundle) {
  quant::CacheGeometry geometry;
  geometry.query_heads = bundle.plan.model.query_heads;
  geometry.max_tokens = 1000;
  return geometry;
}

TEST_F(DeviceErrors, FullMemoryIsReportedAndEverythingIsFreed) {
  const PlanBundle bundle = baseline("turboquant:4", paged_model(2, 64));
  const std::size_t before = device_bytes();
  make_cuda_cache(bundle, geometry_of(bundle));
  EXPECT_EQ(device_bytes(), before);
  host().memory_bytes = before + 400'000;
  EXPECT_THROW(make_cuda_cache(bundle, geometry_of(bundle)), MemoryError);
  EXPECT_EQ(device_bytes(), before);
}

TEST_F(DeviceErrors, StepsCannotBeginInACapture) {
  const PlanBundle bundle = baseline("turboquant:4", paged_model(2, 64));
  const auto cache = make_cuda_cache(bundle, geometry_of(bundle));
  const std::vector<quant::SequenceStep> step = {{0, 1}};
  host().capturing = true;
  EXPECT_THROW(cache->begin_step(step), ArgumentError);
  host().capturing = false;
  EXPECT_EQ(cache->length(0), 0);
  cache->begin_step(step);
}

}  // namespace
}  // namespace kvplan::kernels::emulated
