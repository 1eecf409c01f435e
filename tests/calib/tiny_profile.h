#pragma once
// A small model, random windows for it and a measure of agreement, for tests of the profile.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "quant/random.h"
#include "tests/models/tiny_model.h"
#include "tokenizers/text.h"

namespace kvplan::calib {

inline constexpr int kVocab = 40, kKvHeads = 2, kHeadDim = 8;
inline constexpr int kWindow = 12, kSinks = 3;

inline models::ModelConfig small_config(int num_layers) {
  models::ModelConfig config = models::tiny_config();
  config.num_layers = num_layers;
  config.vocab_size = kVocab;
  config.kv_heads = kKvHeads;
  config.head_dim = config.rotary_dim = kHeadDim;
  config.rope.base = 100;
  config.tied_embeddings = false;
  return config;
}

inline std::vector<tokenizers::TextWindow> random_windows(std::int64_t count,
                                                          std::int64_t first = 0) {
  std::vector<tokenizers::TextWindow> windows;
  for (std::int64_t index = first; index < first + count; ++index) {
    tokenizers::TextWindow window{index, 0, {}};
    quant::RandomStream stream(2, quant::StreamPurpose::kTest, static_cast<std::uint32_t>(index));
    for (int t = 0; t < kWindow; ++t)
      window.tokens.push_back(static_cast<std::int32_t>(stream.next_below(kVocab)));
    windows.push_back(std::move(window));
  }
  return windows;
}

/// Largest difference relative to the largest magnitude.
template <class T>
double relative_difference(const Array<T>& a, const Array<T>& b) {
  EXPECT_EQ(a.shape, b.shape);
  double difference = 0, largest = 1e-300;
  for (std::size_t i = 0; i < std::min(a.data.size(), b.data.size()); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(a.data[i]) - b.data[i]));
    largest = std::max(largest, std::abs(static_cast<double>(b.data[i])));
  }
  return difference / largest;
}

}  // namespace kvplan::calib
