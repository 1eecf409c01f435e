#pragma once
// Small complete examples of every document, and a folder that removes itself, for the tests of
// schemas.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "schemas/error.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/validation.h"

namespace kvplan::test {

inline constexpr const char* kSomeSha256 =
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
inline constexpr const char* kOtherSha256 =
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A new folder per test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvplan-test-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr)
      throw EnvironmentError(name, "cannot make a temporary folder");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void replace_in_file(const std::filesystem::path& path, const std::string& from,
                            const std::string& to) {
  std::string text = read_bytes(path);
  const auto at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  write_bytes(path, text.replace(at, from.size(), to));
}

/// Runs `action` and returns the InputError it throws; fails the test when it throws none.
template <class Action>
InputError refused(const Action& action) {
  try {
    action();
  } catch (const InputError& error) {
    return error;
  }
  ADD_FAILURE() << "expected an InputError";
  return {"", "", ""};
}

inline ModelSpec example_model() {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 2;
  model.query_heads = 4;
  model.kv_heads = 2;
  model.head_dim = 8;
  model.rotary_dim = 4;
  model.rope.base = 100000;
  model.container = "gguf";
  model.kv_weights_sha256 = kSomeSha256;
  return model;
}

/// Distinct values that floats hold exactly and whose sums round nowhere.
template <class T>
Array<T> ramp(std::vector<std::int64_t> shape, double offset) {
  Array<T> array(std::move(shape));
  for (std::size_t i = 0; i < array.data.size(); ++i)
    array.data[i] = static_cast<T>(offset + 0.25 * static_cast<double>(i));
  return array;
}

/// One shard of a profile: windows first, first + step, ... of 16 tokens, 4 coherent windows at
/// most.
inline Profile example_profile(std::int64_t first = 0, std::int64_t count = 3,
                               std::int64_t step = 1) {
  Profile profile;
  profile.model = example_model();
  profile.tokens = profile.fisher_tokens = count * 12;
  profile.window = 16;
  profile.sink_tokens = 4;
  profile.coherent_windows = 4;
  profile.seed = 7;
  profile.program = "0.1.0";
  profile.sources = {{"wiki.txt", kSomeSha256, 1000, 0, 0.5, 1},
                     {"code.txt", kOtherSha256, 500, 0.25, 1, 1}};
  for (std::int64_t i = 0; i < count; ++i) profile.windows.push_back({first + i * step, 16, i % 2});
  const std::int64_t h = 2, d = 8, s = std::min<std::int64_t>(count, 4);
  const double offset = static_cast<double>(first);
  for (int l = 0; l < 2; ++l) {
    LayerProfile layer;
    layer.kv_heads = 2;
    layer.head_dim = 8;
    layer.rotary_dim = 4;
    for (const Side side : kSides) {
      SideSums& sums = layer.side(side);
      sums.sum = ramp<double>({h, d}, offset + 1);
      sums.outer = ramp<double>({h, d, d}, offset + 2);
      sums.norm_sum = ramp<double>({h}, offset + 3);
      sums.fisher = ramp<double>({h, d, d}, offset + 4);
      sums.absmax = ramp<float>({h, d}, offset + 5);
      sums.cross = ramp<float>({s, h, d, d}, 1000 * offset + l);
      sums.phase = ramp<float>({s, h, d, side == Side::kKey ? 5 : 1}, 1000 * offset + l);
    }
    layer.k_rotated_sum = ramp<double>({h, d}, offset + 6);
    layer.k_rotated_sumsq = ramp<double>({h, d}, offset + 7);
    layer.norm_ratio_sum = ramp<double>({h}, offset + 8);
    layer.inv_freq = {1, 0.01};
    layer.weight_mse = 0.125;
    profile.layers.push_back(std::move(layer));
    LayerSummary summary;
    summary.key_norm = 3.5;
    summary.value_norm = 0.1;
    summary.norm_ratio = 35;
    summary.mean_share_k = 0.6;
    summary.outlier_channels_k = {3, 12};
    summary.sensitivity_k = 1e-9;
    summary.weight_mse = 0.125;
    profile.summary.push_back(summary);
  }
  return profile;
}

inline PlanBundle example_plan() {
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = example_model();
  plan.context = 4096;
  plan.seed = 18446744073709551615u;
  plan.budget = {"bits", 3.25};
  plan.effective_bits = 3.25;
  plan.effective_bits_at_context = 3.45;
  plan.bytes_per_token = 26;
  plan.static_bytes = 4608;
  plan.codebooks = {{2, "uniform"}, {4, "lloyd_max"}};
  plan.group_size = 4;
  plan.predicted_kl = 0.1;
  for (int l = 0; l < 2; ++l) {
    LayerPlan layer;
    layer.index = l;
    layer.predicted_kl_share = 0.5;
    layer.rotated_cost_k = 0.19;
    layer.k = {3, {{{4, 2}, {}}, {{4, 2}, {}}}};
    layer.v = {2, {{{2, 2}, {}}, {{4, 0}, {}}}};
    plan.layers.push_back(layer);
    LayerTensors tensors;
    for (const Side side : kSides) {
      SideTensors& t = tensors.side(side);
      t.analysis = ramp<float>({2, 8, 8}, 1);
      t.synthesis = ramp<float>({2, 8, 8}, 2);
      t.lambda = ramp<float>({2, 8}, 3);
      t.mean = ramp<float>({2, 8}, 4);
      if (side == Side::kKey) t.mean_rotated = ramp<float>({2, 8}, 5);
      t.absmax = ramp<float>({2}, 6);
    }
    tensors.inv_freq = {1, 0.01};
    bundle.tensors.layers.push_back(tensors);
  }
  bundle.tensors.levels[2] = {-1.5f, -0.5f, 0.5f, 1.5f};
  plan.front = {{2.25, 0.4}, {3.25, 0.1}};
  plan.provenance = {kOtherSha256, "0.1.0", 65536, {{"text.md", kSomeSha256, 70000, 0, 0.5, 1}}};
  return bundle;
}

inline Validation example_validation() {
  Validation validation;
  validation.plan_sha256 = kSomeSha256;
  validation.model_sha256 = kOtherSha256;
  validation.text_names = {"wiki.txt"};
  validation.text_sha256 = {kSomeSha256};
  validation.part_begin = 0.5;
  validation.window = 1024;
  validation.windows = 24;
  validation.first_scored = 256;
  validation.scored_tokens = 18408;
  validation.program = "0.1.0";
  CandidateResult plan;
  plan.name = "plan";
  plan.mode = "worst";
  plan.effective_bits = 3.25;
  plan.perplexity = 17.5;
  plan.perplexity_rise = 0.028;
  plan.perplexity_rise_interval = {0.02, 0.035};
  plan.kl = {0.032, 0.001, 0.01, 0.1, 0.3, 2.5, 0.2};
  plan.kl_minus_plan = {0, 0};
  plan.same_top1 = 0.93;
  plan.kl_by_position = std::vector<double>(16, 0.03125);
  plan.predicted_kl = 0.03;
  CandidateResult baseline = plan;
  baseline.name = "turboquant:3";
  baseline.predicted_kl.reset();
  validation.candidates = {plan, baseline};
  validation.gates = {{"kl<=.05", 0.032, true}};
  validation.seed = 18446744073709551615u;
  validation.by_text = {{"plan", "decode", "wiki.txt", 12, 17.25, 0.03, {0.031, 0.002}}};
  validation.passkey = {
      {"plan", "decode", 1024, 0.5, 4, {-2.5, 0.5}, {-0.25, 0.125}, {0.75, 0.25}}};
  validation.prompt_source = {"prompts.jsonl", kOtherSha256, 64, "<|im_end|>"};
  PromptResult all{.name = "plan",
                   .mode = "worst",
                   .category = "",
                   .prompts = 12,
                   .tokens = 768,
                   .greedy_agreement = {0.97, 0.01},
                   .first_divergence = {30.5, 4},
                   .identical = {0.25, 0.125},
                   .kl = {0.02, 0.003},
                   .answers = 6,
                   .answer_log_probability = MeanEstimate{-1.5, 0.5},
                   .answer_log_probability_change = MeanEstimate{0.0625, 0.03}};
  PromptResult code = all;
  code.category = "code";
  code.answers = 0;
  code.answer_log_probability = code.answer_log_probability_change = std::nullopt;
  validation.prompts = {all, code};
  return validation;
}

}  // namespace kvplan::test
