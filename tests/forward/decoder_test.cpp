#include "forward/decoder.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "forward/causal_attention.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "tests/forward/normal_tensor.h"
#include "tests/models/fixtures.h"
#include "tests/models/tiny_model.h"

namespace kvplan::forward {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

at::Tensor some_ids(std::int64_t tokens, std::int64_t vocab) {
  return (at::arange(tokens, at::kLong) * 7 + 3).remainder(vocab).unsqueeze(0);
}

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

/// Softmax attention written out; key head of query head h is h / queries_per_kv.
at::Tensor plain_attention(const at::Tensor& q, const LayerKv& kv) {
  const auto repeat = q.size(1) / kv.k.size(1), tokens = q.size(2);
  const auto k = kv.k.repeat_interleave(repeat, 1), v = kv.v.repeat_interleave(repeat, 1);
  const auto position = at::arange(tokens, at::kLong);
  const auto hidden = position.unsqueeze(0) > position.unsqueeze(1);
  const auto scores =
      at::matmul(q, k.transpose(-1, -2)) / std::sqrt(static_cast<double>(q.size(3)));
  return at::matmul(at::softmax(scores.masked_fill(hidden, -INFINITY), -1), v);
}

struct Family {
  const char* name;
  models::ModelConfig config;
};

std::vector<Family> families() {
  std::vector<Family> rows;
  rows.push_back({"Llama", models::tiny_config()});
  rows.push_back({"UntiedWithBiases", models::tiny_config()});
  rows.back().config.tied_embeddings = false;
  rows.back().config.qkv_bias = rows.back().config.output_bias = true;
  rows.push_back({"PartialRotary", models::tiny_config()});
  rows.back().config.rotary_dim = 8;
  rows.push_back({"OneKvHead", models::tiny_config()});
  rows.back().config.kv_heads = 1;
  return rows;
}

class DecoderFamily : public testing::TestWithParam<Family> {
 protected:
  models::TinyModel model_{GetParam().config};
  Decoder decoder_{model_};
};

TEST_P(DecoderFamily, LaterTokensDoNotReachEarlierPositions) {
  const auto ids = some_ids(12, 50);
  auto other = ids.clone();
  other.narrow(1, 8, 4).fill_(1);
  const auto a = decoder_.hidden(ids), b = decoder_.hidden(other);
  EXPECT_LT(max_difference(a.narrow(1, 0, 8), b.narrow(1, 0, 8)), 1e-6);
  EXPECT_GT(max_difference(a.narrow(1, 8, 4), b.narrow(1, 8, 4)), 1e-3);
}

TEST_P(DecoderFamily, EqualsAttentionWrittenOut) {
  const auto ids = some_ids(33, 50);
  EXPECT_LT(max_difference(decoder_.hidden(ids), decoder_.hidden(ids, {}, plain_attention)), 2e-5);
}

TEST_P(DecoderFamily, RotationByInverseIsUndone) {
  const auto x = normal({2, 3, 9, 16}, 1);
  const auto turned = decoder_.rotate(x, 0, 5);
  EXPECT_GT(max_difference(turned, x), 0.1);
  EXPECT_LT(max_difference(decoder_.rotate(turned, 0, 5, true), x), 1e-5);
  // Norms are kept, channels above rotary_dim are untouched.
  EXPECT_LT(max_difference(turned.pow(2).sum(-1), x.pow(2).sum(-1)), 1e-4);
  const auto rotary = GetParam().config.rotary_dim;
  const auto rest = [&](const at::Tensor& y) { return y.narrow(-1, rotary, 16 - rotary); };
  EXPECT_TRUE(at::equal(rest(turned), rest(x)));
}

TEST_P(DecoderFamily, BatchedSequencesStayApart) {
  const auto ids = some_ids(20, 50).view({2, 10});
  const auto together = decoder_.hidden(ids);
  for (int b = 0; b < 2; ++b)
    EXPECT_LT(max_difference(together.narrow(0, b, 1), decoder_.hidden(ids.narrow(0, b, 1))), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(All, DecoderFamily, testing::ValuesIn(families()),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(Decoder, RotatesChannelPairsByPositionTimesFrequency) {
  models::TinyModel model(models::tiny_config());
  const Decoder decoder(model);
  const auto x = normal({1, 1, 3, 16}, 2);
  const auto turned = decoder.rotate(x, 0, 100);
  for (std::int64_t t = 0; t < 3; ++t)
    for (std::int64_t j = 0; j < 8; ++j) {
      const double angle =
          static_cast<double>(100 + t) * decoder.inv_freq()[static_cast<std::size_t>(j)];
      const auto row = x[0][0][t], image = turned[0][0][t];
      const double a = row[j].item<double>(), b = row[j + 8].item<double>();
      EXPECT_NEAR(image[j].item<double>(), a * std::cos(angle) - b * std::sin(angle), 1e-5);
      EXPECT_NEAR(image[j + 8].item<double>(), b * std::cos(angle) + a * std::sin(angle), 1e-5);
    }
}

TEST(Decoder, LayersTakenOneByOneGiveTheHiddenStates) {
  models::TinyModel model(models::tiny_config());
  const Decoder decoder(model);
  const auto ids = some_ids(9, 50);
  auto x = decoder.embed(ids);
  for (int l = 0; l < 2; ++l) x = decoder.layer(l, x);
  EXPECT_TRUE(at::equal(decoder.final_norm(x), decoder.hidden(ids)));
  EXPECT_EQ(decoder.head(decoder.final_norm(x)).sizes(), (std::vector<std::int64_t>{1, 9, 50}));
}

TEST(Decoder, HookSeesAndReplacesTheCache) {
  models::TinyModel model(models::tiny_config());
  const Decoder decoder(model);
  const auto ids = some_ids(9, 50);
  std::vector<int> seen;
  const auto changed = decoder.hidden(ids, [&](LayerKv& kv) {
    seen.push_back(kv.layer);
    EXPECT_EQ(kv.k.sizes(), (std::vector<std::int64_t>{1, 2, 9, 16}));
    EXPECT_LT(max_difference(decoder.rotate(kv.k_pre, kv.layer, 0), kv.k), 1e-6);
    kv.v = kv.v * 0.5;
  });
  EXPECT_THAT(seen, testing::ElementsAre(0, 1));
  EXPECT_GT(max_difference(changed, decoder.hidden(ids)), 1e-2);
}

TEST(Decoder, GradientsOfALayerMatchFiniteDifferences) {
  models::TinyModel model(models::tiny_config());
  const Decoder decoder(model);
  const std::vector<at::Tensor> start = {normal({1, 7, 24}, 3), normal({1, 2, 7, 16}, 4),
                                         normal({1, 2, 7, 16}, 5)};
  const auto weights = normal({1, 7, 24}, 6);
  // x enters the block, the other two are added to k and v.
  const auto loss = [&](const std::vector<at::Tensor>& in) {
    const auto y = decoder.layer(1, in[0], 3, [&](LayerKv& kv) {
      kv.k = kv.k + in[1];
      kv.v = kv.v + in[2];
    });
    return (y * weights).sum(at::kDouble);
  };
  std::vector<at::Tensor> leaves;
  for (const auto& x : start) leaves.push_back(x.clone().requires_grad_());
  const auto gradients = torch::autograd::grad({loss(leaves)}, leaves);

  constexpr double kStep = 1e-2;
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < start.size(); ++i) {
    SCOPED_TRACE(i);
    const auto direction = normal(start[i].sizes().vec(), static_cast<std::uint32_t>(7 + i));
    auto ahead = start, behind = start;
    ahead[i] = start[i] + direction * kStep;
    behind[i] = start[i] - direction * kStep;
    const double slope = (loss(ahead) - loss(behind)).item<double>() / (2 * kStep);
    const double expected = (gradients[i] * direction).sum(at::kDouble).item<double>();
    EXPECT_GT(std::abs(expected), 0.1);
    EXPECT_NEAR(slope, expected, 5e-3 * std::abs(expected) + 5e-3);
  }
}

TEST(Decoder, RefusesIdsOutsideTheVocabulary) {
  models::TinyModel model(models::tiny_config());
  const Decoder decoder(model);
  for (const std::int64_t id : {std::int64_t{-1}, std::int64_t{50}}) {
    const auto ids = at::full_like(some_ids(4, 50), id);
    EXPECT_THAT([&] { decoder.embed(ids); },
                ThrowsMessage<ArgumentError>(HasSubstr("token id " + std::to_string(id))));
  }
}

/// Hidden size x vocabulary far beyond any machine; only shapes are asked for.
class HugeModel : public models::TinyModel {
 public:
  using models::TinyModel::TinyModel;
  std::vector<std::int64_t> shape(std::string_view) const override {
    return {std::int64_t{1} << 30, std::int64_t{1} << 20};
  }
};

TEST(Decoder, SaysHowMuchMemoryTheWeightsNeed) {
  const HugeModel model(models::tiny_config());
  EXPECT_THAT([&] { Decoder decoder(model); }, ThrowsMessage<MemoryError>(HasSubstr("MiB")));
}

/// Folders with a checkpoint and what transformers computes from it (tests/make_fixtures.py).
std::vector<std::filesystem::path> oracle_folders() {
  std::vector<std::filesystem::path> folders;
  if (const char* fixtures = std::getenv("KVPLAN_FIXTURES"))
    for (const auto& entry : std::filesystem::recursive_directory_iterator(fixtures))
      if (entry.path().filename() == "oracle.safetensors")
        folders.push_back(entry.path().parent_path());
  return folders;
}

at::Tensor tensor_of(const Array<float>& array) {
  return at::from_blob(const_cast<float*>(array.data.data()), array.shape, at::kFloat).clone();
}

/// `prefix` names one of the oracle's forward passes.
void expect_equal_to(const SafetensorsFile& oracle, const Decoder& decoder,
                     const std::string& prefix) {
  const auto stored_ids = oracle.i64(prefix + "ids");
  const auto ids =
      at::from_blob(const_cast<std::int64_t*>(stored_ids.data.data()), stored_ids.shape, at::kLong);
  const auto expect = [&](const std::string& name, const at::Tensor& ours) {
    SCOPED_TRACE(prefix + name);
    const auto theirs = tensor_of(oracle.f32(prefix + name, ours.sizes().vec()));
    EXPECT_LT(max_difference(ours, theirs), 1e-4 * theirs.abs().max().item<double>());
  };
  const auto hidden = decoder.hidden(ids, [&](LayerKv& kv) {
    const std::string layer = "layers." + std::to_string(kv.layer) + ".";
    expect(layer + "k_pre", kv.k_pre);
    expect(layer + "k", kv.k);
    expect(layer + "v", kv.v);
  });
  expect("logits", decoder.head(hidden));
}

TEST(Decoder, HalfMatricesRoundTheWeightsAlone) {
  models::TinyModel model(models::tiny_config());
  const auto ids = at::arange(12, at::kLong).view({1, 12});
  const auto exact = Decoder(model).hidden(ids);
  for (const auto type : {WeightType::kBFloat16, WeightType::kFloat16}) {
    const double difference = max_difference(exact, Decoder(model, type).hidden(ids));
    EXPECT_GT(difference, 0) << weight_type_name(type);
    EXPECT_LT(difference, 0.05) << weight_type_name(type);
  }
}

using DecoderFixture = models::FixtureTest;

TEST_F(DecoderFixture, ABf16CheckpointLosesNothingAsBf16) {
  const auto model = models::open_model(fixtures() / "llama_bf16_sharded");
  const auto ids = at::arange(12, at::kLong).view({1, 12});
  EXPECT_EQ(max_difference(Decoder(*model).hidden(ids),
                           Decoder(*model, WeightType::kBFloat16).hidden(ids)),
            0);
}

/// Every fixture in its containers: sequences that end inside the windows and original contexts of
/// the models that have them, and beyond.
TEST(Decoder, EqualsTransformers) {
  const auto folders = oracle_folders();
  if (folders.empty()) GTEST_SKIP() << "KVPLAN_FIXTURES names no folder with oracle.safetensors";
  for (const auto& folder : folders) {
    const SafetensorsFile oracle(folder / "oracle.safetensors");
    for (const auto& path : {folder, std::filesystem::path(folder.string() + ".gguf")}) {
      if (!std::filesystem::exists(path)) continue;
      SCOPED_TRACE(path.filename().string());
      const auto model = models::open_model(path);
      const Decoder decoder(*model);
      expect_equal_to(oracle, decoder, "");
      expect_equal_to(oracle, decoder, "short.");
    }
  }
}

/// Layers of window 3, score cap 2, another scale; blocks of queries that begin anywhere.
TEST(CausalAttention, EqualsScoresWrittenOut) {
  const auto q = normal({2, 4, 300, 8}, 1), k = normal({2, 2, 300, 8}, 2),
             v = normal({2, 2, 300, 8}, 3);
  const auto position = at::arange(300, at::kLong);
  const auto distance = position.unsqueeze(1) - position.unsqueeze(0);
  for (const AttentionRule& rule :
       {AttentionRule{.scale = 0.3}, AttentionRule{.scale = 0.3, .window = 300},
        AttentionRule{.scale = 0.3, .window = 7}, AttentionRule{.scale = 0.9, .soft_cap = 2},
        AttentionRule{.scale = 0.9, .soft_cap = 2, .window = 280}}) {
    SCOPED_TRACE(testing::Message() << "cap " << rule.soft_cap << ", window " << rule.window);
    auto hidden = distance < 0;
    if (rule.window > 0) hidden = hidden.logical_or(distance >= rule.window);
    auto scores = at::matmul(q, k.repeat_interleave(2, 1).transpose(-1, -2)) * rule.scale;
    if (rule.soft_cap > 0) scores = (scores / rule.soft_cap).tanh() * rule.soft_cap;
    const auto expected = at::matmul(at::softmax(scores.masked_fill(hidden, -INFINITY), -1),
                                     v.repeat_interleave(2, 1));
    EXPECT_LT(max_difference(causal_attention(q, k, v, rule), expected), 1e-5);
    // The last queries of a sequence, and the very last.
    for (const std::int64_t first : {290, 299}) {
      const auto last = causal_attention(q.narrow(2, first, 300 - first), k, v, rule, first);
      EXPECT_LT(max_difference(last, expected.narrow(2, first, 300 - first)), 1e-5);
    }
  }
}

TEST(Decoder, RefusesPositionsThatWereNotLearned) {
  models::ModelConfig config = models::tiny_config();
  config.learned_positions = true;
  config.rope.style = "none";
  config.rotary_dim = 0;
  config.max_context = 8;
  models::TinyModel model(config);
  const Decoder decoder(model);
  EXPECT_NO_THROW(decoder.embed(some_ids(8, 50)));
  EXPECT_FALSE(at::equal(decoder.embed(some_ids(4, 50)), decoder.embed(some_ids(4, 50), 3)));
  EXPECT_THAT([&] { decoder.embed(some_ids(4, 50), 5); },
              ThrowsMessage<ArgumentError>(HasSubstr("knows 8 positions")));
}

}  // namespace
}  // namespace kvplan::forward
