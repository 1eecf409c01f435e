#include "schemas/profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "schemas/sha256.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

using test::example_profile;
using test::read_bytes;
using test::refused;
using test::replace_in_file;
using test::TemporaryFolder;
using testing::ElementsAre;
using testing::HasSubstr;

std::string bytes_of(const Profile& profile) {
  TemporaryFolder folder;
  write_profile(profile, folder.path());
  return read_bytes(folder / "profile.json") + read_bytes(folder / "profile.safetensors");
}

Profile merged(const std::vector<Profile>& parts, const std::vector<double>& weights = {}) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < parts.size(); ++i) names.push_back("part" + std::to_string(i));
  return merge_profiles(parts, weights, names);
}

TEST(Profile, ComesBackAsWritten) {
  TemporaryFolder folder;
  const Profile written = example_profile();
  write_profile(written, folder / "new/p");
  const Profile read = read_profile(folder / "new/p");
  EXPECT_EQ(read.model, written.model);
  EXPECT_EQ(read.layers, written.layers);
  EXPECT_EQ(read.windows, written.windows);
  EXPECT_EQ(read.sources, written.sources);
  EXPECT_EQ(read.summary[1].outlier_channels_k, written.summary[1].outlier_channels_k);
  EXPECT_EQ(read.summary[1].sensitivity_k, written.summary[1].sensitivity_k);
  EXPECT_EQ(bytes_of(read), bytes_of(written));
  EXPECT_EQ(profile_sha256(folder / "new/p"), sha256(read_bytes(folder / "new/p/profile.json")));
  EXPECT_THAT(profile_json(read), testing::Not(HasSubstr("profile.safetensors")));
}

TEST(Profile, NeedsNoSummary) {
  TemporaryFolder folder;
  Profile profile = example_profile();
  profile.summary.clear();
  write_profile(profile, folder.path());
  EXPECT_TRUE(read_profile(folder.path()).summary.empty());
}

TEST(Profile, HoldsTheTensorsOfTheInterface) {
  TemporaryFolder folder;
  write_profile(example_profile(0, 6), folder.path());
  const SafetensorsFile file(folder / "profile.safetensors");
  EXPECT_EQ(file.entries().size(), 2u * 18 + 2);
  EXPECT_THAT(file.i64("windows").shape, ElementsAre(6, 3));
  EXPECT_THAT(file.f32("layers.1.k.phase").shape, ElementsAre(4, 2, 8, 5));
  EXPECT_THAT(file.f32("layers.1.v.phase").shape, ElementsAre(4, 2, 8, 1));
  EXPECT_THAT(file.f32("layers.0.v.cross").shape, ElementsAre(4, 2, 8, 8));
  EXPECT_THAT(file.f64("layers.0.k_pre.outer").shape, ElementsAre(2, 8, 8));
  EXPECT_THAT(file.f64("layers.0.k.norm_ratio_sum").shape, ElementsAre(2));
  EXPECT_THAT(file.f64("weight_mse").data, ElementsAre(0.125, 0.125));
}

TEST(Profile, IsNotWrittenBroken) {
  TemporaryFolder folder;
  Profile infinite = example_profile();
  infinite.layers[1].v.fisher.data[3] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(write_profile(infinite, folder / "p"), InternalError);
  Profile shape = example_profile();
  shape.layers[0].k.cross.shape[0] = 2;
  EXPECT_THROW(write_profile(shape, folder / "p"), InternalError);
  Profile source = example_profile();
  source.windows[0].source = 2;
  EXPECT_THROW(write_profile(source, folder / "p"), InternalError);
  EXPECT_FALSE(std::filesystem::exists(folder / "p"));
  test::write_bytes(folder / "file", "");
  EXPECT_THROW(write_profile(example_profile(), folder / "file"), EnvironmentError);
}

struct BrokenProfile {
  const char* name;
  const char* from;
  const char* to;
  const char* pointer;
};

class BrokenProfiles : public testing::TestWithParam<BrokenProfile> {};

TEST_P(BrokenProfiles, AreRefusedByName) {
  TemporaryFolder folder;
  write_profile(example_profile(), folder.path());
  replace_in_file(folder / "profile.json", GetParam().from, GetParam().to);
  EXPECT_EQ(refused([&] { read_profile(folder.path()); }).field(), GetParam().pointer);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenProfiles,
    testing::Values(
        BrokenProfile{"unknown", "\"seed\": 7", "\"seed\": 7, \"sede\": 1", "/sede"},
        BrokenProfile{"window", "\"window\": 16", "\"window\": 0", "/window"},
        BrokenProfile{"sinks", "\"sink_tokens\": 4", "\"sink_tokens\": 16", "/sink_tokens"},
        BrokenProfile{"channel", "12\n", "16\n", "/layers/0/outlier_channels/k/1"},
        BrokenProfile{"norm", "\"key_norm\": 3.5", "\"key_norm\": null", "/layers/0/key_norm"},
        BrokenProfile{"part", "0.25,", "1.25,", "/sources/1/part"},
        BrokenProfile{"windows", "\"window\": 16", "\"window\": 8", "windows"},
        BrokenProfile{"rotary", "\"rotary_dim\": 4", "\"rotary_dim\": 2", "layers.0.k.phase"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Profile, RefusesDamagedTensors) {
  TemporaryFolder folder;
  write_profile(example_profile(), folder.path());
  std::string bytes = read_bytes(folder / "profile.safetensors");
  bytes[bytes.size() / 2] ^= 1;
  test::write_bytes(folder / "profile.safetensors", bytes);
  EXPECT_THAT(refused([&] { read_profile(folder.path()); }).what(), HasSubstr("SHA-256 differs"));
  EXPECT_THROW(read_profile(folder / "missing"), InputError);
}

TEST(MergeProfiles, AddsSumsAndKeepsMaxima) {
  const Profile sum = merged({example_profile(0, 3), example_profile(3, 2)});
  EXPECT_EQ(sum.tokens, 60);
  EXPECT_EQ(sum.fisher_tokens, 60);
  // Element 1 of the ramps: offset + 0.25, offset 0 and 3.
  EXPECT_EQ(sum.layers[1].k.sum.data[1], 1.25 + 4.25);
  EXPECT_EQ(sum.layers[1].v.fisher.data[1], 4.25 + 7.25);
  EXPECT_EQ(sum.layers[0].norm_ratio_sum.data[1], 8.25 + 11.25);
  EXPECT_EQ(sum.layers[0].k.absmax.data[1], 8.25f);
  EXPECT_EQ(sum.layers[0].weight_mse, 0.125);
  EXPECT_EQ(sum.sources, example_profile().sources);
  EXPECT_TRUE(sum.summary.empty());
}

TEST(MergeProfiles, KeepsTheFirstRowsByWindowIndex) {
  // Even and odd windows: rows 0..3 of the result alternate between the parts.
  const Profile even = example_profile(0, 3, 2), odd = example_profile(1, 3, 2);
  const Profile sum = merged({odd, even});
  ASSERT_EQ(sum.windows.size(), 6u);
  for (std::int64_t i = 0; i < 6; ++i) EXPECT_EQ(sum.windows[static_cast<std::size_t>(i)].index, i);
  EXPECT_THAT(sum.layers[0].k.cross.shape, ElementsAre(4, 2, 8, 8));
  const auto same_row = [&](std::size_t row, const Profile& part, std::size_t part_row) {
    const auto a = sum.layers[1].k.phase.row(row), b = part.layers[1].k.phase.row(part_row);
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  EXPECT_TRUE(same_row(0, even, 0));
  EXPECT_TRUE(same_row(1, odd, 0));
  EXPECT_TRUE(same_row(2, even, 1));
  EXPECT_TRUE(same_row(3, odd, 1));
}

/// Sums that round differently in another order.
Profile rough_profile(std::int64_t first) {
  Profile profile = example_profile(first, 2);
  for (LayerProfile& layer : profile.layers) {
    for (double& x : layer.k.outer.data) x = std::sqrt(x + static_cast<double>(first)) * 1e3 / 7;
  }
  return profile;
}

TEST(MergeProfiles, IgnoresTheOrderOfArguments) {
  std::vector<Profile> parts = {rough_profile(0), rough_profile(2), rough_profile(4)};
  const std::string expected = bytes_of(merged(parts, {1, 0.5, 3}));
  EXPECT_EQ(bytes_of(merged({parts[2], parts[0], parts[1]}, {3, 1, 0.5})), expected);
  EXPECT_EQ(bytes_of(merged({parts[1], parts[2], parts[0]}, {0.5, 3, 1})), expected);
}

TEST(MergeProfiles, AlignedShardsMergeInSteps) {
  const std::vector<Profile> parts = {rough_profile(0), rough_profile(2), rough_profile(4),
                                      rough_profile(6)};
  const Profile left = merged({parts[0], parts[1]}), right = merged({parts[2], parts[3]});
  EXPECT_EQ(bytes_of(merged({left, right})), bytes_of(merged(parts)));
}

TEST(MergeProfiles, OfOnePartChangesNothing) {
  Profile part = example_profile();
  part.summary.clear();
  EXPECT_EQ(bytes_of(merged({part})), bytes_of(part));
}

TEST(MergeProfiles, WeightsScaleSumsAndCounts) {
  const Profile sum = merged({example_profile(0, 2), example_profile(2, 2)}, {1, 2.5});
  EXPECT_EQ(sum.tokens, 24 + 60);
  EXPECT_EQ(sum.layers[0].v.sum.data[0], 1 + 2.5 * 3);
  EXPECT_EQ(sum.layers[0].v.absmax.data[0], 7.0f);
  EXPECT_EQ(sum.layers[0].v.cross.data[0], 0.0f);
  ASSERT_EQ(sum.sources.size(), 4u);
  EXPECT_EQ(sum.sources[3].weight, 2.5);
  EXPECT_EQ(sum.windows[3].source, 3);
}

TEST(MergeProfiles, JoinsTwoTextsWithTheSameIndices) {
  Profile prose = example_profile(0, 2), code = example_profile(0, 2);
  prose.sources = {prose.sources[0]};
  code.sources = {code.sources[1]};
  for (Profile* profile : {&prose, &code}) {
    for (ProfileWindow& window : profile->windows) window.source = 0;
  }
  const Profile sum = merged({prose, code});
  EXPECT_EQ(sum.windows.size(), 4u);
  EXPECT_EQ(bytes_of(sum), bytes_of(merged({code, prose})));
  TemporaryFolder folder;
  write_profile(sum, folder.path());
  EXPECT_EQ(read_profile(folder.path()).windows, sum.windows);
}

TEST(MergeProfiles, RefusesWhatDoesNotBelongTogether) {
  const Profile first = example_profile(0, 3);
  const auto field_of = [&](const auto& change) {
    Profile other = example_profile(3, 3);
    change(other);
    const InputError error = refused([&] { merged({first, other}); });
    EXPECT_EQ(error.file(), "part1");
    return error.field();
  };
  EXPECT_EQ(field_of([](Profile& p) { p.model.kv_weights_sha256 = test::kOtherSha256; }),
            "/model/kv_weights_sha256");
  EXPECT_EQ(field_of([](Profile& p) { p.window = 32; }), "/window");
  EXPECT_EQ(field_of([](Profile& p) { p.sink_tokens = 0; }), "/sink_tokens");
  EXPECT_EQ(field_of([](Profile& p) { p.seed = 8; }), "/seed");
  EXPECT_EQ(field_of([](Profile& p) { p.layers[1].inv_freq[1] = 0.02; }), "layers.1.inv_freq");
  EXPECT_EQ(field_of([](Profile& p) { p.windows.clear(); }), "windows");
  EXPECT_EQ(field_of([](Profile& p) {
              p = example_profile(2, 3);
              p.windows[0].source = 0;
            }),
            "windows");
}

TEST(MergeProfiles, RefusesBadArguments) {
  const std::vector<Profile> parts = {example_profile(0, 2), example_profile(2, 2)};
  EXPECT_THROW(merged({}), ArgumentError);
  EXPECT_THROW(merged(parts, {1}), ArgumentError);
  EXPECT_THROW(merged(parts, {1, 0}), ArgumentError);
  EXPECT_THROW(merged(parts, {1, std::numeric_limits<double>::infinity()}), ArgumentError);
}

}  // namespace
}  // namespace kvplan
