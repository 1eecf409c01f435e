// JSON that stacks read, against schemas of what their readers take.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <valijson/adapters/nlohmann_json_adapter.hpp>
#include <valijson/schema.hpp>
#include <valijson/schema_parser.hpp>
#include <valijson/validator.hpp>

#include "exporters/import.h"
#include "tests/exporters/plans.h"

namespace kvplan::exporters {
namespace {

using nlohmann::json;
using test::file_of;
using test::make_plan;
using test::uniform_plan;
using valijson::adapters::NlohmannJsonAdapter;

bool valid(const std::string& format, const json& document,
           const std::string& folder = KVPLAN_STACK_SCHEMAS) {
  std::ifstream file(folder + "/" + format + ".schema.json");
  const json text = json::parse(file);
  valijson::Schema schema;
  valijson::SchemaParser().populateSchema(NlohmannJsonAdapter(text), schema);
  return valijson::Validator(valijson::Validator::kStrongTypes)
      .validate(schema, NlohmannJsonAdapter(document), nullptr);
}

TEST(StackSchema, SglangScales) {
  json scales =
      json::parse(file_of(export_plan("sglang", uniform_plan(3, 8, 8)), "sglang_kv_scales.json"));
  EXPECT_TRUE(valid("sglang_kv_scales", scales));
  scales["kv_cache"]["scaling_factor"]["0"]["1"] = 0;
  EXPECT_FALSE(valid("sglang_kv_scales", scales));
  scales["kv_cache"]["scaling_factor"]["0"]["1"] = 1;
  scales["kv_cache"]["dtype"] = "float8_e5m2";
  EXPECT_FALSE(valid("sglang_kv_scales", scales));
}

TEST(PlanSchema, TakesImportsAndCodecsOfSides) {
  const PlanBundle plan = import_kvtuner("0: {nbits_key: 8, nbits_value: 4}", "M_kivi_x.yaml",
                                         {.model = uniform_plan(1, 4, 4).plan.model});
  json document = json::parse(plan_json(plan));
  EXPECT_TRUE(valid("plan", document, KVPLAN_SCHEMA_FOLDER));
  EXPECT_EQ(document["layers"][0]["k"]["codec"], "kvtuner:8");
  document["origin"].erase("tool");
  EXPECT_FALSE(valid("plan", document, KVPLAN_SCHEMA_FOLDER));
}

TEST(StackSchema, ModelOptMaps) {
  for (const test::Bits& bits : {test::Bits{{8, 8}, {8, 8}}, test::Bits{{8, 8}, {4, 4}, {8, 4}},
                                 test::Bits{{8, 4}, {16, 16}}, test::Bits{{16, 16}}}) {
    json map =
        json::parse(file_of(export_plan("modelopt", make_plan(bits)), "hf_quant_config.json"));
    EXPECT_TRUE(valid("modelopt_kv_cache", map)) << map;
    map["quantization"]["kv_cache_schema_version"] = 2;
    EXPECT_FALSE(valid("modelopt_kv_cache", map));
    map["quantization"]["kv_cache_schema_version"] = 1;
    map["quantization"]["kv_cache_quantized_layers"]["model.layers.0.self_attn"] = {
        {"quant_algo", "INT4"}};
    EXPECT_FALSE(valid("modelopt_kv_cache", map));
  }
}

}  // namespace
}  // namespace kvplan::exporters
