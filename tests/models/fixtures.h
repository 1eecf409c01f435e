#pragma once
// Where the files that are not in the repository lie: environment variables name them, tests that
// lack one skip aloud.

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "models/model.h"

namespace kvplan::models {

inline std::filesystem::path path_from_environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

/// Tests on the output of tests/make_fixtures.py.
class FixtureTest : public testing::Test {
 protected:
  void SetUp() override {
    if (fixtures().empty()) {
      GTEST_SKIP() << "KVPLAN_FIXTURES does not name the output folder of tests/make_fixtures.py";
    }
  }
  static std::filesystem::path fixtures() { return path_from_environment("KVPLAN_FIXTURES"); }
};

/// Tests on the demo model, SmolLM2-135M-Instruct in Q4_1.
class DemoModelTest : public testing::Test {
 protected:
  void SetUp() override {
    if (demo_model().empty()) GTEST_SKIP() << "KVPLAN_DEMO_MODEL does not name a GGUF file";
  }
  static std::filesystem::path demo_model() { return path_from_environment("KVPLAN_DEMO_MODEL"); }
};

/// All weights of a tensor.
inline std::vector<float> read_all(const ModelReader& model, const std::string& name) {
  const auto shape = model.shape(name);
  std::vector<float> values(static_cast<std::size_t>(
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>())));
  model.read(name, values);
  return values;
}

}  // namespace kvplan::models
