// Work on a model whose weights do not fit, on several devices, and over long sequences: the parts,
// and that profile and validation do not change.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <fstream>
#include <limits>

#include "calib/profiler.h"
#include "calib/window_statistics.h"
#include "evaluation/evaluator.h"
#include "forward/activation_store.h"
#include "forward/memory_plan.h"
#include "forward/token_chunks.h"
#include "forward/weight_stream.h"
#include "quant/baselines.h"
#include "schemas/error.h"
#include "tests/calib/tiny_profile.h"
#include "tests/forward/normal_tensor.h"
#include "tests/temporary_folder.h"

namespace kvplan {
namespace {

namespace fs = std::filesystem;
using forward::normal;
using testing::HasSubstr;

class FolderTest : public testing::Test {
 protected:
  const TemporaryFolder folder_;
  const fs::path root_ = folder_.path();
};

// ---- parts ----

TEST(WeightStream, HoldsWhatIsUsedAndWhatComesNext) {
  struct Part {
    explicit Part(std::atomic<int>& alive) : alive(&alive) { ++alive; }
    Part(Part&& other) noexcept : alive(other.alive) { ++*alive; }
    ~Part() { --*alive; }
    std::atomic<int>* alive;
  };
  std::atomic<int> alive = 0;
  std::vector<int> reads(5);
  {
    forward::WeightStream<Part> stream([&](int index) {
      ++reads.at(static_cast<std::size_t>(index));
      return Part(alive);
    });
    for (int index = 0; index < 5; ++index) {
      if (index < 4) stream.prefetch(index + 1);
      stream.get(index);
      stream.get(index);
      EXPECT_LE(alive, 3);  // the moved-from one of a read that is going on counts for a moment
    }
    for (int index = 4; index >= 0; --index) {
      if (index > 0) stream.prefetch(index - 1);
      stream.get(index);
    }
    EXPECT_EQ(reads, (std::vector<int>{2, 2, 2, 2, 1}));
    stream.drop();
  }
  EXPECT_EQ(alive, 0);
}

TEST(WeightStream, FailureOfAReadAheadArrives) {
  forward::WeightStream<int> stream([](int index) {
    if (index == 1) throw InputError("model", "blk.1", "damaged");
    return index;
  });
  stream.prefetch(1);
  EXPECT_EQ(*stream.get(0), 0);
  stream.prefetch(1);
  EXPECT_THROW(stream.get(1), InputError);
  EXPECT_EQ(*stream.get(2), 2);
}

TEST(TokenChunks, EqualTheWholeWithGradients) {
  const at::Tensor weight = normal({6, 4}, 1), back = normal({2, forward::kTokensAtOnce, 6}, 3);
  const auto f = [&](const at::Tensor& x) { return at::silu(at::linear(x, weight)); };
  const auto run = [&](bool chunked) {
    const at::AutoGradMode with_grad(true);
    const at::Tensor x = normal({2, forward::kTokensAtOnce, 4}, 2).requires_grad_();
    const at::Tensor y = chunked ? forward::by_token_chunks(x, f) : f(x);
    return std::pair(y.detach(), torch::autograd::grad({y}, {x}, {back})[0]);
  };
  const auto [y, gradient] = run(true);
  const auto [y_whole, gradient_whole] = run(false);
  ASSERT_EQ(y.sizes(), y_whole.sizes());
  EXPECT_LT((y - y_whole).abs().max().item<double>(), 1e-5);
  EXPECT_LT((gradient - gradient_whole).abs().max().item<double>(), 1e-5);
  EXPECT_GT(gradient.abs().max().item<double>(), 0.1);
}

using ActivationStoreTest = FolderTest;

TEST_F(ActivationStoreTest, ReturnsWhatWasPutWhereverItLies) {
  forward::ActivationStore store(2 * 24 * sizeof(float), root_);
  std::vector<at::Tensor> tensors;
  std::vector<forward::ActivationStore::Slot> slots;
  for (std::uint32_t i = 0; i < 6; ++i) {
    tensors.push_back(normal({2, 3, 4}, i));
    slots.push_back(store.put(tensors.back()));
  }
  EXPECT_EQ(store.spilled_bytes(), 4 * 24 * static_cast<std::int64_t>(sizeof(float)));
  for (std::size_t i = 0; i < 6; ++i) EXPECT_TRUE(store.get(slots[i]).equal(tensors[i])) << i;
  for (const auto slot : slots) store.drop(slot);
  EXPECT_EQ(store.spilled_bytes(), 0);
  // The transpose of a tensor is not dense.
  const at::Tensor turned = normal({3, 64}, 9).transpose(0, 1);
  EXPECT_TRUE(store.get(store.put(turned)).equal(turned));
  EXPECT_TRUE(fs::is_empty(root_)) << "the file has a name";
}

TEST_F(ActivationStoreTest, FolderThatCannotBeWrittenIsNamed) {
  std::ofstream(root_ / "file") << "x";
  forward::ActivationStore store(0, root_ / "file");
  EXPECT_THROW(store.put(normal({2}, 1)), EnvironmentError);
}

TEST(MemoryPlan, StreamsOnlyWhatDoesNotFit) {
  const forward::WeightBytes weights{.all = 1000, .streamed = 100};
  const forward::Workload work{
      .units = 20, .fixed_bytes = 50, .unit_bytes = 10, .boundary_bytes = 30};
  struct Case {
    std::int64_t limit;
    bool stream;
    std::int64_t units, memory_bytes;
  };
  for (const Case& c :
       {Case{0, false, 1, std::numeric_limits<std::int64_t>::max()}, Case{1090, false, 1, 30},
        Case{1089, true, 20, 739}, Case{550, true, 10, 300},  // nothing spilled: 10 (10 + 30)
        Case{250, true, 8, 20},                               // 8 per read, most of it spilled
        Case{160, true, 1, 0}}) {
    SCOPED_TRACE(c.limit);
    const forward::MemoryPlan plan = forward::plan_memory(c.limit, weights, work);
    EXPECT_EQ(plan.stream, c.stream);
    EXPECT_EQ(plan.units, c.units);
    EXPECT_EQ(plan.memory_bytes, c.memory_bytes);
  }
  try {
    forward::plan_memory(159, weights, work);
    FAIL() << "accepted";
  } catch (const MemoryError& error) {
    EXPECT_EQ(error.needed_bytes(), 160);
    EXPECT_EQ(error.available_bytes(), 159);
  }
}

// ---- profile and validation ----

/// Counts how often the layers' matrices are read.
class CountingModel : public models::TinyModel {
 public:
  using TinyModel::TinyModel;
  void read(std::string_view name, std::span<float> out) const override {
    if (name == "blk.0.attn_q.weight") ++reads;
    models::TinyModel::read(name, out);
  }
  mutable std::atomic<int> reads = 0;
};

const std::vector<ProfileSource> kSources = {{"text.txt", std::string(64, 'b'), 1000, 0, 1, 1}};

class StreamingTest : public FolderTest {
 protected:
  calib::ProfileOptions options() const {
    calib::ProfileOptions options;
    options.window = calib::kWindow;
    options.sink_tokens = calib::kSinks;
    options.coherent_windows = 3;
    options.batch = 2;
    options.threads = 1;
    return options;
  }
  std::string profile(const std::string& name, const calib::ProfileOptions& options,
                      const RunControl& control = {}) const {
    calib::run_profile(model_, windows_, kSources, options, root_ / name, control);
    return file_bytes(root_ / name / "profile.safetensors");
  }
  /// What the MemoryError of the smallest limit names.
  template <class Work>
  static std::int64_t smallest_limit(const Work& work) {
    try {
      work();
    } catch (const MemoryError& error) {
      EXPECT_THAT(error.what(), HasSubstr("the smallest that works is --memory"));
      return error.needed_bytes();
    }
    ADD_FAILURE() << "one byte is enough";
    return 0;
  }

  CountingModel model_{calib::small_config(3)};
  std::vector<tokenizers::TextWindow> windows_ = calib::random_windows(21);
};

TEST_F(StreamingTest, ProfileHasTheSameBytesUnderAnyLimit) {
  calib::ProfileOptions limited = options();
  const std::string expected = profile("all", limited);
  EXPECT_EQ(model_.reads, 1);
  limited.memory_bytes = 1;
  const std::int64_t smallest = smallest_limit([&] { profile("limited", limited); });
  EXPECT_GT(smallest, forward::kProcessBytes);

  for (const std::int64_t more : {0, 3000, 6000}) {  // one batch at a time, spilled; several
    SCOPED_TRACE(more);
    limited.memory_bytes = smallest + more;
    model_.reads = 0;
    EXPECT_EQ(profile("limited " + std::to_string(more), limited), expected);
    EXPECT_GT(model_.reads, 1) << "not streamed";
    if (more == 0) {
      // Going down, once for each of 11 batches, and before the first: then layer 0 is still there.
      EXPECT_EQ(model_.reads, 12);
    }
  }
}

TEST_F(StreamingTest, InterruptedStreamContinuesToTheSameBytes) {
  calib::ProfileOptions limited = options();
  const std::string expected = profile("all", limited);
  limited.memory_bytes = 1;
  limited.memory_bytes = smallest_limit([&] { profile("limited", limited); });
  std::int64_t done = 0;
  RunControl stop;
  stop.progress = [&](const Progress& p) { done = p.done; };
  stop.stop_signal = [&] { return done >= 8 ? 15 : 0; };
  EXPECT_THROW(profile("limited", limited, stop), InterruptedError);
  EXPECT_EQ(profile("limited", limited), expected);
}

TEST_F(StreamingTest, SeveralDevicesShareTheWindows) {
  calib::ProfileOptions several = options();
  const std::string expected = profile("one", several);
  several.devices = {forward::Device::kCpu, forward::Device::kCpu, forward::Device::kCpu};
  EXPECT_EQ(profile("three", several), expected);
}

TEST_F(StreamingTest, FailureOnOneDeviceEndsTheRun) {
  calib::ProfileOptions several = options();
  several.devices = {forward::Device::kCpu, forward::Device::kCpu};
  model_.spoil("blk.1.attn_k.weight", 0, std::numeric_limits<float>::infinity());
  EXPECT_THROW(profile("two", several), InputError);
}

class StreamedValidation : public StreamingTest {
 protected:
  void SetUp() override {
    StreamingTest::SetUp();
    for (std::int64_t i = 0; i < 5; ++i) {
      tokenizers::TextWindow window{i, 0, {}};
      for (const tokenizers::TextWindow& piece : calib::random_windows(4, 4 * i))
        window.tokens.insert(window.tokens.end(), piece.tokens.begin(), piece.tokens.end());
      long_windows_.push_back(std::move(window));
    }
    bundle_ = quant::baseline_plan("q8_0", model_.spec(), calib::kSinks, 256, 0,
                                   models::rotary_frequencies(model_.config()));
  }
  evaluation::EvaluationState score(const evaluation::EvaluateOptions& options) const {
    return evaluation::score_tokens(model_, long_windows_, {{"q8_0", &bundle_}}, options, {});
  }
  evaluation::EvaluateOptions long_options() const {
    evaluation::EvaluateOptions options;
    options.window = 4 * calib::kWindow;
    options.modes = {"worst", "decode"};
    options.threads = 1;
    options.spill_folder = root_;
    return options;
  }
  std::vector<tokenizers::TextWindow> long_windows_;
  CountingModel model_{[] {
    models::ModelConfig config = calib::small_config(3);
    config.head_dim = config.rotary_dim = 32;  // q8_0 has blocks of 32
    return config;
  }()};
  PlanBundle bundle_;
};

void expect_equal(const evaluation::EvaluationState& a, const evaluation::EvaluationState& b) {
  EXPECT_EQ(a.reference_nll.values, b.reference_nll.values);
  ASSERT_EQ(a.passes.size(), b.passes.size());
  for (std::size_t i = 0; i < a.passes.size(); ++i) {
    EXPECT_EQ(a.passes[i].kl.values, b.passes[i].kl.values);
    EXPECT_EQ(a.passes[i].nll.values, b.passes[i].nll.values);
    EXPECT_EQ(a.passes[i].same_top1.values, b.passes[i].same_top1.values);
  }
}

TEST_F(StreamedValidation, ScoresAreTheSameUnderAnyLimitAndOnSeveralDevices) {
  evaluation::EvaluateOptions options = long_options();
  const evaluation::EvaluationState expected = score(options);
  EXPECT_EQ(expected.windows(), 5);
  options.memory_bytes = 1;
  const std::int64_t smallest = smallest_limit([&] { score(options); });
  for (const std::int64_t more : {0, 10000}) {
    options.memory_bytes = smallest + more;
    model_.reads = 0;
    expect_equal(score(options), expected);
    EXPECT_GT(model_.reads, 1) << "not streamed";
  }
  options.memory_bytes = 0;
  options.devices = {forward::Device::kCpu, forward::Device::kCpu};
  expect_equal(score(options), expected);
}

TEST_F(StreamedValidation, PagesNeedAllWeights) {
  const PlanBundle rotated = quant::baseline_plan("turboquant:3", model_.spec(), calib::kSinks, 256,
                                                  0, models::rotary_frequencies(model_.config()));
  evaluation::EvaluateOptions options = long_options();
  options.memory_bytes = 1;
  options.memory_bytes = smallest_limit([&] { score(options); });
  EXPECT_THROW(evaluation::score_tokens(
                   model_, long_windows_,
                   {{"plan", &rotated, {forward::reference_runtime("reference")}}}, options, {}),
               ArgumentError);
}

// ---- parts of a run ----

calib::WindowSums sums_of(double value) {
  LayerProfile layer;
  for (const Side side : kSides) {
    SideSums& x = layer.side(side);
    x.sum = x.outer = x.norm_sum = x.fisher = Array<double>({1}, value);
    x.absmax = Array<float>({1}, static_cast<float>(value));
  }
  layer.k_rotated_sum = layer.k_rotated_sumsq = layer.norm_ratio_sum = Array<double>({1}, value);
  return {layer};
}

TEST(WindowTree, PartsOfARunGiveTheBitsOfTheWholeOne) {
  // Values of very different sizes: nearly every order of addition rounds differently.
  std::vector<std::pair<std::int64_t, double>> windows;
  quant::RandomStream stream(1, quant::StreamPurpose::kTest);
  for (std::int64_t index = 0; index < 61; ++index)
    if (stream.next_below(5) > 0)
      windows.emplace_back(index, stream.next_normal() * std::pow(10, stream.next_below(12)));
  calib::WindowTree whole;
  for (const auto& [index, value] : windows) whole.add(index, sums_of(value));
  const calib::WindowSums expected = std::move(whole).total();

  for (std::size_t a = 0; a <= windows.size(); a += 3)
    for (std::size_t b = a; b <= windows.size(); b += 2) {
      calib::WindowTree joined;
      for (const auto& [begin, end] : {std::pair{std::size_t{0}, a}, {a, b}, {b, windows.size()}}) {
        calib::WindowTree part(
            begin == 0 ? calib::WindowTree::kNone : windows[begin - 1].first,
            end == windows.size() ? calib::WindowTree::kNone : windows[end].first);
        for (std::size_t i = begin; i < end; ++i)
          part.add(windows[i].first, sums_of(windows[i].second));
        for (const calib::WindowTree::Node& node : part.nodes()) joined.add(node.index, node.sums);
      }
      const calib::WindowSums found = std::move(joined).total();
      ASSERT_EQ(found[0].k.sum.data, expected[0].k.sum.data) << a << " " << b;
    }
}

}  // namespace
}  // namespace kvplan
