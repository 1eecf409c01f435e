// Plans of other tools: what comes in, and that nothing broken gets further than an error.

#include "exporters/import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "quant/codec.h"
#include "schemas/error.h"
#include "tests/exporters/plans.h"
#include "tests/temporary_folder.h"

namespace kvplan::exporters {
namespace {

using test::file_of;
using testing::HasSubstr;

ImportOptions options_for(int layers, int kv_heads = 2, int head_dim = 64) {
  return {
      .model = test::uniform_plan(layers, 4, 4, "int", {.kv_heads = kv_heads, .head_dim = head_dim})
                   .plan.model,
      .context = 2048,
      .scheme = ""};
}

constexpr const char* kFlow =
    "0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n";
constexpr const char* kBlock =
    "# a comment\n1:\n  nbits_value: 2\n  nbits_key: 4\n0:\n  nbits_key: 8\n  nbits_value: 4\n";

TEST(KvTunerImport, ReadsFlowAndBlock) {
  for (const char* text : {kFlow, kBlock}) {
    const PlanBundle plan = import_kvtuner(text, "Model_kivi_KVTuner4_0.yaml", options_for(2));
    EXPECT_EQ(plan.plan.policy, "import:kvtuner");
    EXPECT_EQ(plan.plan.origin->tool, "KVTuner");
    EXPECT_EQ(plan.plan.window, 32);
    EXPECT_EQ(plan.plan.layers[0].k.bits, 8);
    EXPECT_EQ(plan.plan.layers[1].v.heads[1].widths, std::vector<int>{2});
    EXPECT_EQ(plan.plan.layers[1].v.codec, "kvtuner:2");
    // (8 + 4 + 4 + 2) / 4 bits and a bit for scale and minimum of 32
    EXPECT_DOUBLE_EQ(plan.plan.effective_bits, 5.5);
    EXPECT_NEAR(quant::measured_effective_bits(plan), 5.5, 1e-9);
  }
}

TEST(KvTunerImport, SchemeComesFromTheNameOrTheFlag) {
  ImportOptions options = options_for(2);
  EXPECT_THROW(import_kvtuner(kFlow, "preset.yaml", options), InputError);
  EXPECT_THROW(import_kvtuner(kFlow, "a_kivi_b_pertoken_c.yaml", options), InputError);
  const PlanBundle named = import_kvtuner(kFlow, "/kivi_x/M_pertoken_KVTuner6_1.yaml", options);
  EXPECT_EQ(named.plan.layers[0].k.codec, "kvtuner:8+pertoken");
  EXPECT_EQ(named.plan.window, 0);
  options.scheme = "kivi";
  EXPECT_EQ(import_kvtuner(kFlow, "M_pertoken_KVTuner6_1.yaml", options).plan.layers[0].k.codec,
            "kvtuner:8");
}

TEST(KvTunerImport, ReadsHeads) {
  const PlanBundle plan =
      import_kvtuner("0: {0: {nbits_key: 8, nbits_value: 4}, 1: {nbits_key: 2, nbits_value: 4}}",
                     "M_kivi_x.yaml", options_for(1));
  EXPECT_EQ(plan.plan.layers[0].k.bits, 5);
  EXPECT_EQ(plan.plan.layers[0].k.heads[1].widths, std::vector<int>{2});
}

struct Broken {
  const char *name, *text, *says;
};

class BrokenPreset : public testing::TestWithParam<Broken> {};

TEST_P(BrokenPreset, IsRefusedWithAPlace) {
  try {
    import_kvtuner(GetParam().text, "M_kivi_x.yaml", options_for(2));
    FAIL() << "accepted";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr(GetParam().says));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Presets, BrokenPreset,
    testing::Values(
        Broken{"empty", "", "found nothing"}, Broken{"null", "~", "found nothing"},
        Broken{"scalar", "4", "found a scalar"}, Broken{"list", "- 1", "found a list"},
        Broken{"syntax", "0: {nbits_key: 8", "expected YAML"},
        Broken{"tab", "0:\n\tnbits_key: 8", "found a scalar"},
        Broken{"gap", "0: {nbits_key: 8, nbits_value: 4}\n2: {nbits_key: 8, nbits_value: 4}",
               "layers 0..1"},
        Broken{"too_few", "0: {nbits_key: 8, nbits_value: 4}", "layers 0..1"},
        Broken{"twice", "0: {nbits_key: 8, nbits_value: 4}\n0: {nbits_key: 8, nbits_value: 4}",
               "twice"},
        Broken{"field_twice", "0: {nbits_key: 8, nbits_key: 4}", "twice"},
        Broken{"same_number",
               "0: {nbits_key: 8, nbits_value: 4}\n00: {nbits_key: 2, nbits_value: 4}",
               "layers 0..1"},
        Broken{"wide", "0: {nbits_key: 9, nbits_value: 4}", "1..8"},
        Broken{"zero", "0: {nbits_key: 0, nbits_value: 4}", "1..8"},
        Broken{"text_width", "0: {nbits_key: four, nbits_value: 4}", "1..8"},
        Broken{"missing", "0: {nbits_key: 8}\n1: {nbits_key: 8, nbits_value: 4}",
               "nbits_value is missing"},
        Broken{"field", "0: {bits: 8}", "nbits_key and nbits_value"},
        Broken{"layer_name", "a: {nbits_key: 8, nbits_value: 4}", "a layer of"},
        Broken{"negative", "-1: {nbits_key: 8, nbits_value: 4}", "a layer of"},
        Broken{"deep", "0: {0: {0: {nbits_key: 8}}}", "found a map"},
        Broken{"alias", "0: &a {nbits_key: 8, nbits_value: 4}\n1: *a", "anchors"},
        Broken{"documents", "0: {nbits_key: 8, nbits_value: 4}\n---\n1: 2", "one document"},
        Broken{"mixed_levels",
               "0: {nbits_key: 8, nbits_value: 4, 0: {nbits_key: 2}}\n1: {nbits_key: 8, "
               "nbits_value: 4}",
               "pair of widths"},
        Broken{"map_as_key", "{a: b}: 1", "as key"},
        Broken{"heads", "0: {0: {nbits_key: 8, nbits_value: 4}}\n1: {nbits_key: 8, nbits_value: 4}",
               "2 KV heads"}),
    [](const auto& info) { return std::string(info.param.name); });

constexpr const char* kMap = R"({"producer":{"name":"modelopt","version":"0.99"},
 "quantization":{"quant_algo":null,"kv_cache_quant_algo":"MIXED_PRECISION",
  "kv_cache_quantized_layers":{"model.layers.0.self_attn":{"quant_algo":"FP8"},
                               "model.layers.1.self_attn":{"quant_algo":"NVFP4"},
                               "model.layers.3.self_attn":{"quant_algo":"FP8_K_NVFP4_V"}},
  "kv_cache_schema_version":1}})";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(ModelOptImport, ReadsMaps) {
  const PlanBundle plan = import_modelopt(kMap, "hf_quant_config.json", options_for(4));
  const auto bits = [&](int l, Side side) {
    return plan.plan.layers[static_cast<std::size_t>(l)].side(side).bits;
  };
  EXPECT_EQ(bits(0, Side::kKey), 8);
  EXPECT_EQ(bits(1, Side::kValue), 4);
  EXPECT_EQ(bits(2, Side::kKey), 16);  // absent
  EXPECT_EQ(bits(3, Side::kKey), 8);
  EXPECT_EQ(bits(3, Side::kValue), 4);
  EXPECT_DOUBLE_EQ(plan.plan.effective_bits, (8 + 8 + 4.5 + 4.5 + 16 + 16 + 8 + 4.5) / 8);
  EXPECT_NEAR(quant::measured_effective_bits(plan), plan.plan.effective_bits, 1e-9);
}

TEST(ModelOptImport, ReadsGlobalNames) {
  struct Global {
    const char* section;
    double bits;
  };
  for (const auto& [section, bits] :
       {Global{R"({"quantization":{"kv_cache_quant_algo":"FP8"}})", 8},
        Global{R"({"quantization":{"kv_cache_quant_algo":"INT8"}})", 8},
        Global{R"({"quantization":{"kv_cache_quant_algo":"NVFP4"}})", 4},
        Global{R"({"quantization":{"kv_cache_quant_algo":"NVFP4_AFFINE"}})", 4},
        Global{R"({"model_type":"llama","quantization_config":{"quant_method":"modelopt",
                   "kv_cache_scheme":{"dynamic":false,"num_bits":8,"type":"float"}}})",
               8}}) {
    const PlanBundle plan = import_modelopt(section, "config.json", options_for(3));
    EXPECT_EQ(plan.plan.layers[2].k.bits, bits) << section;
    EXPECT_EQ(plan.plan.layers[2].v.bits, bits) << section;
  }
}

TEST(ModelOptImport, RefusesWithAPointer) {
  struct Case {
    std::string text, pointer;
  };
  const std::string base = "/quantization/kv_cache_quantized_layers/";
  for (const auto& [text, pointer] :
       {Case{replaced(kMap, "NVFP4\"}", "INT4\"}"), base + "model.layers.1.self_attn/quant_algo"},
        Case{replaced(kMap, "\"kv_cache_schema_version\":1", "\"kv_cache_schema_version\":2"),
             "/quantization/kv_cache_schema_version"},
        Case{replaced(kMap, "layers.1.self", "layers.9.self"), base + "model.layers.9.self_attn"},
        Case{replaced(kMap, "model.layers.1.self", "vision.layers.0.self"),
             base + "vision.layers.0.self_attn"},
        Case{replaced(kMap, "\"FP8\"", "8"), base + "model.layers.0.self_attn"},
        Case{replaced(kMap, "MIXED_PRECISION", "FP8"), "/quantization/kv_cache_quant_algo"},
        Case{R"({"quantization":{}})", "/quantization"},
        Case{R"({"quantization":{"kv_cache_quant_algo":"FP4"}})",
             "/quantization/kv_cache_quant_algo"},
        Case{R"({"quantization":3})", "/quantization"}}) {
    try {
      import_modelopt(text, "f.json", options_for(4));
      ADD_FAILURE() << "accepted " << text;
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), pointer) << error.what();
    }
  }
  // The same path twice is broken JSON.
  EXPECT_THROW(
      import_modelopt(replaced(kMap, "layers.1.self", "layers.0.self"), "f.json", options_for(4)),
      InputError);
  EXPECT_THROW(import_modelopt("[]", "f.json", options_for(4)), InputError);
}

TEST(ModelOptImport, BringsBackWhatWasExported) {
  for (const test::Bits& bits :
       {test::Bits{{8, 8}, {8, 8}}, test::Bits{{4, 4}, {4, 4}}, test::Bits{{8, 4}, {8, 4}},
        test::Bits{{8, 8}, {4, 4}, {16, 16}}, test::Bits{{16, 16}, {16, 16}}}) {
    const PlanBundle plan = test::make_plan(bits);
    const Export result = export_plan("modelopt", plan);
    const PlanBundle back = import_modelopt(file_of(result, "hf_quant_config.json"), "f.json",
                                            {.model = plan.plan.model, .context = 0, .scheme = ""});
    for (std::size_t l = 0; l < bits.size(); ++l)
      for (const Side side : kSides)
        EXPECT_EQ(back.plan.layers[l].side(side).bits, plan.plan.layers[l].side(side).bits) << l;
    EXPECT_EQ(back.plan.bytes_per_token, result.projection.report.bytes_per_token);
    // And an imported plan loses nothing where it came from.
    EXPECT_TRUE(export_plan("modelopt", back).projection.report.lossless());
  }
}

TEST(Import, PlansAreWrittenAndReadWithUnknownsAsNull) {
  TemporaryFolder folder;
  const PlanBundle plan = import_modelopt(kMap, "f.json", options_for(4));
  write_plan(plan, folder.path() / "plan");
  const PlanBundle back = read_plan(folder.path() / "plan");
  EXPECT_EQ(back.plan.origin, plan.plan.origin);
  EXPECT_EQ(back.plan.layers, plan.plan.layers);
  EXPECT_THAT(plan_json(back), HasSubstr("\"predicted_kl\": null"));
}

TEST(ModelOfConfig, ReadsGeometryAndRotary) {
  std::int64_t context = 0;
  const ModelSpec model = model_of_config(
      R"({"model_type":"llama","num_hidden_layers":4,"num_attention_heads":8,"hidden_size":512,
          "num_key_value_heads":2,"max_position_embeddings":2048,"head_dim":null,
          "rope_parameters":{"rope_type":"linear","factor":2.0,"rope_theta":5000.0}})",
      "config.json", context);
  EXPECT_EQ(model.head_dim, 64);
  EXPECT_EQ(model.kv_heads, 2);
  EXPECT_EQ(model.rope.base, 5000);
  EXPECT_EQ(model.rope.scaling->factor, 2);
  EXPECT_EQ(context, 2048);
  for (const char* text :
       {"{}", R"({"model_type":"llama","num_hidden_layers":-1})",
        R"({"model_type":"llama","num_hidden_layers":1,"num_attention_heads":9,"hidden_size":4})",
        R"({"model_type":"llama","num_hidden_layers":1,"num_attention_heads":9,"head_dim":4,
            "num_key_value_heads":2})"})
    EXPECT_THROW(model_of_config(text, "config.json", context), InputError) << text;
}

/// Cuts, copies, deletions and replacements of bytes: an error or a plan, never anything else.
TEST(Import, BrokenInputNeverCrashes) {
  const auto try_import = [](bool yaml, const std::string& text) {
    try {
      yaml ? import_kvtuner(text, "M_kivi_x.yaml", options_for(2))
           : import_modelopt(text, "f.json", options_for(4));
    } catch (const InputError&) {
    }
  };
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const bool yaml = seed % 2 == 0;
    std::string text = yaml ? (seed % 4 == 0 ? kFlow : kBlock) : kMap;
    for (std::uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = random() % (text.size() + 1), count = random() % 9;
      constexpr std::string_view kBytes = "{}[]:,&*!|>-?#%@`\"'\\ \n\t~0123456789\0\xff\xc3";
      switch (random() % 4) {
        case 0:
          text.erase(at, count);
          break;
        case 1:
          text.insert(at, 1, kBytes[random() % kBytes.size()]);
          break;
        case 2:
          text.insert(at, text.substr(text.size() / 2, count));
          break;
        default:
          if (at < text.size()) text[at] = kBytes[random() % kBytes.size()];
      }
    }
    try_import(yaml, text);
  }
  for (const char* bracket : {"[", "{", "{0: ", "- ", "? ", "!", "&a ", "0: ", "\"", "|"}) {
    std::string deep;
    for (int i = 0; i < 100000; ++i) deep += bracket;
    try_import(true, deep);
    try_import(false, deep);
  }
}

TEST(Import, RefusesUnknownFormats) {
  EXPECT_THROW(import_plan("gguf", "x", options_for(2)), ArgumentError);
  EXPECT_THROW(import_plan("kvtuner", "/nonexistent/M_kivi_x.yaml", options_for(2)), InputError);
}

}  // namespace
}  // namespace kvplan::exporters
