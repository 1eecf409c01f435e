// The files for llama.cpp, read as its dialects read them, say what the report says.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <sstream>

#include "schemas/error.h"
#include "tests/exporters/plans.h"

namespace kvplan::exporters {
namespace {

using test::file_of;
using test::make_plan;
using test::uniform_plan;
using Types = std::array<std::string, 2>;

struct Reading {
  std::map<std::string, std::string> flags, env;
  explicit Reading(const Export& result) {
    std::istringstream args(file_of(result, "llama.args"));
    std::string last;
    for (std::string word; args >> word;) {
      if (word.starts_with("-")) {
        last = word;
        flags[last] = "";
      } else {
        flags[last] = word;
      }
    }
    std::istringstream lines(file_of(result, "llama.env"));
    for (std::string line; std::getline(lines, line);)
      env[line.substr(0, line.find('='))] = line.substr(line.find('=') + 1);
  }
};

/// "q8_0,2" of ik.
std::pair<std::string, int> run_of(const std::string& text) {
  if (text.empty()) return {"", 0};
  return {text.substr(0, text.find(',')), std::stoi(text.substr(text.find(',') + 1))};
}

std::vector<Types> read_ik(const Reading& r, int layers) {
  std::vector<Types> out(static_cast<std::size_t>(layers));
  for (std::size_t side = 0; side < 2; ++side) {
    const std::string flag = side == 0 ? "-ctk" : "-ctv";
    const auto at = [&](const std::string& name) {
      return r.flags.contains(name) ? r.flags.at(name) : std::string();
    };
    const auto [first, n] = run_of(at(flag + "-first"));
    const auto [last, m] = run_of(at(flag + "-last"));
    for (int l = 0; l < layers; ++l)
      out[static_cast<std::size_t>(l)][side] = l >= layers - m ? last : l < n ? first : at(flag);
  }
  return out;
}

std::vector<Types> read_thetom(const Reading& r, int layers) {
  const int mode = std::stoi(r.env.at("TURBO_LAYER_ADAPTIVE"));
  EXPECT_EQ(r.env.at("TURBO_AUTO_ASYMMETRIC"), "0");
  std::vector<Types> out;
  for (int l = 0; l < layers; ++l) {
    Types t = {r.flags.at("-ctk"), r.flags.at("-ctv")};
    const bool ends4 = l < 4 || l >= layers - 4, ends2 = l < 2 || l >= layers - 2;
    const bool last8 = l >= layers - 8;
    if ((mode == 1 && ends4) || (mode == 2 && last8)) {
      EXPECT_TRUE(r.flags.at("-ctk").starts_with("turbo"));
      t = {"q8_0", "q8_0"};
    }
    if (mode == 5) t[1] = ends2 ? "turbo4" : "turbo2";
    if (mode == 6) t[1] = last8 ? "turbo4" : "turbo2";
    if (mode == 7) t[1] = ends2 ? "q8_0" : "turbo2";
    out.push_back(t);
  }
  return out;
}

std::vector<Types> read_buun(const Reading& r, const std::string& schedule, int layers) {
  const std::map<std::string, std::string> tiers = {{"t1", "turbo1_tcq"}, {"t2", "turbo2_tcq"},
                                                    {"t3", "turbo3_tcq"}, {"t4", "turbo4"},
                                                    {"t8", "turbo8"},     {"f16", "f16"}};
  EXPECT_EQ(r.env.at("VBR_LAYER_SCHEDULE"), "@kv.schedule");
  std::vector<Types> out;
  std::istringstream lines(schedule);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_TRUE(line.ends_with(';')) << line;
    line.pop_back();
    if (line.starts_with("default=")) {
      const std::string type = tiers.at(line.substr(8));
      EXPECT_EQ(r.flags.at("-ctk"), type);
      out.assign(static_cast<std::size_t>(layers), {type, type});
      continue;
    }
    std::vector<std::string> parts;
    std::istringstream fields(line.substr(std::string("band=").size()));
    for (std::string part; std::getline(fields, part, ':');) parts.push_back(part);
    EXPECT_EQ(parts.front(), "0-" + r.env.at("VBR_SCHEDULE_CTX"));
    const std::string range = parts.back().substr(1), type = tiers.at(parts.at(1));
    const std::string side = parts.size() == 4 ? parts[2] : "";
    for (int l = std::stoi(range); l <= std::stoi(range.substr(range.find('-') + 1)); ++l) {
      if (side != "v") out.at(static_cast<std::size_t>(l))[0] = type;
      if (side != "k") out.at(static_cast<std::size_t>(l))[1] = type;
    }
  }
  return out;
}

class Dialect : public testing::TestWithParam<const char*> {};

TEST_P(Dialect, FilesSayWhatTheReportSays) {
  const std::string dialect = GetParam();
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    test::Bits bits(8 + random() % 8);
    for (auto& layer : bits)
      for (double& width : layer)
        width = random() % 12 == 0 ? 16 : 1 + static_cast<double>(random() % 8);
    const PlanBundle plan = make_plan(bits, "int", {.head_dim = 128});
    const Export result = export_plan("llamacpp", plan, {.stack = {.dialect = dialect}});
    const int layers = static_cast<int>(bits.size());
    const Reading reading(result);
    std::vector<Types> types(bits.size());
    if (dialect == "mainline")
      types.assign(bits.size(), {reading.flags.at("-ctk"), reading.flags.at("-ctv")});
    else if (dialect == "ik")
      types = read_ik(reading, layers);
    else if (dialect == "thetom")
      types = read_thetom(reading, layers);
    else
      types = read_buun(reading, file_of(result, "kv.schedule"), layers);
    std::int64_t bytes = 0;
    for (int l = 0; l < layers; ++l)
      for (const Side side : kSides) {
        const Format& format = result.projection.format(l, side);
        EXPECT_EQ(types[static_cast<std::size_t>(l)][static_cast<std::size_t>(side)], format.name)
            << l << side_name(side);
        EXPECT_GE(format.width,
                  wanted_width(plan.plan.layers[static_cast<std::size_t>(l)].side(side)));
        bytes += 2 * format.bytes(128);
      }
    EXPECT_EQ(result.projection.report.bytes_per_token, bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(Dialects, Dialect, testing::Values("mainline", "ik", "thetom", "buun"),
                         [](const auto& info) { return std::string(info.param); });

/// The stack's transform stands in for those that get lost.
TEST(Mainline, RotatesForCalibratedPlans) {
  const Export result = export_plan("llamacpp", uniform_plan(4, 4, 4, "calibrated"));
  EXPECT_EQ(file_of(result, "llama.env"), "");
  EXPECT_NE(result.projection.codec(0, Side::kKey).find("+wht="), std::string::npos);
}

TEST(Mainline, GoldenFiles) {
  const Export result = export_plan("llamacpp", uniform_plan(4, 7, 4));
  EXPECT_EQ(file_of(result, "llama.args"), "-fa on -ctk q8_0 -ctv q4_0\n");
  EXPECT_EQ(file_of(result, "llama.env"), "LLAMA_ATTN_ROT_DISABLE=1\n");
  EXPECT_EQ(file_of(result, "build.txt"),
            "-DGGML_CUDA=ON\n-DGGML_CUDA_FA_QUANTS=\"q4_0-q4_0;q8_0-q8_0;f16-f16;bf16-bf16;"
            "q8_0-q4_0\"\n");
  const Export built = export_plan("llamacpp", uniform_plan(4, 4, 4));
  EXPECT_EQ(file_of(built, "build.txt"), "-DGGML_CUDA=ON\n");
}

TEST(Mainline, LeavesItsRotationToRotatedPlans) {
  PlanBundle plan = uniform_plan(4, 4, 4, "rotated");
  plan.plan.rotation.kind = "hadamard";
  const Export result = export_plan("llamacpp", plan);
  EXPECT_EQ(file_of(result, "llama.env"), "");
  EXPECT_EQ(result.projection.codec(0, Side::kKey), "q4_0+wht=64");
  EXPECT_EQ(export_plan("llamacpp", uniform_plan(4, 4, 4)).projection.codec(0, Side::kKey), "q4_0");
}

TEST(Ik, GoldenArguments) {
  PlanBundle plan = make_plan({{8, 5}, {6, 4}, {6, 4}, {8, 4}, {8, 4}}, "rotated");
  plan.plan.rotation.kind = "hadamard";
  const Export result = export_plan("llamacpp", plan, {.stack = {.dialect = "ik"}});
  EXPECT_EQ(file_of(result, "llama.args"),
            "-fa on -ctk q6_0 -ctv q4_0 -ctk-first q8_0,1 -ctk-last q8_0,2 -ctv-first q5_0,1 -khad "
            "-vhad\n");
  plan.plan.rotation.sides = "v";
  EXPECT_THAT(file_of(export_plan("llamacpp", plan, {.stack = {.dialect = "ik"}}), "llama.args"),
              testing::Not(testing::HasSubstr("-khad")));
}

TEST(Buun, GoldenSchedule) {
  const PlanBundle plan =
      make_plan({{16, 16}, {6, 4}, {6, 4}, {8, 4}, {4, 4}, {4, 2}}, "int", {.head_dim = 128});
  const Export result = export_plan("llamacpp", plan, {.stack = {.dialect = "buun"}});
  EXPECT_EQ(file_of(result, "kv.schedule"),
            "default=t4;\nband=0-8192:f16:l0-0;\nband=0-8192:t8:k:l1-3;\nband=0-8192:t2:v:l5-5;\n");
  EXPECT_EQ(file_of(result, "llama.args"), "-fa on -ctk turbo4 -ctv turbo4\n");
  EXPECT_EQ(file_of(result, "llama.env"),
            "VBR_LAYER_SCHEDULE=@kv.schedule\nVBR_LAYER_STRICT=1\nVBR_SCHEDULE_CTX=8192\n"
            "VBR_VMM=0\n");
}

TEST(MeanCentre, NeedsFourBitKeysAndMeansAfterRotary) {
  PlanBundle plan = uniform_plan(2, 4, 4);
  ExportOptions options{.mean_centre = "centre.gguf"};
  EXPECT_THROW(export_plan("llamacpp", plan, options), InputError);  // no means
  for (auto& layer : plan.tensors.layers) layer.k.mean_rotated = Array<float>({2, 64}, 1.0f);
  const Export result = export_plan("llamacpp", plan, options);
  EXPECT_THAT(file_of(result, "centre.gguf"), testing::StartsWith("GGUF"));
  EXPECT_THAT(file_of(result, "llama.args"), testing::HasSubstr("--kv-mean-center centre.gguf"));
  PlanBundle wide = uniform_plan(2, 8, 4);
  wide.tensors = plan.tensors;
  EXPECT_THROW(export_plan("llamacpp", wide, options), InputError);
  options.stack.dialect = "ik";
  EXPECT_THROW(export_plan("llamacpp", plan, options), ArgumentError);
}

}  // namespace
}  // namespace kvplan::exporters
