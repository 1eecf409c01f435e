#pragma once
// A random llama in memory, random windows for it and a measure of agreement, for tests of the
// profile.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "calib/model.h"
#include "calib/text.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::calib {

inline constexpr int kHidden = 24, kFeedForward = 32, kVocab = 40, kQueryHeads = 4, kKvHeads = 2,
                     kHeadDim = 8;
inline constexpr int kWindow = 12, kSinks = 3;

/// A random llama in memory.
class TinyModel : public ModelReader {
 public:
  explicit TinyModel(int num_layers) {
    config_.architecture = "llama";
    config_.num_layers = num_layers;
    config_.hidden_size = kHidden;
    config_.intermediate_size = kFeedForward;
    config_.vocab_size = kVocab;
    config_.query_heads = kQueryHeads;
    config_.kv_heads = kKvHeads;
    config_.head_dim = config_.rotary_dim = kHeadDim;
    config_.rope.base = 100;
    config_.max_context = 64;
    config_.container = "gguf";
    spec_ = {"llama",      num_layers, kQueryHeads,         kKvHeads, kHeadDim, kHeadDim,
             config_.rope, "gguf",     std::string(64, 'a')};

    add("token_embd.weight", {kVocab, kHidden}, 1);
    add("output.weight", {kVocab, kHidden}, 0.5);
    add("output_norm.weight", {kHidden}, 1);
    for (int l = 0; l < num_layers; ++l) {
      const std::string block = "blk." + std::to_string(l) + ".";
      add(block + "attn_norm.weight", {kHidden}, 1);
      add(block + "attn_q.weight", {kQueryHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_k.weight", {kKvHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_v.weight", {kKvHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_output.weight", {kHidden, kQueryHeads * kHeadDim}, 0.4);
      add(block + "ffn_norm.weight", {kHidden}, 1);
      add(block + "ffn_gate.weight", {kFeedForward, kHidden}, 0.3);
      add(block + "ffn_up.weight", {kFeedForward, kHidden}, 0.3);
      add(block + "ffn_down.weight", {kHidden, kFeedForward}, 0.3);
    }
  }
  const ModelConfig& config() const override { return config_; }
  bool has(std::string_view name) const override { return tensors_.find(name) != tensors_.end(); }
  std::vector<std::int64_t> shape(std::string_view name) const override { return at(name).shape; }
  void read(std::string_view name, std::span<float> out) const override {
    std::copy(at(name).data.begin(), at(name).data.end(), out.begin());
  }
  const ModelSpec& spec() const override { return spec_; }
  std::filesystem::path path() const override { return "tiny.gguf"; }

  Array<float>& tensor(std::string_view name) { return tensors_.find(name)->second; }
  void rename_weights(char digit) { spec_.kv_weights_sha256.assign(64, digit); }

 private:
  const Array<float>& at(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw InputError("tiny.gguf", std::string(name), "absent");
    return found->second;
  }
  void add(const std::string& name, std::vector<std::int64_t> shape, double scale) {
    Array<float> x(std::move(shape));
    quant::RandomStream stream(1, quant::StreamPurpose::kTest,
                               static_cast<std::uint32_t>(tensors_.size()));
    for (float& value : x.data) value = static_cast<float>(scale * stream.next_normal());
    tensors_.emplace(name, std::move(x));
  }

  ModelConfig config_;
  ModelSpec spec_;
  std::map<std::string, Array<float>, std::less<>> tensors_;
};

inline std::vector<TextWindow> random_windows(std::int64_t count, std::int64_t first = 0) {
  std::vector<TextWindow> windows;
  for (std::int64_t index = first; index < first + count; ++index) {
    TextWindow window{index, 0, {}};
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
