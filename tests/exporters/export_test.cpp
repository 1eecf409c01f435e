// Files of the targets beside llama.cpp, exactly; and what holds for every target.

#include "exporters/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "exporters/import.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "tests/exporters/plans.h"
#include "tests/temporary_folder.h"

namespace kvplan::exporters {
namespace {

using nlohmann::json;
using test::file_of;
using test::items;
using test::make_plan;
using test::uniform_plan;
using testing::ElementsAre;
using testing::HasSubstr;

/// A Hugging Face folder with a single weights file.
class Original {
 public:
  explicit Original(int layers, json config = json::object()) {
    config["model_type"] = "llama";
    std::ofstream(path() / "config.json") << config;
    SafetensorsWriter writer;
    for (int l = 0; l < layers; ++l)
      writer.add("model.layers." + std::to_string(l) + ".self_attn.k_proj.weight",
                 Array<float>({2, 3}));
    writer.add("model.norm.weight", Array<float>({5}));
    writer.write(path() / "model.safetensors");
  }
  const std::filesystem::path& path() const { return folder_.path(); }

 private:
  TemporaryFolder folder_;
};

TEST(Vllm, GoldenFiles) {
  test::Bits bits(28, {4, 4});
  bits[13] = {16, 4};
  const Export result = export_plan("vllm", make_plan(bits, "int", {.head_dim = 128}),
                                    {.stack = {.dtypes = {"turboquant_4bit_nc"}}});
  EXPECT_EQ(file_of(result, "vllm.args"),
            "--kv-cache-dtype turboquant_4bit_nc --kv-cache-dtype-skip-layers 0 1 13 26 27\n");
  EXPECT_EQ(file_of(result, "vllm.yaml"),
            "kv-cache-dtype: turboquant_4bit_nc\n"
            "kv-cache-dtype-skip-layers: [\"0\", \"1\", \"13\", \"26\", \"27\"]\n");
}

TEST(Vllm, NamesSlidingLayersByKind) {
  PlanBundle plan = uniform_plan(6, 4, 4);
  plan.plan.layers[1].kind = plan.plan.layers[4].kind = "sliding";
  const Export result = export_plan("vllm", plan, {.stack = {.dtypes = {"turboquant_4bit_nc"}}});
  EXPECT_THAT(file_of(result, "vllm.args"),
              HasSubstr("--kv-cache-dtype-skip-layers sliding_window"));
  EXPECT_THAT(items(result.projection.report, false), testing::Contains("UNVERIFIED/note/1,4"));
}

TEST(Vllm, AllLayersAt16BitsNeedNoDtype) {
  const Export result = export_plan("vllm", uniform_plan(4, 16, 16));
  EXPECT_EQ(file_of(result, "vllm.args"), "--kv-cache-dtype auto\n");
}

TEST(KvScales, OverlaysTheCheckpoint) {
  const Original original(3);
  test::Bits bits = {{8, 8}, {16, 8}, {8, 8}};
  const Export result = export_plan("kv-scales", make_plan(bits), {.model = original.path()});
  EXPECT_EQ(file_of(result, "vllm.args"), "--kv-cache-dtype auto --kv-cache-dtype-skip-layers 1\n");
  const json config = json::parse(file_of(result, "config.json"));
  EXPECT_EQ(config["model_type"], "llama");
  EXPECT_EQ(config["quantization_config"],
            json::parse(R"({"quant_method":"compressed-tensors","format":"dense",
                "quantization_status":"compressed","config_groups":{},"ignore":[],
                "kv_cache_scheme":{"num_bits":8,"type":"float","symmetric":true,"dynamic":false,
                                   "strategy":"tensor"}})"));
  // The index holds exactly the tensors of both files.
  const json index = json::parse(file_of(result, "model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], 3 * 24 + 20 + 6 * 4);
  EXPECT_EQ(index["weight_map"].size(), 4 + 6);
  TemporaryFolder folder;
  const auto file = folder.path() / "scales.safetensors";
  std::ofstream(file, std::ios::binary) << file_of(result, "model-kv-scales.safetensors");
  const SafetensorsFile scales(file);
  EXPECT_EQ(scales.entries().size(), 6u);
  for (const auto& [name, entry] : scales.entries()) {
    EXPECT_EQ(index["weight_map"][name], "model-kv-scales.safetensors");
    EXPECT_THAT(entry.shape, ElementsAre(1));
  }
  // Layer 1: K has amax 4.0 and 4.5, V 2.0 and 2.5.
  EXPECT_EQ(scales.f32("model.layers.1.self_attn.k_scale").data[0], 4.5f / 448);
  EXPECT_EQ(scales.f32("model.layers.1.self_attn.v_scale").data[0], 2.5f / 448);
}

TEST(KvScales, PerHead) {
  const Original original(2);
  const Export result =
      export_plan("kv-scales", uniform_plan(2, 8, 8), {.per_head = true, .model = original.path()});
  TemporaryFolder folder;
  const auto file = folder.path() / "scales.safetensors";
  std::ofstream(file, std::ios::binary) << file_of(result, "model-kv-scales.safetensors");
  const auto scale = SafetensorsFile(file).f32("model.layers.0.self_attn.k_scale");
  EXPECT_THAT(scale.shape, ElementsAre(2, 1, 1));
  EXPECT_THAT(scale.data, ElementsAre(2.0f / 448, 2.5f / 448));
  const json config = json::parse(file_of(result, "config.json"));
  EXPECT_EQ(config["quantization_config"]["kv_cache_scheme"]["strategy"], "attn_head");
}

TEST(KvScales, KeepsOrRefusesAnExistingQuantisation) {
  const PlanBundle plan = uniform_plan(2, 8, 8);
  const Original packed(2,
                        {{"quantization_config",
                          {{"quant_method", "compressed-tensors"}, {"format", "pack-quantized"}}}});
  const json kept =
      json::parse(file_of(export_plan("kv-scales", plan, {.model = packed.path()}), "config.json"));
  EXPECT_EQ(kept["quantization_config"]["format"], "pack-quantized");
  EXPECT_EQ(kept["quantization_config"]["kv_cache_scheme"]["num_bits"], 8);

  const Original modelopt(
      2, {{"quantization_config", {{"quant_method", "modelopt"}, {"kv_cache_quant_algo", "FP8"}}}});
  const Export named = export_plan("kv-scales", plan, {.model = modelopt.path()});
  EXPECT_THAT(file_of(named, "model.safetensors.index.json"),
              HasSubstr("model.layers.1.self_attn.k_proj.k_scale"));

  const Original gptq(2, {{"quantization_config", {{"quant_method", "gptq"}}}});
  EXPECT_THROW(export_plan("kv-scales", plan, {.model = gptq.path()}), InputError);
}

TEST(KvScales, RefusesMissingAndImpossibleMagnitudes) {
  const Original original(2);
  const ExportOptions options{.model = original.path()};
  for (const float bad : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()}) {
    PlanBundle plan = uniform_plan(2, 8, 8);
    plan.tensors.layers[1].v.absmax.data[0] = bad;
    EXPECT_THROW(export_plan("kv-scales", plan, options), InputError) << bad;
  }
  PlanBundle plan = uniform_plan(2, 8, 8);
  plan.tensors.layers.clear();
  EXPECT_THROW(export_plan("kv-scales", plan, options), InputError);
  EXPECT_THROW(export_plan("kv-scales", uniform_plan(2, 8, 8)), ArgumentError);  // no --model
  EXPECT_THROW(export_plan("kv-scales", uniform_plan(3, 8, 8), options), InputError);
  EXPECT_THROW(export_plan("kv-scales", uniform_plan(1, 8, 8), options), InputError);
}

TEST(Sglang, GoldenFiles) {
  const Export result = export_plan("sglang", uniform_plan(2, 8, 8), {.tensor_parallel = 2});
  EXPECT_EQ(file_of(result, "sglang.args"),
            "--kv-cache-dtype fp8_e4m3 --quantization-param-path sglang_kv_scales.json\n");
  const json scales = json::parse(file_of(result, "sglang_kv_scales.json"));
  EXPECT_EQ(scales["model_type"], "llama");
  EXPECT_EQ(scales["kv_cache"]["dtype"], "float8_e4m3fn");
  EXPECT_EQ(scales["kv_cache"]["scaling_factor"]["1"]["1"], 4.5f / 448);
  EXPECT_EQ(scales["kv_cache"]["scaling_factor"].size(), 2u);
}

TEST(ModelOpt, GoldenMap) {
  const Export result = export_plan("modelopt", make_plan({{8, 8}, {4, 4}, {8, 4}, {16, 16}}));
  EXPECT_EQ(json::parse(file_of(result, "hf_quant_config.json")), json::parse(R"({
    "producer":{"name":"modelopt","version":"0.0.0+export"},
    "quantization":{"quant_algo":null,"kv_cache_quant_algo":"MIXED_PRECISION",
      "kv_cache_quantized_layers":{"model.layers.0.self_attn":{"quant_algo":"FP8"},
        "model.layers.1.self_attn":{"quant_algo":"NVFP4"},
        "model.layers.2.self_attn":{"quant_algo":"FP8_K_NVFP4_V"}},
      "kv_cache_schema_version":1}})"));
}

TEST(ModelOpt, UniformMapsAndOriginals) {
  const Original original(2);
  const json all_fp8 = json::parse(file_of(
      export_plan("modelopt", uniform_plan(2, 8, 8), {.model = original.path()}), "config.json"));
  EXPECT_EQ(all_fp8["quantization_config"], json::parse(R"({"quant_method":"modelopt",
                "producer":{"name":"modelopt","version":"0.0.0+export"},
                "kv_cache_scheme":{"dynamic":false,"num_bits":8,"type":"float"}})"));
  const Export nvfp4 = export_plan("modelopt", uniform_plan(2, 4, 4), {.model = original.path()});
  EXPECT_EQ(
      json::parse(file_of(nvfp4, "config.json"))["quantization_config"]["kv_cache_quant_algo"],
      "NVFP4");
  EXPECT_THAT(file_of(nvfp4, "model.safetensors.index.json"), HasSubstr("k_proj.k_scale"));

  const Original own(
      2, {{"quantization_config", {{"quant_method", "modelopt"}, {"quant_algo", "NVFP4"}}}});
  const Export merged = export_plan("modelopt", uniform_plan(2, 8, 4), {.model = own.path()});
  EXPECT_EQ(json::parse(file_of(merged, "config.json"))["quantization_config"]["quant_algo"],
            "NVFP4");
  const Original other(2, {{"quantization_config", {{"quant_method", "awq"}}}});
  EXPECT_THROW(export_plan("modelopt", uniform_plan(2, 8, 8), {.model = other.path()}), InputError);
}

TEST(ModelOpt, RefusesReleasesThatCannotReadIt) {
  const PlanBundle plan = uniform_plan(2, 8, 8);
  for (const char* version : {"vllm-0.33.0", "vllm-0.9.1", "vllm-0.32.9"})
    EXPECT_THROW(export_plan("modelopt", plan, {.target_version = version}), InputError) << version;
  for (const char* version : {"vllm-0.33.1", "vllm-0.34.0", "vllm-1.0.0"})
    EXPECT_NO_THROW(export_plan("modelopt", plan, {.target_version = version})) << version;
  EXPECT_THROW(export_plan("modelopt", plan, {.target_version = "vllm-new"}), ArgumentError);
}

TEST(KvTuner, GoldenPresets) {
  const PlanBundle plan = make_plan({{8, 4}, {4, 2}});
  EXPECT_EQ(file_of(export_plan("kvtuner", plan), "kvplan_kivi.yaml"),
            "0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n");
  PlanBundle heads = plan;
  heads.plan.layers[1].k.heads[1].widths = {3};
  heads.plan.layers[1].k.bits = 3.5;
  EXPECT_EQ(file_of(export_plan("kvtuner", heads, {.per_head = true}), "kvplan_kivi.yaml"),
            "0:\n  0: {nbits_key: 8, nbits_value: 4}\n  1: {nbits_key: 8, nbits_value: 4}\n"
            "1:\n  0: {nbits_key: 4, nbits_value: 2}\n  1: {nbits_key: 3, nbits_value: 2}\n");
}

TEST(LmDeploy, GoldenPolicies) {
  const auto args = [](double k, double v, bool fp8 = false) {
    return file_of(export_plan("lmdeploy", uniform_plan(4, k, v), {.stack = {.fp8 = fp8}}),
                   "lmdeploy.args");
  };
  EXPECT_EQ(args(3, 2), "--backend pytorch --quant-policy 42\n");
  EXPECT_EQ(args(4, 2), "--quant-policy 4\n");
  EXPECT_EQ(args(5, 2), "--quant-policy 8\n");
  EXPECT_EQ(args(5, 2, true), "--backend pytorch --quant-policy 16\n");
}

TEST(HuggingFace, BuilderHoldsThePlan) {
  PlanBundle plan = make_plan({{16, 16}, {4, 2}, {5, 3}}, "int", {.head_dim = 96});
  plan.plan.layers[2].kind = "sliding";
  const std::string text = file_of(export_plan("hf", plan), "kv_plan_cache.py");
  EXPECT_THAT(text, HasSubstr("PLAN = [(16, 16), (4, 2), (16, 16)]"));
  EXPECT_THAT(text, HasSubstr("GROUP, WINDOW = 48, 64"));
  EXPECT_THAT(text, HasSubstr("DynamicSlidingWindowLayer(sliding_window=SLIDING[i])"));
}

TEST(Export, RefusesOptionsOfOtherTargets) {
  const PlanBundle plan = uniform_plan(4, 4, 4);
  EXPECT_THROW(export_plan("vllm", plan, {.per_head = true}), ArgumentError);
  EXPECT_THROW(export_plan("vllm", plan, {.tensor_parallel = 2}), ArgumentError);
  EXPECT_THROW(export_plan("hf", plan, {.mean_centre = "a.gguf"}), ArgumentError);
  EXPECT_THROW(export_plan("ollama", plan), ArgumentError);
}

TEST(Export, ManifestNamesPlanAndFiles) {
  PlanBundle plan = uniform_plan(4, 4, 4);
  plan.sha256 = std::string(64, 'a');
  const Export result = export_plan("llamacpp", plan);
  const json manifest = json::parse(manifest_json(result, plan, "kvplan 1", "kvplan export"));
  EXPECT_EQ(manifest["plan_sha256"], plan.sha256);
  EXPECT_EQ(manifest["dialect"], "mainline");
  EXPECT_EQ(manifest["files"].size(), result.files.size());
}

// For every target: no width below what is wanted, and a plan of which nothing is lost comes back.
TEST(Export, NeverLowersAndRoundTripsWhatIsLossless) {
  int lossless = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const bool kivi = seed % 3 == 0;
    test::Bits bits(2 + random() % 7);
    for (auto& layer : bits)
      for (double& width : layer)
        width = kivi ? 2 + static_cast<double>(random() % 7)
                     : (random() % 4 == 0 ? 16 : static_cast<double>(random() % 35) / 4);
    const PlanBundle plan = make_plan(bits, kivi ? "kivi" : "int", {.head_dim = 128});
    for (const std::string_view target : kTargets) {
      if (target == "kv-scales") continue;
      for (const char* dialect : {"mainline", "ik", "thetom", "buun"}) {
        if (target != "llamacpp" && dialect != std::string("mainline")) continue;
        SCOPED_TRACE(std::string(target) + dialect);
        Export result;
        try {
          result = export_plan(target, plan, {.stack = {.dialect = dialect}});
        } catch (const InputError&) {
          continue;
        }
        const Projection& p = result.projection;
        for (int l = 0; l < p.shape.num_layers(); ++l)
          for (const Side side : kSides) {
            const double planned = plan.plan.layers[static_cast<std::size_t>(l)].side(side).bits;
            ASSERT_GE(p.format(l, side).width, planned);
            if (p.report.lossless()) {
              EXPECT_EQ(p.format(l, side).width, planned);
            }
          }
        if (target != "kvtuner" || !p.report.lossless()) continue;
        ++lossless;
        const PlanBundle back =
            import_kvtuner(file_of(result, "kvplan_kivi.yaml"), "kvplan_kivi.yaml",
                           {.model = plan.plan.model, .context = 4096, .scheme = ""});
        for (std::size_t l = 0; l < bits.size(); ++l)
          for (const Side side : kSides)
            EXPECT_EQ(back.plan.layers[l].side(side).heads, plan.plan.layers[l].side(side).heads);
        EXPECT_EQ(back.plan.bytes_per_token, p.report.bytes_per_token);
      }
    }
  }
  EXPECT_EQ(lossless, 20);
}

}  // namespace
}  // namespace kvplan::exporters
