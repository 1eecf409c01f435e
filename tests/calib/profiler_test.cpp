#include "calib/profiler.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>

#include "calib/decoder.h"
#include "calib/window_statistics.h"
#include "quant/random.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

namespace fs = std::filesystem;
using quant::RandomStream;
using quant::StreamPurpose;
using testing::HasSubstr;

constexpr int kHidden = 24, kFeedForward = 32, kVocab = 40, kQueryHeads = 4, kKvHeads = 2,
              kHeadDim = 8;
constexpr int kWindow = 12, kSinks = 3;

/// A random llama in memory.
class TinyModel : public ModelReader {
 public:
  explicit TinyModel(int num_layers) {
    config_.architecture = "llama";
    config_.num_layers = num_layers;
    config_.hidden_size = kHidden;
    config_.intermediate_size = kFeedForward;
    config_.vocab_size = kVocab;
    config_.query_heads = kQueryHeads;
    config_.kv_heads = kKvHeads;
    config_.head_dim = config_.rotary_dim = kHeadDim;
    config_.rope.base = 100;
    config_.max_context = 64;
    config_.container = "gguf";
    spec_ = {"llama",      num_layers, kQueryHeads,         kKvHeads, kHeadDim, kHeadDim,
             config_.rope, "gguf",     std::string(64, 'a')};

    add("token_embd.weight", {kVocab, kHidden}, 1);
    add("output.weight", {kVocab, kHidden}, 0.5);
    add("output_norm.weight", {kHidden}, 1);
    for (int l = 0; l < num_layers; ++l) {
      const std::string block = "blk." + std::to_string(l) + ".";
      add(block + "attn_norm.weight", {kHidden}, 1);
      add(block + "attn_q.weight", {kQueryHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_k.weight", {kKvHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_v.weight", {kKvHeads * kHeadDim, kHidden}, 0.4);
      add(block + "attn_output.weight", {kHidden, kQueryHeads * kHeadDim}, 0.4);
      add(block + "ffn_norm.weight", {kHidden}, 1);
      add(block + "ffn_gate.weight", {kFeedForward, kHidden}, 0.3);
      add(block + "ffn_up.weight", {kFeedForward, kHidden}, 0.3);
      add(block + "ffn_down.weight", {kHidden, kFeedForward}, 0.3);
    }
  }
  const ModelConfig& config() const override { return config_; }
  bool has(std::string_view name) const override { return tensors_.find(name) != tensors_.end(); }
  std::vector<std::int64_t> shape(std::string_view name) const override { return at(name).shape; }
  void read(std::string_view name, std::span<float> out) const override {
    std::copy(at(name).data.begin(), at(name).data.end(), out.begin());
  }
  const ModelSpec& spec() const override { return spec_; }
  fs::path path() const override { return "tiny.gguf"; }

  Array<float>& tensor(std::string_view name) { return tensors_.find(name)->second; }
  void rename_weights(char digit) { spec_.kv_weights_sha256.assign(64, digit); }

 private:
  const Array<float>& at(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw InputError("tiny.gguf", std::string(name), "absent");
    return found->second;
  }
  void add(const std::string& name, std::vector<std::int64_t> shape, double scale) {
    Array<float> x(std::move(shape));
    RandomStream stream(1, StreamPurpose::kTest, static_cast<std::uint32_t>(tensors_.size()));
    for (float& value : x.data) value = static_cast<float>(scale * stream.next_normal());
    tensors_.emplace(name, std::move(x));
  }

  ModelConfig config_;
  ModelSpec spec_;
  std::map<std::string, Array<float>, std::less<>> tensors_;
};

std::vector<TextWindow> random_windows(std::int64_t count, std::int64_t first = 0) {
  std::vector<TextWindow> windows;
  for (std::int64_t index = first; index < first + count; ++index) {
    TextWindow window{index, 0, {}};
    RandomStream stream(2, StreamPurpose::kTest, static_cast<std::uint32_t>(index));
    for (int t = 0; t < kWindow; ++t)
      window.tokens.push_back(static_cast<std::int32_t>(stream.next_below(kVocab)));
    windows.push_back(std::move(window));
  }
  return windows;
}

ProfileOptions tiny_options() {
  ProfileOptions options;
  options.window = kWindow;
  options.sink_tokens = kSinks;
  options.coherent_windows = 3;
  options.seed = 7;
  options.program = "test";
  return options;
}

const std::vector<ProfileSource> kSources = {{"text.txt", std::string(64, 'b'), 1000, 0, 1, 1}};

/// A folder of its own, removed at the end.
class ProfilerTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("kvplan-profiler-" + std::to_string(getpid()));
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  Profile run(const std::string& name, const ModelReader& model,
              const std::vector<TextWindow>& windows, const ProfileOptions& options,
              const RunControl& control = {}) const {
    return run_profile(model, windows, kSources, options, root_ / name, control);
  }

  fs::path root_;
};

std::string file_bytes(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Stops the run once `windows` are done.
RunControl stop_after(std::int64_t windows, std::int64_t& done) {
  RunControl control;
  control.progress = [&done](const Progress& p) { done = p.done; };
  control.stop_signal = [&done, windows] { return done >= windows ? 15 : 0; };
  return control;
}

/// Largest difference relative to the largest magnitude.
template <class T>
double relative_difference(const Array<T>& a, const Array<T>& b) {
  EXPECT_EQ(a.shape, b.shape);
  double difference = 0, largest = 1e-300;
  for (std::size_t i = 0; i < std::min(a.data.size(), b.data.size()); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(a.data[i]) - b.data[i]));
    largest = std::max(largest, std::abs(static_cast<double>(b.data[i])));
  }
  return difference / largest;
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

at::Tensor ids_of(const TextWindow& window) {
  std::vector<std::int64_t> ids(window.tokens.begin(), window.tokens.end());
  return at::from_blob(ids.data(), {1, static_cast<std::int64_t>(ids.size())}, at::kLong).clone();
}

// --- A reference for one window of a one-layer model: plain loops, labels and gradients from first
// principles -------------

using Vector = std::vector<double>;
/// [head][token] -> vector of head_dim.
using Vectors = std::vector<std::vector<Vector>>;

Vectors to_vectors(const at::Tensor& x) {
  const at::Tensor contiguous = x.contiguous();
  const float* value = contiguous.const_data_ptr<float>();
  Vectors out(kKvHeads, std::vector<Vector>(kWindow, Vector(kHeadDim)));
  for (auto& head : out)
    for (auto& token : head)
      for (double& channel : token) channel = *value++;
  return out;
}

struct Reference {
  Vectors k_pre, k, v, h_k, h_v;
};

double theta(int j) { return std::pow(100.0, -2.0 * j / kHeadDim); }

/// R_t^T x for pairs (j, j + head_dim/2).
Vector rotated_back(const Vector& x, int t) {
  Vector out(kHeadDim);
  for (int j = 0; j < kHeadDim / 2; ++j) {
    const double c = std::cos(t * theta(j)), s = std::sin(t * theta(j));
    out[j] = c * x[j] + s * x[j + kHeadDim / 2];
    out[j + kHeadDim / 2] = -s * x[j] + c * x[j + kHeadDim / 2];
  }
  return out;
}

/// Rows of log softmax in double.
std::vector<Vector> log_probabilities(const Decoder& decoder, const at::Tensor& ids,
                                      const KvHook& hook) {
  const at::Tensor logits = decoder.head(decoder.hidden(ids, hook)).contiguous();
  const float* value = logits.const_data_ptr<float>();
  std::vector<Vector> rows(kWindow, Vector(kVocab));
  for (Vector& row : rows) {
    for (double& x : row) x = *value++;
    double sum = 0;
    for (const double x : row) sum += std::exp(x);
    for (double& x : row) x -= std::log(sum);
  }
  return rows;
}

std::vector<int> labels_of(const std::vector<Vector>& log_p, std::uint64_t seed,
                           std::int64_t window) {
  std::vector<int> labels;
  for (std::size_t t = 0; t < log_p.size(); ++t) {
    RandomStream stream(seed, StreamPurpose::kLabels, static_cast<std::uint32_t>(window),
                        static_cast<std::uint32_t>(window >> 32), static_cast<std::uint32_t>(t));
    const double peak = *std::max_element(log_p[t].begin(), log_p[t].end());
    std::uint32_t y = 0;
    do y = stream.next_below(kVocab);
    while (std::log(stream.next_uniform()) >= log_p[t][y] - peak);
    labels.push_back(static_cast<int>(y));
  }
  return labels;
}

/// d sum log p(y) / d x by central differences, x = the keys or values of layer 0.
Vectors finite_differences(const Decoder& decoder, const at::Tensor& ids,
                           const std::vector<int>& labels, Side side) {
  constexpr double kStep = 1.0 / 128;
  Vectors gradient(kKvHeads, std::vector<Vector>(kWindow, Vector(kHeadDim)));
  for (int head = 0; head < kKvHeads; ++head) {
    for (int t = 0; t < kWindow; ++t) {
      for (int i = 0; i < kHeadDim; ++i) {
        double values[2];
        for (const int sign : {0, 1}) {
          const auto log_p = log_probabilities(decoder, ids, [&](LayerKv& kv) {
            at::Tensor& x = side == Side::kKey ? kv.k : kv.v;
            x = x.clone();
            x[0][head][t][i].add_(sign ? kStep : -kStep);
          });
          values[sign] = 0;
          for (int s = 0; s < kWindow; ++s) values[sign] += log_p[s][labels[s]];
        }
        gradient[head][t][i] = (values[1] - values[0]) / (2 * kStep);
      }
    }
  }
  return gradient;
}

Reference reference_of(const ModelReader& model, const TextWindow& window, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  const Decoder decoder(model);
  const at::Tensor ids = ids_of(window);
  Reference reference;
  const auto log_p = log_probabilities(decoder, ids, [&](LayerKv& kv) {
    reference.k_pre = to_vectors(kv.k_pre[0]);
    reference.k = to_vectors(kv.k[0]);
    reference.v = to_vectors(kv.v[0]);
  });
  const std::vector<int> labels = labels_of(log_p, seed, window.index);
  reference.h_k = finite_differences(decoder, ids, labels, Side::kKey);
  reference.h_v = finite_differences(decoder, ids, labels, Side::kValue);
  return reference;
}

/// sum over non-sink tokens of a(t) b(t)^T for one head, appended to `out`.
template <class T, class A, class B>
void append_outer(std::vector<T>& out, const A& a, const B& b) {
  const std::size_t rows = a(kSinks).size(), columns = b(kSinks).size(), base = out.size();
  Vector sum(rows * columns);
  for (int t = kSinks; t < kWindow; ++t) {
    const Vector x = a(t), y = b(t);
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t j = 0; j < columns; ++j) sum[i * columns + j] += x[i] * y[j];
  }
  out.resize(base + sum.size());
  for (std::size_t i = 0; i < sum.size(); ++i) out[base + i] = static_cast<T>(sum[i]);
}

double norm(const Vector& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

TEST_F(ProfilerTest, SumsOfOneWindowMatchPlainLoopsAndFiniteDifferences) {
  const TinyModel model(1);
  // An index above 2^32 shows that both of its words key the labels.
  TextWindow window = random_windows(1)[0];
  window.index = (std::int64_t{5} << 32) + 3;
  const ProfileOptions options = tiny_options();
  const Profile profile = run("one", model, {window}, options);
  const LayerProfile& found = profile.layers[0];
  const Reference r = reference_of(model, window, options.seed);

  LayerProfile expected = empty_sums(model.config())[0];
  for (const Side side : kSides)
    expected.side(side).outer.data = expected.side(side).fisher.data = {};
  for (std::size_t head = 0; head < kKvHeads; ++head) {
    const auto one = [](int) { return Vector{1}; };
    const auto k_pre = [&](int t) { return r.k_pre[head][t]; };
    const auto k = [&](int t) { return r.k[head][t]; };
    const auto v = [&](int t) { return r.v[head][t]; };
    const auto h_k = [&](int t) { return r.h_k[head][t]; };
    const auto h_v = [&](int t) { return r.h_v[head][t]; };
    const auto h_k_pre = [&](int t) { return rotated_back(r.h_k[head][t], t); };
    const auto phi = [](int t) {
      Vector x;
      for (int j = 0; j < kHeadDim / 2; ++j) x.push_back(std::cos(t * theta(j)));
      for (int j = 0; j < kHeadDim / 2; ++j) x.push_back(std::sin(t * theta(j)));
      x.push_back(1);
      return x;
    };
    append_outer(expected.k.outer.data, k_pre, k_pre);
    append_outer(expected.v.outer.data, v, v);
    append_outer(expected.k.fisher.data, h_k_pre, h_k_pre);
    append_outer(expected.v.fisher.data, h_v, h_v);
    append_outer(expected.k.cross.data, h_k, k);
    append_outer(expected.v.cross.data, h_v, v);
    append_outer(expected.k.phase.data, h_k, phi);
    append_outer(expected.v.phase.data, h_v, one);
    for (int t = 0; t < kWindow; ++t) {
      for (std::size_t i = 0; i < kHeadDim; ++i) {
        const std::size_t at = head * kHeadDim + i;
        expected.k.absmax.data[at] =
            std::max(expected.k.absmax.data[at], static_cast<float>(std::abs(k(t)[i])));
        expected.v.absmax.data[at] =
            std::max(expected.v.absmax.data[at], static_cast<float>(std::abs(v(t)[i])));
        if (t < kSinks) continue;
        expected.k.sum.data[at] += k_pre(t)[i];
        expected.v.sum.data[at] += v(t)[i];
        expected.k_rotated_sum.data[at] += k(t)[i];
        expected.k_rotated_sumsq.data[at] += k(t)[i] * k(t)[i];
      }
      if (t < kSinks) continue;
      expected.k.norm_sum.data[head] += norm(k(t));
      expected.v.norm_sum.data[head] += norm(v(t));
      expected.norm_ratio_sum.data[head] += norm(k(t)) / norm(v(t));
    }
  }
  expected.k.cross.shape = expected.v.cross.shape = {1, kKvHeads, kHeadDim, kHeadDim};
  expected.k.phase.shape = {1, kKvHeads, kHeadDim, kHeadDim + 1};
  expected.v.phase.shape = {1, kKvHeads, kHeadDim, 1};

  constexpr double kExact = 1e-6;       // the same float32 activations
  constexpr double kDifference = 2e-3;  // central differences of a float32 forward pass
  EXPECT_EQ(profile.tokens, kWindow - kSinks);
  for (const Side side : kSides) {
    SCOPED_TRACE(side_name(side));
    const SideSums &e = expected.side(side), &f = found.side(side);
    EXPECT_LT(relative_difference(f.sum, e.sum), kExact);
    EXPECT_LT(relative_difference(f.outer, e.outer), kExact);
    EXPECT_LT(relative_difference(f.norm_sum, e.norm_sum), kExact);
    EXPECT_LT(relative_difference(f.absmax, e.absmax), kExact);
    EXPECT_LT(relative_difference(f.fisher, e.fisher), kDifference);
    EXPECT_LT(relative_difference(f.cross, e.cross), kDifference);
    EXPECT_LT(relative_difference(f.phase, e.phase), kDifference);
  }
  EXPECT_LT(relative_difference(found.k_rotated_sum, expected.k_rotated_sum), kExact);
  EXPECT_LT(relative_difference(found.k_rotated_sumsq, expected.k_rotated_sumsq), kExact);
  EXPECT_LT(relative_difference(found.norm_ratio_sum, expected.norm_ratio_sum), kExact);
}

TEST_F(ProfilerTest, BatchesAndChunksOfWorkDoNotChangeTheSums) {
  const TinyModel model(2);
  const auto windows = random_windows(5);
  ProfileOptions options = tiny_options();
  const Profile single = run("single", model, windows, options);
  options.batch = 3;
  expect_close(run("batch", model, windows, options), single, 1e-6);
}

TEST_F(ProfilerTest, SeedChangesTheLabelsAlone) {
  const TinyModel model(1);
  ProfileOptions options = tiny_options();
  const Profile a = run("a", model, random_windows(2), options);
  options.seed = 8;
  const Profile b = run("b", model, random_windows(2), options);
  EXPECT_EQ(a.layers[0].k.outer, b.layers[0].k.outer);
  EXPECT_GT(relative_difference(a.layers[0].k.fisher, b.layers[0].k.fisher), 1e-2);
}

TEST_F(ProfilerTest, ShardsMergeToTheWholeRun) {
  const TinyModel model(2);
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
  const TinyModel model(2);
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
  const TinyModel model(1);
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
  const TinyModel model(1);
  std::int64_t done = 0;
  EXPECT_THROW(run("none", model, random_windows(2), tiny_options(), stop_after(0, done)),
               InterruptedError);
  EXPECT_FALSE(fs::exists(root_ / "none" / "checkpoint"));
}

TEST_F(ProfilerTest, CheckpointOfAnotherRunIsRefusedByOption) {
  const TinyModel model(1);
  const auto windows = random_windows(4);
  std::int64_t done = 0;
  EXPECT_THROW(run("p", model, windows, tiny_options(), stop_after(2, done)), InterruptedError);
  const auto expect_refused = [&](const std::string& option, const ModelReader& m,
                                  const std::vector<TextWindow>& w, const ProfileOptions& o) {
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
  TinyModel other(1);
  other.rename_weights('c');
  expect_refused("model", other, windows, tiny_options());
}

TEST_F(ProfilerTest, DamagedCheckpointIsRefused) {
  const TinyModel model(1);
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
  const TinyModel model(1);
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
    TinyModel model(2);
    for (float& w : model.tensor(c.tensor).data) w *= 1e38f;
    try {
      run("p", model, random_windows(1, 5), tiny_options());
      FAIL() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.file(), "tiny.gguf");
      EXPECT_EQ(error.field(), c.field);
      EXPECT_THAT(error.what(), HasSubstr("window 5"));
    }
  }
}

TEST_F(ProfilerTest, ImpossibleArgumentsAreRefused) {
  const TinyModel model(1);
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
  const TinyModel model(1);
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
  TinyModel model(1);
  auto& weight = model.tensor("blk.0.attn_k.weight").data;
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = i % 2 ? 1.0f : 0.5f;
  // 1 is a level; 1/2 lies half-way between 1/3 and 2/3 and errs by 1/6.
  EXPECT_NEAR(run("p", model, random_windows(1), tiny_options()).layers[0].weight_mse, 1.0 / 36 / 2,
              1e-9);
}

// --- WindowTree
// ---------------------------------------------------------------------------------------------------------

WindowSums one_number(double value) {
  LayerProfile layer;
  layer.norm_ratio_sum = Array<double>({1}, value);
  layer.k.absmax = Array<float>({1}, static_cast<float>(value));
  return {layer};
}

/// Sum of the values with first <= index < first + size, by halves.
double tree_sum(const std::map<std::int64_t, double>& values, std::int64_t first,
                std::int64_t size) {
  const auto begin = values.lower_bound(first), end = values.lower_bound(first + size);
  if (std::distance(begin, end) == 0) return 0;
  if (std::distance(begin, end) == 1) return begin->second;
  return tree_sum(values, first, size / 2) + tree_sum(values, first + size / 2, size / 2);
}

TEST(WindowTree, AddsByHalvesOfTheIndexRangeWhateverIsMissing) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(seed);
    RandomStream stream(seed, StreamPurpose::kTest);
    std::map<std::int64_t, double> values;
    WindowTree tree;
    float largest = -1;
    for (std::int64_t index = 0; index < 64; ++index) {
      if (stream.next_below(4) == 0 && index != 63) continue;
      const double value = stream.next_uniform();
      values[index] = value;
      tree.add(index, one_number(value));
      largest = std::max(largest, static_cast<float>(value));
      EXPECT_LE(tree.nodes().size(), 8u);
    }
    const WindowSums total = std::move(tree).total();
    EXPECT_EQ(total[0].norm_ratio_sum.data[0], tree_sum(values, 0, 64));
    EXPECT_EQ(total[0].k.absmax.data[0], largest);
  }
}

}  // namespace
}  // namespace kvplan::calib
