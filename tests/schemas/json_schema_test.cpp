// The JSON Schemas agree with what is written and refuse what the readers refuse.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <valijson/adapters/nlohmann_json_adapter.hpp>
#include <valijson/schema.hpp>
#include <valijson/schema_parser.hpp>
#include <valijson/validator.hpp>

#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

using nlohmann::json;
using valijson::adapters::NlohmannJsonAdapter;

bool valid(const std::string& format, const json& document) {
  const json text = json::parse(
      test::read_bytes(std::filesystem::path(KVPLAN_SCHEMA_FOLDER) / (format + ".schema.json")));
  valijson::Schema schema;
  valijson::SchemaParser().populateSchema(NlohmannJsonAdapter(text), schema);
  return valijson::Validator(valijson::Validator::kStrongTypes)
      .validate(schema, NlohmannJsonAdapter(document), nullptr);
}

json example(const std::string& format) {
  if (format == "plan") return json::parse(plan_json(test::example_plan()));
  if (format == "validation") return json::parse(validation_json(test::example_validation()));
  test::TemporaryFolder folder;
  write_profile(test::example_profile(), folder.path());
  return json::parse(test::read_bytes(folder / "profile.json"));
}

class JsonSchema : public testing::TestWithParam<std::string> {};

TEST_P(JsonSchema, AcceptsWhatIsWritten) { EXPECT_TRUE(valid(GetParam(), example(GetParam()))); }

/// Every object is closed: each field is required and no other is allowed.
void break_each_field(const std::string& format, const json& whole, const json::json_pointer& at) {
  const json& value = whole.at(at);
  if (value.is_array()) {
    if (!value.empty()) break_each_field(format, whole, at / 0);
    return;
  }
  if (!value.is_object()) return;
  json extended = whole;
  extended[at]["unknown_field"] = 1;
  EXPECT_FALSE(valid(format, extended)) << "extra field in " << at;
  for (const auto& [name, field] : value.items()) {
    if (at != json::json_pointer("/codebooks")) {
      json shortened = whole;
      shortened[at].erase(name);
      EXPECT_FALSE(valid(format, shortened)) << "without " << at / name;
    }
    json retyped = whole;
    retyped[at][name] = json::array({json::object()});
    EXPECT_FALSE(valid(format, retyped)) << "wrong type of " << at / name;
    break_each_field(format, whole, at / name);
  }
}

TEST_P(JsonSchema, RefusesMissingUnknownAndWrongFields) {
  break_each_field(GetParam(), example(GetParam()), json::json_pointer());
}

INSTANTIATE_TEST_SUITE_P(Formats, JsonSchema, testing::Values("profile", "plan", "validation"),
                         [](const auto& info) { return info.param; });

TEST(JsonSchema, NamesTheCodecsThatTheReaderKnows) {
  const json properties = json::parse(test::read_bytes(std::filesystem::path(KVPLAN_SCHEMA_FOLDER) /
                                                       "plan.schema.json"))["properties"];
  const auto message = [](std::string Plan::* field) {
    PlanBundle bundle = test::example_plan();
    bundle.plan.*field = "?";
    try {
      plan_json(bundle);
    } catch (const InternalError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  for (const auto& [name, field] : {std::pair{"codec", &Plan::codec}, {"code", &Plan::code}}) {
    std::string names;
    for (const json& value : properties[name]["enum"])
      names += (names.empty() ? "" : ", ") + value.dump();
    EXPECT_THAT(message(field), testing::HasSubstr("expected one of " + names + ", found \"?\""));
  }
}

struct BrokenDocument {
  const char* name;
  const char* format;
  const char* pointer;
  json value;
};

class BrokenDocuments : public testing::TestWithParam<BrokenDocument> {};

TEST_P(BrokenDocuments, AreRefused) {
  json document = example(GetParam().format);
  document.at(json::json_pointer(GetParam().pointer)) = GetParam().value;
  EXPECT_FALSE(valid(GetParam().format, document));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenDocuments,
    testing::Values(BrokenDocument{"version", "plan", "/version", 2},
                    BrokenDocument{"width", "plan", "/layers/0/k/heads/0/widths/0", 9},
                    BrokenDocument{"codec", "plan", "/codec", "q9_9"},
                    BrokenDocument{"odd_rotary", "plan", "/model/rotary_dim", 3},
                    BrokenDocument{"sha", "plan", "/tensors/sha256", "abc"},
                    BrokenDocument{"file", "plan", "/tensors/file", "../x"},
                    BrokenDocument{"scaling", "plan", "/model/rope/scaling",
                                   json{{"type", "yarn"}, {"factor", 2}}},
                    BrokenDocument{"seed", "profile", "/seed", 0.5},
                    BrokenDocument{"part", "profile", "/sources/0/part", json{0.5}},
                    BrokenDocument{"mode", "validation", "/candidates/0/mode", "best"},
                    BrokenDocument{"top1", "validation", "/candidates/0/same_top1", 1.5}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvplan
