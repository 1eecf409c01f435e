#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <nlohmann/json.hpp>

#include "models/families.h"
#include "models/model.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "schemas/sha256.h"
#include "tests/models/fixtures.h"
#include "tests/temporary_folder.h"

namespace kvplan::models {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class ModelFixture : public FixtureTest {};

TEST_F(ModelFixture, ConfigIsThatOfTheCheckpoint) {
  const auto model = open_model(fixtures() / "llama_head_dim");
  const auto& c = model->config();
  EXPECT_EQ(c.architecture, "llama");
  EXPECT_EQ(c.container, "hf");
  EXPECT_EQ(c.num_layers, 3);
  EXPECT_EQ(c.hidden_size, 64);
  EXPECT_EQ(c.intermediate_size, 96);
  EXPECT_EQ(c.vocab_size, 96);
  EXPECT_EQ(c.query_heads, 4);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.head_dim, 24);
  EXPECT_EQ(c.rotary_dim, 24);
  EXPECT_EQ(c.norm_epsilon, 1e-5);
  EXPECT_EQ(c.max_context, 256);
  EXPECT_EQ(c.rope, RopeSpec{});
  EXPECT_FALSE(c.tied_embeddings || c.qkv_bias || c.output_bias);
  EXPECT_THAT(model->shape("blk.2.attn_q.weight"), ElementsAre(96, 64));
  EXPECT_THAT(model->shape("blk.2.attn_output.weight"), ElementsAre(64, 96));
}

TEST_F(ModelFixture, TiedEmbeddingsHaveNoOutputTensor) {
  for (const char* name : {"llama_tied", "qwen2_fp16_tied"}) {
    const auto model = open_model(fixtures() / name);
    EXPECT_TRUE(model->config().tied_embeddings) << name;
    EXPECT_FALSE(model->has("output.weight")) << name;
    EXPECT_THROW(model->shape("output.weight"), InputError) << name;
  }
  EXPECT_TRUE(open_model(fixtures() / "llama_gqa")->has("output.weight"));
}

TEST_F(ModelFixture, BiasesFollowFamilyAndConfig) {
  const auto llama = open_model(fixtures() / "llama_bias");
  EXPECT_TRUE(llama->config().qkv_bias && llama->config().output_bias);
  const auto qwen2 = open_model(fixtures() / "qwen2");
  EXPECT_TRUE(qwen2->config().qkv_bias);
  EXPECT_FALSE(qwen2->config().output_bias);
}

TEST_F(ModelFixture, ShardedBfloat16EqualsTheStoredBits) {
  const auto folder = fixtures() / "llama_bf16_sharded";
  const auto model = open_model(folder);
  const SafetensorsFile shard(folder / "model-00001-of-00003.safetensors");
  const auto stored = shard.at("model.embed_tokens.weight").data;
  const auto values = read_all(*model, "token_embd.weight");
  ASSERT_EQ(stored.size(), values.size() * 2);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto bits = std::to_integer<std::uint32_t>(stored[2 * i]) << 16 |
                      std::to_integer<std::uint32_t>(stored[2 * i + 1]) << 24;
    ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), bits) << i;
  }
}

TEST_F(ModelFixture, FingerprintCoversStoredKeyAndValueBytes) {
  const auto folder = fixtures() / "llama_gqa";
  const SafetensorsFile file(folder / "model.safetensors");
  Sha256 hash;
  for (const char* layer : {"0", "1", "2"}) {
    for (const char* part : {"k", "v"}) {
      hash.update(
          file.at(std::string("model.layers.") + layer + ".self_attn." + part + "_proj.weight")
              .data);
    }
  }
  const auto model = open_model(folder);
  const auto& spec = model->spec();
  EXPECT_EQ(spec.kv_weights_sha256, hash.finish());
  EXPECT_EQ(spec.architecture, "llama");
  EXPECT_EQ(spec.container, "hf");
  EXPECT_EQ(spec.num_layers, 3);
  EXPECT_EQ(spec.query_heads, 4);
  EXPECT_EQ(spec.kv_heads, 2);
  EXPECT_EQ(spec.head_dim, 16);
  EXPECT_EQ(spec.rotary_dim, 16);
  EXPECT_EQ(spec.rope, model->config().rope);
}

class BothContainers : public FixtureTest, public testing::WithParamInterface<const char*> {};

TEST_P(BothContainers, GiveTheSameModel) {
  const auto hf = open_model(fixtures() / GetParam());
  const auto gguf = open_model(fixtures() / (std::string(GetParam()) + ".gguf"));
  EXPECT_EQ(gguf->config().container, "gguf");
  EXPECT_FLOAT_EQ(static_cast<float>(gguf->config().norm_epsilon),
                  static_cast<float>(hf->config().norm_epsilon));
  const ModelConfig &a = gguf->config(), &b = hf->config();
  EXPECT_EQ(a.max_context, b.max_context);
  EXPECT_EQ(a.windows, b.windows);
  EXPECT_EQ(a.rope.style, b.rope.style);
  for (int layer = 0; layer < b.num_layers; ++layer) {
    EXPECT_NEAR(rotary_attention_factor(a.layer_rope(layer)),
                rotary_attention_factor(b.layer_rope(layer)), 1e-6);
    for (const std::int64_t sequence : {12, 40}) {
      const auto found = rotary_frequencies(a, layer, sequence),
                 expected = rotary_frequencies(b, layer, sequence);
      ASSERT_EQ(found.size(), expected.size());
      for (std::size_t j = 0; j < found.size(); ++j)
        EXPECT_NEAR(found[j] / expected[j], 1, 1e-6) << "layer " << layer << " pair " << j;
    }
  }
  EXPECT_NEAR(a.attention_scale, b.attention_scale, 1e-9);
  EXPECT_EQ(a.attention_soft_cap, b.attention_soft_cap);
  EXPECT_EQ(a.logit_soft_cap, b.logit_soft_cap);
  EXPECT_EQ(a.embedding_scale, b.embedding_scale);
  EXPECT_EQ(expected_tensors(gguf->config()), expected_tensors(hf->config()));
  for (const auto& [name, shape] : expected_tensors(hf->config())) {
    EXPECT_EQ(read_all(*gguf, name), read_all(*hf, name)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, BothContainers,
                         testing::Values("llama_gqa", "llama_bias", "llama_llama3", "llama_linear",
                                         "llama_yarn", "mistral", "qwen2", "qwen2_yarn", "qwen3",
                                         "gemma", "gemma2", "gemma3", "phi2", "phi3",
                                         "phi3_longrope", "gpt2"),
                         [](const auto& row) { return row.param; });

TEST_F(ModelFixture, QuantisedGgufIsTheSameModelWithinItsSteps) {
  const auto exact = open_model(fixtures() / "llama_gqa");
  const auto quantised = open_model(fixtures() / "llama_gqa_q8_0.gguf");
  for (const char* name : {"token_embd.weight", "blk.1.attn_q.weight", "blk.1.attn_k.weight"}) {
    const auto expected = read_all(*exact, name), found = read_all(*quantised, name);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      // Half a step of a block's absolute maximum / 127; the weights are below 1.
      ASSERT_NEAR(found[i], expected[i], 0.5 / 127 * 1.01) << name << " element " << i;
    }
  }
}

class RotaryFrequencies : public FixtureTest, public testing::WithParamInterface<const char*> {};

TEST_P(RotaryFrequencies, EqualTransformers) {
  const auto folder = fixtures() / GetParam();
  const SafetensorsFile oracle(folder / "oracle.safetensors");
  const auto model = open_model(folder);
  for (const std::string prefix : {"", "short."})
    for (int layer = 0; layer < model->config().num_layers; ++layer) {
      const auto name = prefix + "layers." + std::to_string(layer) + ".inv_freq";
      const auto expected = oracle.f32(name);
      const auto found =
          rotary_frequencies(model->config(), layer, oracle.i64(prefix + "ids").shape[1]);
      ASSERT_EQ(found.size(), expected.data.size());
      for (std::size_t j = 0; j < found.size(); ++j)
        EXPECT_NEAR(found[j] / expected.data[j], 1, 2e-6) << name << " pair " << j;
    }
}

INSTANTIATE_TEST_SUITE_P(Models, RotaryFrequencies,
                         testing::Values("llama_gqa", "llama_head_dim", "llama_llama3",
                                         "llama_linear", "qwen2", "llama_bf16_sharded",
                                         "llama_dynamic", "llama_yarn", "llama_yarn_scales",
                                         "gemma3", "gemma3_d256", "phi2", "phi3_longrope"),
                         [](const auto& row) { return row.param; });

// ---- Hugging Face folders that are refused ----

json parse_json_file(const std::filesystem::path& file) { return json::parse(std::ifstream(file)); }

/// A copy of a fixture whose config.json can be changed.
class CopiedFolder : public FixtureTest {
 protected:
  void copy(const char* name) {
    std::filesystem::copy(fixtures() / name, folder_.path(),
                          std::filesystem::copy_options::recursive);
  }
  void write(const char* file, const std::string& text) const {
    std::ofstream(folder_.path() / file) << text;
  }
  auto opening() const {
    return [this] { open_model(folder_.path()); };
  }

  TemporaryFolder folder_;
};

struct Refusal {
  const char* name;
  const char* fixture;
  const char* patch;  // merged into config.json (RFC 7396: null removes a field)
  const char* field;
  const char* message;
};

void PrintTo(const Refusal& row, std::ostream* out) { *out << row.name; }

class RefusedConfig : public CopiedFolder, public testing::WithParamInterface<Refusal> {};

TEST_P(RefusedConfig, NamesFieldAndReason) {
  const auto& row = GetParam();
  copy(row.fixture);
  auto config = parse_json_file(folder_.path() / "config.json");
  config.merge_patch(json::parse(row.patch));
  write("config.json", config.dump());
  EXPECT_THAT(opening(),
              ThrowsMessage<InputError>(AllOf(HasSubstr(row.field), HasSubstr(row.message))));
}

constexpr Refusal kRefusals[] = {
    {"family", "llama_gqa", R"({"model_type": "mamba"})", "/model_type",
     "supported are llama, mistral, qwen2"},
    {"family_missing", "llama_gqa", R"({"model_type": null})", "/model_type",
     "the field is missing"},
    {"family_type", "llama_gqa", R"({"model_type": 3})", "/model_type",
     "expected a string, found number"},
    {"activation", "llama_gqa", R"({"hidden_act": "gelu"})", "/hidden_act",
     "only \"silu\" is supported"},
    {"mlp_bias", "llama_gqa", R"({"mlp_bias": true})", "/mlp_bias", "only false"},
    {"sliding_window", "llama_gqa", R"({"sliding_window": 128})", "/sliding_window",
     "kvplan does not know this setting"},
    {"unknown", "llama_gqa", R"({"residual_multiplier": 0.5})", "/residual_multiplier",
     "kvplan does not know this setting, which may change what the model computes; found 0.5"},
    {"window_flag", "qwen2_window", R"({"use_sliding_window": 1})", "/use_sliding_window",
     "expected true or false"},
    {"layer_types_count", "qwen2", R"({"layer_types": ["full_attention"]})", "/layer_types",
     "one name per layer, 3"},
    {"layer_types_kind", "qwen2",
     R"({"layer_types": ["full_attention", "chunked_attention", "full_attention"]})",
     "/layer_types", "found \"chunked_attention\""},
    {"layer_types_window", "qwen2",
     R"({"layer_types": ["full_attention", "sliding_attention", "full_attention"]})",
     "/layer_types", "in a model without a window"},
    {"layer_types_mistral", "mistral_window",
     R"({"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]})",
     "/layer_types", "a window in every layer"},
    {"cross_attention", "gpt2", R"({"add_cross_attention": true})", "/add_cross_attention",
     "only false"},
    {"layer_scale", "gpt2", R"({"scale_attn_by_inverse_layer_idx": true})",
     "/scale_attn_by_inverse_layer_idx", "only false"},
    {"qk_layernorm", "phi2", R"({"qk_layernorm": true})", "/qk_layernorm", "only false"},
    {"activations", "gemma", R"({"hidden_act": "relu"})", "/hidden_act",
     "only \"gelu_pytorch_tanh\", \"gelu\" is supported, found \"relu\""},
    {"bidirectional", "gemma3", R"({"use_bidirectional_attention": true})",
     "/use_bidirectional_attention", "only false"},
    {"query_scalar", "gemma2", R"({"query_pre_attn_scalar": 0})", "/query_pre_attn_scalar",
     "above 0"},
    {"soft_cap", "gemma2", R"({"attn_logit_softcapping": -1})", "", "a soft cap must be above 0"},
    {"alibi", "llama_gqa", R"({"alibi": true})", "/alibi", "only false"},
    {"encoder", "llama_gqa", R"({"is_encoder_decoder": true})", "/is_encoder_decoder",
     "only false"},
    {"longrope_factors", "phi3_longrope", R"({"rope_parameters": {"short_factor": [1, 2]}})", "",
     "longrope needs 6 positive factors"},
    {"longrope_text", "phi3_longrope", R"({"rope_parameters": {"long_factor": "x"}})",
     "/rope_parameters/long_factor", "expected a list of numbers, found string"},
    {"rope_local", "gemma3",
     R"({"rope_parameters": {"sliding_attention": {"rope_type": "proportional"}}})",
     "/rope_parameters/sliding_attention/rope_type", "\"proportional\" is not supported"},
    {"rope_setting", "qwen2", R"({"rope_parameters": {"mrope_section": [2, 3, 3]}})",
     "/rope_parameters/mrope_section", "kvplan does not know this setting"},
    {"yarn_bounds", "llama_yarn", R"({"rope_scaling": {"beta_fast": 0.5}})",
     "/rope_scaling/beta_fast", "at least beta_slow"},
    {"yarn_attention", "llama_yarn", R"({"rope_scaling": {"attention_factor": -1}})", "",
     "attention factor of the rotary scaling must be above 0"},
    {"quantised", "llama_gqa", R"({"quantization_config": {"quant_method": "gptq"}})",
     "/quantization_config", "gptq"},
    {"experts", "llama_gqa", R"({"num_local_experts": 8})", "/num_local_experts", "only 0"},
    {"partial_rotary", "llama_gqa", R"({"partial_rotary_factor": 0.5})", "/partial_rotary_factor",
     "only 1"},
    {"rope_type", "llama_gqa",
     R"({"rope_parameters": null, "rope_scaling": {"type": "axial", "factor": 4}})",
     "/rope_scaling/type", "\"axial\" is not supported"},
    {"rope_dynamic", "llama_gqa", R"({"rope_parameters": {"rope_type": "dynamic"}})",
     "/rope_parameters/factor", "missing"},
    {"rope_no_type", "llama_linear", R"({"rope_scaling": {"type": null}})", "/rope_scaling/type",
     "missing"},
    {"rope_list", "llama_gqa", R"({"rope_parameters": [1]})", "/rope_parameters",
     "expected an object, found array"},
    {"rope_partial", "llama_gqa", R"({"rope_parameters": {"partial_rotary_factor": 0.25}})",
     "/rope_parameters/partial_rotary_factor", "only 1"},
    {"rope_factor", "llama_linear", R"({"rope_scaling": {"factor": -2}})", "/rope_scaling/factor",
     "above 0"},
    {"rope_factor_missing", "llama_linear", R"({"rope_scaling": {"factor": null}})",
     "/rope_scaling/factor", "missing"},
    {"llama3_context", "llama_llama3",
     R"({"rope_parameters": {"original_max_position_embeddings": 0}})",
     "/rope_parameters/original_max_position_embeddings", "expected 1 to"},
    {"llama3_frequencies", "llama_llama3", R"({"rope_parameters": {"high_freq_factor": 1}})",
     "/rope_parameters/high_freq_factor", "above low_freq_factor"},
    {"rope_base", "llama_linear", R"({"rope_theta": 0})", "", "the rotary base must be above 1"},
    {"rope_twice", "llama_gqa", R"({"rope_scaling": {"type": "linear", "factor": 2}})",
     "/rope_scaling", "found both"},
    {"epsilon", "llama_gqa", R"({"rms_norm_eps": 0})", "",
     "the epsilon of the norms must be above 0"},
    {"epsilon_text", "llama_gqa", R"({"rms_norm_eps": "1e-5"})", "/rms_norm_eps",
     "expected a number, found string"},
    {"zero_heads", "llama_gqa", R"({"num_attention_heads": 0})", "/num_attention_heads", "found 0"},
    {"negative_heads", "llama_gqa", R"({"num_attention_heads": -4})", "/num_attention_heads",
     "found -4"},
    {"fractional_heads", "llama_gqa", R"({"num_attention_heads": 2.5})", "/num_attention_heads",
     "expected a whole number"},
    {"huge_heads", "llama_gqa", R"({"num_attention_heads": 18446744073709551615})",
     "/num_attention_heads", "expected 1 to"},
    {"text_heads", "llama_gqa", R"({"num_attention_heads": "4"})", "/num_attention_heads",
     "found string"},
    {"no_heads", "llama_gqa", R"({"num_attention_heads": null})", "/num_attention_heads",
     "missing"},
    {"indivisible", "llama_gqa", R"({"num_attention_heads": 3, "head_dim": null})",
     "/num_attention_heads", "64 is no multiple of the 3 heads"},
    {"kv_heads", "llama_gqa", R"({"num_key_value_heads": 3})", "", "must be a multiple of"},
    {"odd_head", "llama_gqa", R"({"head_dim": 15})", "",
     "an even number of channels, at most the 15 of a head, found 15"},
    {"many_layers", "llama_gqa", R"({"num_hidden_layers": 2000000000})", "/num_hidden_layers",
     "expected 1 to 4096"},
    {"head_dim", "llama_gqa", R"({"head_dim": 32})", "model.layers.0.self_attn.q_proj.weight",
     "expected the shape [128, 64], found [64, 64]"},
    {"vocabulary", "llama_gqa", R"({"vocab_size": 97})", "model.embed_tokens.weight",
     "expected the shape [97, 64], found [96, 64]"},
    {"missing_layer", "llama_gqa", R"({"num_hidden_layers": 4})",
     "model.layers.3.input_layernorm.weight", "expected a tensor of shape [64], found none"},
    {"extra_layer", "llama_gqa", R"({"num_hidden_layers": 2})", "model.layers.2.",
     "has no place for this tensor"},
    {"missing_bias", "llama_gqa", R"({"attention_bias": true})",
     "model.layers.0.self_attn.q_proj.bias", "found none"},
    {"extra_bias", "llama_bias", R"({"attention_bias": false})", "_proj.bias",
     "has no place for this tensor"},
    {"bias_type", "llama_gqa", R"({"attention_bias": 1})", "/attention_bias",
     "expected true or false"},
};

INSTANTIATE_TEST_SUITE_P(Configs, RefusedConfig, testing::ValuesIn(kRefusals),
                         [](const auto& row) { return row.param.name; });

TEST_F(CopiedFolder, DefaultsOfTransformersAreTaken) {
  copy("llama_gqa");
  auto config = parse_json_file(folder_.path() / "config.json");
  for (const char* field : {"head_dim", "hidden_act", "tie_word_embeddings", "attention_bias",
                            "mlp_bias", "rope_parameters"}) {
    config.erase(field);
  }
  config["rope_scaling"] = nullptr;
  write("config.json", config.dump());
  const auto model = open_model(folder_.path());
  EXPECT_EQ(model->config().head_dim, 16);
  EXPECT_EQ(model->config().rope, RopeSpec{});
  config.erase("num_key_value_heads");  // then as many as query heads, which the weights contradict
  write("config.json", config.dump());
  EXPECT_THAT(opening(),
              ThrowsMessage<InputError>(HasSubstr("expected the shape [64, 64], found [32, 64]")));
}

TEST_F(CopiedFolder, BrokenJsonIsRefused) {
  copy("llama_gqa");
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("null"),
        std::string("{\"a\": 1e999}"), std::string(100000, '['), std::string("\xff\xfe{}")}) {
    write("config.json", text);
    EXPECT_THROW(open_model(folder_.path()), InputError) << text.substr(0, 20);
  }
  std::filesystem::remove(folder_.path() / "config.json");
  EXPECT_THROW(open_model(folder_.path()), InputError);
}

TEST_F(CopiedFolder, MissingWeightsAreRefused) {
  copy("llama_gqa");
  std::filesystem::remove(folder_.path() / "model.safetensors");
  EXPECT_THAT(opening(),
              ThrowsMessage<InputError>(HasSubstr("expected weights in model.safetensors or")));
}

TEST_F(CopiedFolder, BrokenShardsAreRefused) {
  copy("llama_bf16_sharded");
  const auto index = parse_json_file(folder_.path() / "model.safetensors.index.json");
  const auto with = [&](const char* tensor, const json& shard) {
    auto changed = index;
    changed["weight_map"][tensor] = shard;
    write("model.safetensors.index.json", changed.dump());
  };
  with("model.norm.bias", "model-00001-of-00003.safetensors");
  EXPECT_THAT(opening(), ThrowsMessage<InputError>(AllOf(HasSubstr("/weight_map/model.norm.bias"),
                                                         HasSubstr("has no such tensor"))));
  for (const json& name : {json("../llama_gqa/model.safetensors"), json(".."), json(""), json(7)}) {
    with("model.norm.weight", name);
    EXPECT_THAT(opening(), ThrowsMessage<InputError>(
                               HasSubstr("expected the name of a file in the same folder")));
  }
  with("model.norm.weight", "absent.safetensors");
  EXPECT_THAT(opening(), ThrowsMessage<InputError>(HasSubstr("absent.safetensors")));
  write("model.safetensors.index.json", R"({"weight_map": []})");
  EXPECT_THAT(opening(), ThrowsMessage<InputError>(HasSubstr("/weight_map")));
}

// ---- The demo model ----

TEST_F(DemoModelTest, OpensAndReads) {
  const auto model = open_model(demo_model());
  const auto& c = model->config();
  EXPECT_EQ(c.num_layers, 30);
  EXPECT_EQ(c.query_heads, 9);
  EXPECT_EQ(c.kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.vocab_size, 49152);
  EXPECT_EQ(c.rope.base, 100000);
  EXPECT_FALSE(c.rope.scaling);
  EXPECT_TRUE(c.tied_embeddings);
  // SHA-256 of the bytes that gguf.GGUFReader gives for blk.{l}.attn_k.weight,
  // blk.{l}.attn_v.weight.
  EXPECT_EQ(model->spec().kv_weights_sha256,
            "a5c639b6f67798ca1be65fc740a20a20199796cf4cf4a4b4d67dd14e32e1033e");
  for (const auto& [name, shape] : expected_tensors(c)) {
    const auto values = read_all(*model, name);
    EXPECT_TRUE(std::ranges::any_of(values, [](float v) { return v != 0; })) << name;
  }
}

}  // namespace
}  // namespace kvplan::models
