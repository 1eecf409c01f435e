#include "calib/profiler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <limits>

#include "calib/window_statistics.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "tests/calib/tiny_profile.h"
#include "tests/temporary_folder.h"

namespace kvplan::calib {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

ProfileOptions tiny_options() {
  ProfileOptions options;
  options.window = kWindow;
  options.sink_tokens = kSinks;
  options.coherent_windows = 3;
  options.seed = 7;
  options.threads = 1;  // the tensors are tiny
  options.program = "test";
  return options;
}

const std::vector<ProfileSource> kSources = {{"text.txt", std::string(64, 'b'), 1000, 0, 1, 1}};

class ProfilerTest : public testing::Test {
 protected:
  Profile run(const std::string& name, const models::ModelReader& model,
              const std::vector<tokenizers::TextWindow>& windows, const ProfileOptions& options,
              const RunControl& control = {}) const {
    return run_profile(model, windows, kSources, options, root_ / name, control);
  }

  const TemporaryFolder folder_;
  const fs::path root_ = folder_.path();
};

/// Stops the run once `windows` are done.
RunControl stop_after(std::int64_t windows, std::int64_t& done) {
  RunControl control;
  control.progress = [&done](const Progress& p) { done = p.done; };
  control.stop_signal = [&done, windows] { return done >= windows ? 15 : 0; };
  return control;
}

void expect_close(const Profile& a, const Profile& b, double tolerance) {
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (std::size_t l = 0; l < a.layers.size(); ++l) {
    SCOPED_TRACE("layer " + std::to_string(l));
    const auto compare = [tolerance](const auto& x, const auto& y) {
      EXPECT_LT(relative_difference(x, y), tolerance);
    };
    for_each_sum(a.layers[l], b.layers[l], compare, compare);
    for (const Side side : kSides) {
      compare(a.layers[l].side(side).cross, b.layers[l].side(side).cross);
      compare(a.layers[l].side(side).phase, b.layers[l].side(side).phase);
    }
  }
}

TEST_F(ProfilerTest, BatchesAndChunksOfWorkDoNotChangeTheSums) {
  const models::TinyModel model(small_config(2));
  const auto windows = random_windows(5);
  ProfileOptions options = tiny_options();
  const Profile single = run("single", model, windows, options);
  options.batch = 3;
  expect_close(run("batch", model, windows, options), single, 1e-6);
}

TEST_F(ProfilerTest, SeedChangesTheLabelsAlone) {
  const models::TinyModel model(small_config(1));
  ProfileOptions options = tiny_options();
  const Profile a = run("a", model, random_windows(2), options);
  options.seed = 8;
  const Profile b = run("b", model, random_windows(2), options);
  EXPECT_EQ(a.layers[0].k.outer, b.layers[0].k.outer);
  EXPECT_GT(relative_difference(a.layers[0].k.fisher, b.layers[0].k.fisher), 1e-2);
}

TEST_F(ProfilerTest, ShardsMergeToTheWholeRun) {
  const models::TinyModel model(small_config(2));
  const ProfileOptions options = tiny_options();
  const auto windows = random_windows(8);
  const Profile whole = run("whole", model, windows, options);
  struct Case {
    std::string name;
    std::int64_t split;
    bool same_bits;
  };
  for (const Case& c : {Case{"aligned", 4, true}, Case{"unaligned", 3, false}}) {
    SCOPED_TRACE(c.name);
    const std::vector<Profile> parts = {
        run(c.name + "0", model, {windows.begin(), windows.begin() + c.split}, options),
        run(c.name + "1", model, {windows.begin() + c.split, windows.end()}, options)};
    const Profile merged = merge_profiles(parts, {}, std::vector<std::string>{"part 0", "part 1"});
    EXPECT_EQ(merged.tokens, whole.tokens);
    EXPECT_EQ(merged.windows, whole.windows);
    expect_close(merged, whole, c.same_bits ? std::numeric_limits<double>::min() : 1e-6);
  }
}

TEST_F(ProfilerTest, InterruptedRunContinuesToTheSameBytes) {
  const models::TinyModel model(small_config(2));
  const auto windows = random_windows(7);
  ProfileOptions options = tiny_options();
  options.batch = 2;
  run("whole", model, windows, options);

  std::int64_t done = 0;
  try {
    run("resumed", model, windows, options, stop_after(4, done));
    FAIL() << "not interrupted";
  } catch (const InterruptedError& interrupted) {
    EXPECT_EQ(interrupted.signal(), 15);
    EXPECT_THAT(interrupted.what(), HasSubstr("4 of 7 windows"));
  }
  const fs::path folder = root_ / "resumed";
  EXPECT_FALSE(fs::exists(folder / "profile.json"));
  // Files of a later state that was killed before state.json named it.
  write_file_atomically(folder / "checkpoint" / "sums-6.safetensors", std::string_view("half a"));

  std::vector<std::int64_t> reports;
  RunControl control;
  control.progress = [&reports](const Progress& p) { reports.push_back(p.done); };
  run("resumed", model, windows, options, control);
  EXPECT_EQ(reports, (std::vector<std::int64_t>{4, 6, 7}));
  for (const char* file : {"profile.json", "profile.safetensors"}) {
    EXPECT_FALSE(file_bytes(folder / file).empty());
    EXPECT_EQ(file_bytes(folder / file), file_bytes(root_ / "whole" / file)) << file;
  }
  EXPECT_FALSE(fs::exists(folder / "checkpoint"));
}

TEST_F(ProfilerTest, RunThatDiesContinuesFromItsLastCheckpoint) {
  const models::TinyModel model(small_config(1));
  const auto windows = random_windows(5);
  ProfileOptions options = tiny_options();
  options.checkpoint_seconds = 0;
  run("whole", model, windows, options);

  struct Death {};
  RunControl control;
  control.progress = [](const Progress& p) {
    if (p.done == 4) throw Death();
  };
  EXPECT_THROW(run("resumed", model, windows, options, control), Death);
  std::int64_t first = -1;
  control.progress = [&first](const Progress& p) { first = first < 0 ? p.done : first; };
  run("resumed", model, windows, options, control);
  EXPECT_EQ(first, 3);
  EXPECT_EQ(file_bytes(root_ / "resumed" / "profile.safetensors"),
            file_bytes(root_ / "whole" / "profile.safetensors"));
}

TEST_F(ProfilerTest, InterruptBeforeTheFirstWindowLeavesNoCheckpoint) {
  const models::TinyModel model(small_config(1));
  std::int64_t done = 0;
  EXPECT_THROW(run("none", model, random_windows(2), tiny_options(), stop_after(0, done)),
               InterruptedError);
  EXPECT_FALSE(fs::exists(root_ / "none" / "checkpoint"));
}

TEST_F(ProfilerTest, CheckpointOfAnotherRunIsRefusedByOption) {
  const models::TinyModel model(small_config(1));
  const auto windows = random_windows(4);
  std::int64_t done = 0;
  EXPECT_THROW(run("p", model, windows, tiny_options(), stop_after(2, done)), InterruptedError);
  const auto expect_refused = [&](const std::string& option, const models::ModelReader& m,
                                  const std::vector<tokenizers::TextWindow>& w,
                                  const ProfileOptions& o) {
    SCOPED_TRACE(option);
    try {
      run("p", m, w, o);
      FAIL() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), "/key/" + option);
      EXPECT_THAT(error.what(), HasSubstr("made with " + option));
    }
  };
  ProfileOptions options = tiny_options();
  options.seed = 8;
  expect_refused("seed", model, windows, options);
  options = tiny_options();
  options.sink_tokens = 2;
  expect_refused("sinks", model, windows, options);
  options = tiny_options();
  options.coherent_windows = 1;
  expect_refused("coherent", model, windows, options);
  expect_refused("text", model, random_windows(3), tiny_options());
  const models::TinyModel other(small_config(1), /*seed=*/2);
  expect_refused("model", other, windows, tiny_options());
}

TEST_F(ProfilerTest, DamagedCheckpointIsRefused) {
  const models::TinyModel model(small_config(1));
  const auto windows = random_windows(4);
  std::int64_t done = 0;
  EXPECT_THROW(run("p", model, windows, tiny_options(), stop_after(2, done)), InterruptedError);
  const fs::path checkpoint = root_ / "p" / "checkpoint";
  const std::string state = file_bytes(checkpoint / "state.json");
  for (const std::string& text :
       {std::string("{"), std::string("[]"), std::string("{\"version\": 2}"),
        std::string(state).replace(state.find("\"done\": 2"), 9, "\"done\": 9")}) {
    SCOPED_TRACE(text);
    write_file_atomically(checkpoint / "state.json", std::string_view(text));
    EXPECT_THROW(run("p", model, windows, tiny_options()), InputError);
  }
  write_file_atomically(checkpoint / "state.json", std::string_view(state));
  fs::resize_file(checkpoint / "sums-2.safetensors", 100);
  EXPECT_THROW(run("p", model, windows, tiny_options()), InputError);
}

TEST_F(ProfilerTest, BusyOrFinishedFolderIsRefused) {
  const models::TinyModel model(small_config(1));
  const auto windows = random_windows(1);
  {
    const FolderLock other_run(root_ / "p");
    EXPECT_THROW(run("p", model, windows, tiny_options()), EnvironmentError);
  }
  run("p", model, windows, tiny_options());
  const std::string before = file_bytes(root_ / "p" / "profile.json");
  EXPECT_THROW(run("p", model, windows, tiny_options()), EnvironmentError);
  EXPECT_EQ(file_bytes(root_ / "p" / "profile.json"), before);
}

TEST_F(ProfilerTest, OverflowNamesLayerSideAndWindow) {
  struct Case {
    const char* tensor;
    const char* field;
  };
  for (const Case& c :
       {Case{"blk.1.attn_k.weight", "layers.1.k"}, Case{"blk.0.attn_v.weight", "layers.0.v"},
        Case{"output.weight", "layers.1.k"}}) {
    SCOPED_TRACE(c.tensor);
    models::TinyModel model(small_config(2));
    model.spoil(c.tensor, 0, std::numeric_limits<float>::infinity());
    try {
      run("p", model, random_windows(1, 5), tiny_options());
      FAIL() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.file(), "tiny");
      EXPECT_EQ(error.field(), c.field);
      EXPECT_THAT(error.what(), HasSubstr("window 5"));
    }
  }
}

TEST_F(ProfilerTest, ImpossibleArgumentsAreRefused) {
  const models::TinyModel model(small_config(1));
  const auto windows = random_windows(2);
  EXPECT_THROW(run("p", model, {}, tiny_options()), ArgumentError);
  EXPECT_THROW(run("p", model, {windows[1], windows[0]}, tiny_options()), ArgumentError);
  EXPECT_THROW(run("p", model, {windows[0], windows[0]}, tiny_options()), ArgumentError);
  for (const auto& [field, value] : std::vector<std::pair<int ProfileOptions::*, int>>{
           {&ProfileOptions::batch, 0},
           {&ProfileOptions::sink_tokens, -1},
           {&ProfileOptions::sink_tokens, kWindow},
           {&ProfileOptions::window, kWindow + 1},
           {&ProfileOptions::coherent_windows, -1}}) {
    ProfileOptions options = tiny_options();
    options.*field = value;
    EXPECT_THROW(run("p", model, windows, options), ArgumentError) << value;
  }
}

TEST_F(ProfilerTest, CoherentRowsAreTheFirstWindows) {
  const models::TinyModel model(small_config(1));
  ProfileOptions options = tiny_options();
  const Profile three = run("three", model, random_windows(4), options);
  options.coherent_windows = 0;
  const Profile none = run("none", model, random_windows(4), options);
  EXPECT_EQ(three.layers[0].k.cross.shape,
            (std::vector<std::int64_t>{3, kKvHeads, kHeadDim, kHeadDim}));
  EXPECT_TRUE(none.layers[0].k.cross.empty());
  const Profile last = run("last", model, random_windows(1, 2), tiny_options());
  const auto row = three.layers[0].v.cross.row(2);
  EXPECT_TRUE(std::equal(row.begin(), row.end(), last.layers[0].v.cross.data.begin()));
}

TEST_F(ProfilerTest, WeightErrorOfThreeBitKeys) {
  models::TinyModel model(small_config(1));
  const std::string name = "blk.0.attn_k.weight";
  const auto shape = model.shape(name);
  for (std::int64_t i = 0; i < shape[0] * shape[1]; ++i)
    model.spoil(name, static_cast<std::size_t>(i), i % 2 ? 1.0f : 0.5f);
  // 1 is a level; 1/2 lies half-way between 1/3 and 2/3 and errs by 1/6.
  EXPECT_NEAR(run("p", model, random_windows(1), tiny_options()).layers[0].weight_mse, 1.0 / 36 / 2,
              1e-9);
}

}  // namespace
}  // namespace kvplan::calib
