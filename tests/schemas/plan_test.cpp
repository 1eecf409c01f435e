#include "schemas/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "schemas/sha256.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

using test::example_model;
using test::example_plan;
using test::read_bytes;
using test::refused;
using test::replace_in_file;
using test::TemporaryFolder;
using testing::HasSubstr;

TEST(Plan, ComesBackAsWritten) {
  TemporaryFolder folder;
  const PlanBundle written = example_plan();
  write_plan(written, folder / "a");
  const PlanBundle read = read_plan(folder / "a");
  EXPECT_EQ(read.plan.model, written.plan.model);
  EXPECT_EQ(read.plan.seed, written.plan.seed);
  EXPECT_EQ(read.plan.layers, written.plan.layers);
  EXPECT_EQ(read.plan.rotation, written.plan.rotation);
  EXPECT_EQ(read.plan.provenance, written.plan.provenance);
  EXPECT_EQ(read.plan.front, written.plan.front);
  EXPECT_EQ(read.tensors.levels, written.tensors.levels);
  ASSERT_EQ(read.tensors.layers.size(), 2u);
  EXPECT_EQ(read.tensors.layers[1].k.mean_rotated, written.tensors.layers[1].k.mean_rotated);
  EXPECT_EQ(read.tensors.layers[1].v.analysis, written.tensors.layers[1].v.analysis);
  EXPECT_EQ(read.tensors.layers[0].inv_freq, written.tensors.layers[0].inv_freq);
  EXPECT_EQ(read.sha256, sha256_file(folder / "a/plan.json"));
  EXPECT_EQ(read_plan(folder / "a/plan.json").sha256, read.sha256);

  // The bytes hold every field: reading and writing again changes none.
  write_plan(read, folder / "b");
  EXPECT_EQ(read_bytes(folder / "a/plan.json"), read_bytes(folder / "b/plan.json"));
  EXPECT_EQ(read_bytes(folder / "a/plan.safetensors"), read_bytes(folder / "b/plan.safetensors"));
  EXPECT_EQ(plan_json(read), read_bytes(folder / "a/plan.json"));
}

TEST(Plan, NeedsNoTensorsForABlockFormat) {
  TemporaryFolder folder;
  PlanBundle bundle = example_plan();
  bundle.tensors = {};
  bundle.plan.codec = "q8_0";
  bundle.plan.provenance.profile_sha256.clear();
  write_plan(bundle, folder / "p");
  const PlanBundle read = read_plan(folder / "p");
  EXPECT_TRUE(read.tensors.layers.empty());
  EXPECT_EQ(read.plan.provenance.profile_sha256, "");
}

TEST(Plan, LeavesAnExistingFolderAlone) {
  TemporaryFolder folder;
  write_plan(example_plan(), folder / "p");
  const std::string before = read_bytes(folder / "p/plan.json");
  PlanBundle other = example_plan();
  other.plan.seed = 1;
  EXPECT_THROW(write_plan(other, folder / "p"), EnvironmentError);
  EXPECT_EQ(read_bytes(folder / "p/plan.json"), before);
  write_plan(other, folder / "p", true);
  EXPECT_EQ(read_plan(folder / "p").plan.seed, 1u);
}

TEST(Plan, LeavesNothingWhenItCannotWrite) {
  TemporaryFolder folder;
  test::write_bytes(folder / "file", "");
  EXPECT_THROW(write_plan(example_plan(), folder / "file/p"), EnvironmentError);
  PlanBundle infinite = example_plan();
  infinite.plan.predicted_kl = std::numeric_limits<double>::infinity();
  EXPECT_THROW(write_plan(infinite, folder / "p"), InternalError);
  PlanBundle shapeless = example_plan();
  shapeless.tensors.layers[0].k.mean.shape = {16};
  EXPECT_THROW(write_plan(shapeless, folder / "p"), InternalError);
  PlanBundle incomplete = example_plan();
  incomplete.tensors.layers[1].v.lambda = {};
  EXPECT_THROW(write_plan(incomplete, folder / "p"), InternalError);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

struct BrokenPlan {
  const char* name;
  const char* from;
  const char* to;
  const char* pointer;
  const char* message;
};

class BrokenPlans : public testing::TestWithParam<BrokenPlan> {};

/// Makes the layout of the file irrelevant to the table: replaces in a file without line breaks and
/// spaces.
TEST_P(BrokenPlans, AreRefusedByName) {
  TemporaryFolder folder;
  write_plan(example_plan(), folder / "p");
  std::string text = read_bytes(folder / "p/plan.json");
  std::erase_if(text, [](char c) { return c == '\n' || c == ' '; });
  test::write_bytes(folder / "p/plan.json", text);
  ASSERT_NO_THROW(read_plan(folder / "p"));
  replace_in_file(folder / "p/plan.json", GetParam().from, GetParam().to);
  const InputError error = refused([&] { read_plan(folder / "p"); });
  EXPECT_EQ(error.field(), GetParam().pointer);
  EXPECT_THAT(error.what(), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenPlans,
    testing::Values(
        BrokenPlan{"not_json", "{", "", "", "not valid JSON"},
        BrokenPlan{"other_format", "kvplan.plan", "kvplan.profile", "/format",
                   "expected \"kvplan.plan\""},
        BrokenPlan{"newer_version", "\"version\":1", "\"version\":2", "/version", "newer kvplan"},
        BrokenPlan{"misspelt", "\"context\"", "\"contxet\"", "/context",
                   "did you mean \"contxet\"?"},
        BrokenPlan{"unknown_field", "\"context\":4096", "\"context\":4096,\"kontext\":1",
                   "/kontext", "unknown field; did you mean \"context\"?"},
        BrokenPlan{"unknown_in_head", "\"outliers\":[]", "\"outliers\":[],\"a/b~c\":0",
                   "/layers/0/k/heads/0/a~1b~0c", "unknown field"},
        BrokenPlan{"twice", "\"context\":4096", "\"context\":4096,\"context\":1", "context",
                   "twice"},
        BrokenPlan{"wrong_type", "\"context\":4096", "\"context\":\"4096\"", "/context",
                   "expected an integer of at least 0, found \"4096\""},
        BrokenPlan{"fraction", "\"context\":4096", "\"context\":4096.5", "/context",
                   "expected an integer"},
        BrokenPlan{"negative_seed", "\"seed\":18446744073709551615", "\"seed\":-1", "/seed",
                   "non-negative"},
        BrokenPlan{"too_large", "\"sink_tokens\":4", "\"sink_tokens\":4294967296", "/sink_tokens",
                   "found 4294967296"},
        BrokenPlan{"infinite", "\"predicted_kl\":0.1", "\"predicted_kl\":1e999", "",
                   "not valid JSON"},
        BrokenPlan{"negative_kl", "\"predicted_kl\":0.4", "\"predicted_kl\":-1",
                   "/front/0/predicted_kl", "found -1"},
        BrokenPlan{"codec", "\"calibrated\"", "\"calibratd\"", "/codec",
                   "did you mean \"calibrated\"?"},
        BrokenPlan{"rope_style", "\"half\"", "\"full\"", "/model/rope/style",
                   "expected one of \"half\""},
        BrokenPlan{"head_count", "\"kv_heads\":2", "\"kv_heads\":3", "/model/kv_heads", "divisor"},
        BrokenPlan{"layer_count", "\"num_layers\":2", "\"num_layers\":3", "/layers",
                   "expected 3 layers, found 2"},
        BrokenPlan{"endless_layers", "\"num_layers\":2", "\"num_layers\":2000000000",
                   "/model/num_layers", "1..4096"},
        BrokenPlan{"layer_index", "\"index\":1", "\"index\":0", "/layers/1/index", "1..1"},
        BrokenPlan{"group_size", "\"group_size\":4", "\"group_size\":3", "/group_size",
                   "divisor of head_dim 8"},
        BrokenPlan{"group_size_zero", "\"group_size\":4", "\"group_size\":0", "/group_size",
                   "1..8"},
        BrokenPlan{"width_count", "[4,2]", "[4,2,0]", "/layers/0/k/heads/0/widths",
                   "expected 2 widths"},
        BrokenPlan{"width_range", "[4,2]", "[9,2]", "/layers/0/k/heads/0/widths", "found 9"},
        BrokenPlan{"width_negative", "[4,2]", "[4,-1]", "/layers/0/k/heads/0/widths/1", "0..16"},
        BrokenPlan{"width_order", "[4,2]", "[2,4]", "/layers/0/k/heads/0/widths", "descending"},
        BrokenPlan{"half_fp16", "[4,2]", "[16,2]", "/layers/0/k/heads/0/widths", "whole head"},
        BrokenPlan{"one_head_fp16", "[4,2]", "[16,16]", "/layers/0/k/heads", "all heads"},
        BrokenPlan{"no_codebook", "[4,2]", "[4,3]", "/codebooks",
                   "width 3, used in layer 0 side k"},
        BrokenPlan{"codebook_width", "\"2\":\"uniform\"", "\"9\":\"uniform\"", "/codebooks/9",
                   "1..8"},
        BrokenPlan{"codebook_name", "\"uniform\"", "\"gauss\"", "/codebooks/2", "expected one of"},
        BrokenPlan{"outliers", "\"outliers\":[]", "\"outliers\":[1]",
                   "/layers/0/k/heads/0/outliers", "only the rotated"},
        BrokenPlan{"tensors_elsewhere", "plan.safetensors", "../plan.safetensors", "/tensors/file",
                   "expected one of"},
        BrokenPlan{"not_hex", "ba7816bf", "BA7816BF", "/model/kv_weights_sha256",
                   "64 lower-case hex"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Plan, RefusesOtherTensors) {
  TemporaryFolder folder;
  write_plan(example_plan(), folder / "p");
  std::string bytes = read_bytes(folder / "p/plan.safetensors");
  bytes.back() ^= 1;
  test::write_bytes(folder / "p/plan.safetensors", bytes);
  EXPECT_THAT(refused([&] { read_plan(folder / "p"); }).what(), HasSubstr("SHA-256 differs"));
  std::filesystem::remove(folder / "p/plan.safetensors");
  EXPECT_EQ(refused([&] { read_plan(folder / "p"); }).file(),
            (folder / "p/plan.safetensors").string());
  EXPECT_EQ(refused([&] { read_plan(folder / "missing"); }).file(), (folder / "missing").string());
}

/// Writes `tensors` beside the plan and names their SHA-256 in it, as an attacker would.
InputError refused_tensors(const SafetensorsWriter& tensors) {
  TemporaryFolder folder;
  const PlanBundle bundle = example_plan();
  write_plan(bundle, folder / "p");
  const std::string before = sha256_file(folder / "p/plan.safetensors");
  replace_in_file(folder / "p/plan.json", before, tensors.write(folder / "p/plan.safetensors"));
  return refused([&] { read_plan(folder / "p"); });
}

TEST(Plan, ChecksEveryTensor) {
  SafetensorsWriter unknown, wrong_shape, infinite, missing, levels;
  unknown.add("layers.2.k.analysis", Array<float>({2, 8, 8}));
  EXPECT_EQ(refused_tensors(unknown).field(), "layers.2.k.analysis");
  wrong_shape.add("layers.1.v.lambda", Array<float>({8, 2}));
  EXPECT_EQ(refused_tensors(wrong_shape).field(), "layers.1.v.lambda");
  infinite.add("layers.0.k.absmax", Array<float>({2}, std::numeric_limits<float>::infinity()));
  EXPECT_THAT(refused_tensors(infinite).what(), HasSubstr("NaN or infinity"));
  EXPECT_EQ(refused_tensors(missing).field(), "layers.0.k.analysis");
  levels.add("levels.1", Array<float>({2}, 0.5f));
  EXPECT_THAT(refused_tensors(levels).what(), HasSubstr("ascending"));
}

TEST(Plan, KeepsTrellisTables) {
  TemporaryFolder folder;
  PlanBundle written = example_plan();
  written.plan.code = "tcq";
  for (int i = 0; i < 256; ++i)
    written.tensors.trellis[4].push_back(static_cast<float>(i - 128) / 64);
  write_plan(written, folder / "p");
  EXPECT_EQ(SafetensorsFile(folder / "p/plan.safetensors").at("lut.4").dtype, "F16");
  EXPECT_EQ(read_plan(folder / "p").tensors.trellis, written.tensors.trellis);
}

TEST(Plan, ChecksTrellisTables) {
  constexpr std::uint16_t kHalfOne = 0x3c00, kHalfInfinity = 0x7c00;
  const auto refused_table = [](const char* name, auto array) {
    SafetensorsWriter tensors;
    tensors.add(name, std::move(array));
    return refused_tensors(tensors);
  };
  EXPECT_THAT(refused_table("lut.2", Array<std::uint16_t>({255}, kHalfOne)).what(),
              HasSubstr("expected shape [256], found [255]"));
  EXPECT_THAT(refused_table("lut.2", Array<float>({256}, 1)).what(), HasSubstr("dtype F16"));
  EXPECT_THAT(refused_table("lut.2", Array<std::uint16_t>({256}, kHalfInfinity)).what(),
              HasSubstr("NaN or infinity"));
  EXPECT_EQ(refused_table("lut.5", Array<std::uint16_t>({256}, kHalfOne)).field(), "lut.5");

  PlanBundle bundle = example_plan();
  bundle.tensors.trellis[2].assign(256, 0.1f);
  EXPECT_THROW(plan_json(bundle), InternalError) << "fp16 does not hold .1";
  bundle.tensors.trellis[2].assign(255, 1);
  EXPECT_THROW(plan_json(bundle), InternalError);
}

TEST(RequireSameModel, NamesTheFirstDifference) {
  const ModelSpec expected = example_model();
  EXPECT_NO_THROW(require_same_model(expected, expected, "plan.json"));
  ModelSpec other = expected;
  other.kv_weights_sha256 = test::kOtherSha256;
  EXPECT_EQ(refused([&] { require_same_model(expected, other, "plan.json"); }).field(),
            "/model/kv_weights_sha256");
  EXPECT_NO_THROW(require_same_model(expected, other, "plan.json", true));
  other.rope.scaling = RopeScaling{"linear", 2};
  EXPECT_EQ(refused([&] { require_same_model(expected, other, "plan.json", true); }).field(),
            "/model/rope");
  other.head_dim = 16;
  const InputError error = refused([&] { require_same_model(expected, other, "plan.json", true); });
  EXPECT_EQ(error.field(), "/model/head_dim");
  EXPECT_THAT(error.what(), HasSubstr("expected 8 (the model at hand), found 16"));
}

/// The reader would refuse `field`, so nothing is written.
void expect_not_written(const PlanBundle& bundle, const std::filesystem::path& path,
                        const std::string& field) {
  try {
    write_plan(bundle, path);
    ADD_FAILURE() << "written in spite of " << field;
  } catch (const InternalError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr(field));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(RopeScaling, ComesBackAsWritten) {
  TemporaryFolder folder;
  PlanBundle bundle = example_plan();
  RopeScaling dynamic{"dynamic", 4}, yarn{"yarn", 8}, longrope{"longrope", 32};
  dynamic.original_context = 2048;
  yarn.beta_fast = 16;
  yarn.truncate = false;
  yarn.attention_factor = longrope.attention_factor = 1.25;
  const auto pairs = static_cast<std::size_t>(bundle.plan.model.rotary_dim / 2);
  longrope.short_factors.assign(pairs, 1.5);
  longrope.long_factors.assign(pairs, 7);
  for (const RopeScaling& scaling :
       {RopeScaling{"linear", 4}, RopeScaling{"llama3", 32, 1.5, 4.5, 16384}, dynamic, yarn,
        longrope}) {
    bundle.plan.model.rope.scaling = scaling;
    write_plan(bundle, folder / scaling.type);
    EXPECT_EQ(read_plan(folder / scaling.type).plan.model.rope.scaling, scaling);
  }
  longrope.long_factors.push_back(7);
  bundle.plan.model.rope.scaling = longrope;
  expect_not_written(bundle, folder / "long", "/model/rope/scaling/long_factors");
}

TEST(Windows, BelongToTheModel) {
  TemporaryFolder folder;
  PlanBundle bundle = example_plan();
  ModelSpec& model = bundle.plan.model;
  const ModelSpec plain = model;
  model.windows.assign(static_cast<std::size_t>(model.num_layers), 0);
  model.windows.front() = 128;
  model.local_rope = RopeSpec{"half", 5000, {}};
  bundle.plan.layers.front().kind = "sliding";
  write_plan(bundle, folder / "plan");
  EXPECT_EQ(read_plan(folder / "plan").plan.model, model);
  EXPECT_EQ(refused([&] { require_same_model(plain, model, "plan.json", true); }).field(),
            "/model/windows");

  bundle.plan.layers.front().kind = "full";
  expect_not_written(bundle, folder / "kind", "/layers/0/kind");
  model.windows.push_back(0);
  expect_not_written(bundle, folder / "count", "/model/windows");
}

}  // namespace
}  // namespace kvplan
