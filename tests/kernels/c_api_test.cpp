// The C ABI: sizes, pages as bytes, statuses. Compiled for the GPU and for the emulated device.

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "kernels/runtime.h"
#include "quant/cache_size.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "tests/quant/page_fixtures.h"
#include "tests/temporary_folder.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::quant::testing;
using ::testing::HasSubstr;

constexpr int kMaxSequences = 3;
constexpr std::int64_t kMaxTokens = 200;

PlanBundle plan() {
  PlanBundle bundle = calibrated_plan(64, 8, {{8, 6, 4, 3, 2, 2, 1, 0}, {2, 2, 2, 2, 2, 2, 0, 0}},
                                      {{3, 3, 3, 3, 2, 2, 1, 1}, {5, 4, 4, 4, 4, 0, 0, 0}});
  for (const int width : {1, 2, 3, 4, 5, 6, 8})
    bundle.plan.codebooks[width] = width == 2 ? "uniform" : "lloyd_max";
  return bundle;
}

kvplan_geometry geometry_of(const ModelSpec& model) {
  kvplan_geometry geometry{};
  geometry.query_heads = 3 * model.kv_heads;
  geometry.max_sequences = kMaxSequences;
  geometry.max_tokens = kMaxTokens;
  geometry.max_query_tokens = 2;
  return geometry;
}

struct Destroy {
  void operator()(kvplan_runtime* runtime) const { kvplan_destroy(runtime); }
};
using Handle = std::unique_ptr<kvplan_runtime, Destroy>;

/// Device memory for a test.
class Device {
 public:
  explicit Device(std::size_t bytes) {
    if (cudaMalloc(&data_, bytes) != cudaSuccess) ADD_FAILURE() << "no device memory";
  }
  template <class T>
  explicit Device(const std::vector<T>& values) : Device(values.size() * sizeof(T)) {
    cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  operator void*() const { return data_; }
  template <class T>
  std::vector<T> values(std::size_t count) const {
    std::vector<T> out(count);
    cudaMemcpy(out.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost);
    return out;
  }

 private:
  void* data_ = nullptr;
};

class CApi : public ::testing::Test {
 protected:
  void SetUp() override {
    kvplan_device_info info;
    if (kvplan_query_device(0, &info) != KVPLAN_OK) GTEST_SKIP() << kvplan_last_error();
    bundle_ = plan();
    path_ = folder_.path() / "plan";
    write_plan(bundle_, path_);
    bundle_ = read_plan(path_);
    geometry_ = geometry_of(bundle_.plan.model);
  }
  Handle create() {
    kvplan_runtime* runtime = nullptr;
    EXPECT_EQ(kvplan_create(path_.c_str(), &geometry_, &runtime), KVPLAN_OK) << kvplan_last_error();
    return Handle(runtime);
  }
  std::vector<std::uint16_t> vectors(int tokens, int heads) {
    std::vector<std::uint16_t> bits(
        static_cast<std::size_t>(tokens * heads * bundle_.plan.model.head_dim));
    for (std::uint16_t& x : bits) x = quant::to_half(static_cast<float>(random_.next_normal()));
    return bits;
  }
  int kv_heads() const { return bundle_.plan.model.kv_heads; }
  kvplan_status begin(kvplan_runtime* runtime, std::vector<int> slots, std::vector<int> tokens) {
    return kvplan_begin_step(runtime, static_cast<int>(slots.size()), slots.data(), tokens.data(),
                             nullptr);
  }
  void fill(kvplan_runtime* runtime, int slot, int tokens) {
    ASSERT_EQ(begin(runtime, {slot}, {tokens}), KVPLAN_OK) << kvplan_last_error();
    const Device k(vectors(tokens, kv_heads())), v(vectors(tokens, kv_heads()));
    for (int layer = 0; layer < bundle_.plan.model.num_layers; ++layer)
      ASSERT_EQ(kvplan_append(runtime, layer, k, v, nullptr), KVPLAN_OK) << kvplan_last_error();
    cudaDeviceSynchronize();
  }

  TemporaryFolder folder_;
  std::filesystem::path path_;
  PlanBundle bundle_;
  kvplan_geometry geometry_{};
  quant::RandomStream random_{9, quant::StreamPurpose::kTest};
};

// One side of a page of all KV heads as the CPU packs it.
void pack(const quant::TransformCodecSpec& spec, const std::vector<quant::HeadLayout>& heads,
          Side side, std::span<const std::uint16_t> x, std::int64_t first_position,
          std::span<std::byte> block) {
  const quant::KvShape shape{quant::kPageTokens, spec.geometry.kv_heads, spec.geometry.head_dim};
  const auto codec = quant::make_transform_codec(spec);
  std::vector<float> values;
  for (const std::uint16_t bits : x) values.push_back(quant::from_half(bits));
  std::vector<std::byte> linear(codec->packed_bytes(shape));
  codec->encode(shape, first_position, values, linear);
  const std::size_t stride = linear.size() / quant::kPageTokens;
  std::size_t offset = 0;
  for (const quant::HeadLayout& head : heads) {
    const quant::SideLayout& layout = side == Side::kKey ? head.k : head.v;
    quant::to_page(layout, side, std::span(linear).subspan(offset), stride,
                   block.subspan(head.block_offset, head.page_bytes));
    offset += quant::linear_bytes(layout);
  }
}

TEST_F(CApi, PagesHoldTheBytesOfTheCpuReference) {
  const Handle runtime = create();
  constexpr int kTokens = 140;
  const auto k = vectors(kTokens, kv_heads()), v = vectors(kTokens, kv_heads());
  ASSERT_EQ(begin(runtime.get(), {1}, {kTokens}), KVPLAN_OK) << kvplan_last_error();
  const Device on_k(k), on_v(v);
  const auto formats = quant::page_format(bundle_);
  const std::size_t row = static_cast<std::size_t>(kv_heads() * bundle_.plan.model.head_dim);
  for (int layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(kvplan_append(runtime.get(), layer, on_k, on_v, nullptr), KVPLAN_OK);
    for (const std::int64_t page : {0, 1}) {
      SCOPED_TRACE(::testing::Message() << "layer " << layer << " page " << page);
      const quant::LayerFormat& format = formats[static_cast<std::size_t>(layer)];
      std::size_t needed = 0;
      ASSERT_EQ(kvplan_copy_page(runtime.get(), layer, 1, page, nullptr, 0, &needed), KVPLAN_OK);
      ASSERT_EQ(needed, format.block_bytes);
      std::vector<std::byte> found(needed), expected(needed);
      ASSERT_EQ(kvplan_copy_page(runtime.get(), layer, 1, page, found.data(), needed, nullptr),
                KVPLAN_OK)
          << kvplan_last_error();
      const std::int64_t first = bundle_.plan.sink_tokens + page * quant::kPageTokens;
      const std::size_t at = static_cast<std::size_t>(first) * row;
      const std::size_t count = quant::kPageTokens * row;
      pack(format.k, format.heads, Side::kKey, std::span(k).subspan(at, count), first, expected);
      pack(format.v, format.heads, Side::kValue, std::span(v).subspan(at, count), first, expected);
      EXPECT_EQ(found, expected);
    }
  }
}

TEST_F(CApi, SizesAreThoseOfTheSizeFunctions) {
  kvplan_device_info info;
  ASSERT_EQ(kvplan_query_device(0, &info), KVPLAN_OK);
  kvplan_size asked{}, allocated{};
  ASSERT_EQ(kvplan_size_of(path_.c_str(), &geometry_, info.multiprocessors, &asked), KVPLAN_OK)
      << kvplan_last_error();
  const Handle runtime = create();
  ASSERT_EQ(kvplan_runtime_size(runtime.get(), &allocated), KVPLAN_OK);
  EXPECT_EQ(std::memcmp(&asked, &allocated, sizeof asked), 0);
  EXPECT_EQ(allocated.total, allocated.pages + allocated.open + allocated.tables +
                                 allocated.statics + allocated.workspace);
  quant::CacheGeometry geometry;
  geometry.query_heads = geometry_.query_heads;
  geometry.max_sequences = kMaxSequences;
  geometry.max_tokens = kMaxTokens;
  geometry.max_query_tokens = geometry_.max_query_tokens;
  const quant::CacheSize expected = quant::cache_size(bundle_, geometry);
  EXPECT_EQ(allocated.pages, expected.pages);
  EXPECT_EQ(allocated.open, expected.open);
  EXPECT_EQ(allocated.tables, expected.tables);
  EXPECT_EQ(allocated.statics, expected.statics);

  kvplan_size fewer{};
  ASSERT_EQ(kvplan_size_of(path_.c_str(), &geometry_, 1, &fewer), KVPLAN_OK);
  EXPECT_LE(fewer.workspace, allocated.workspace);
  EXPECT_EQ(fewer.pages, allocated.pages);
}

TEST_F(CApi, ShapeLengthsAndBlocksAreTold) {
  const Handle runtime = create();
  kvplan_shape shape{};
  ASSERT_EQ(kvplan_runtime_shape(runtime.get(), &shape), KVPLAN_OK);
  EXPECT_EQ(shape.num_layers, 2);
  EXPECT_EQ(shape.kv_heads, 2);
  EXPECT_EQ(shape.query_heads, 6);
  EXPECT_EQ(shape.head_dim, 64);
  EXPECT_EQ(shape.sink_tokens, 4);
  EXPECT_EQ(shape.page_tokens, 64);
  std::int64_t blocks = 0, length = -1;
  ASSERT_EQ(kvplan_free_blocks(runtime.get(), &blocks), KVPLAN_OK);
  EXPECT_EQ(blocks, kMaxSequences * 3);
  fill(runtime.get(), 2, 132);
  ASSERT_EQ(kvplan_fork(runtime.get(), 2, 0, nullptr), KVPLAN_OK);
  ASSERT_EQ(kvplan_free_blocks(runtime.get(), &blocks), KVPLAN_OK);
  EXPECT_EQ(blocks, kMaxSequences * 3 - 2);
  ASSERT_EQ(kvplan_length(runtime.get(), 0, &length), KVPLAN_OK);
  EXPECT_EQ(length, 132);
  for (const int slot : {2, 0}) ASSERT_EQ(kvplan_release(runtime.get(), slot), KVPLAN_OK);
  ASSERT_EQ(kvplan_free_blocks(runtime.get(), &blocks), KVPLAN_OK);
  EXPECT_EQ(blocks, kMaxSequences * 3);
  ASSERT_EQ(kvplan_length(runtime.get(), 0, &length), KVPLAN_OK);
  EXPECT_EQ(length, 0);
}

TEST_F(CApi, ReadBackIsExactOutsidePages) {
  const Handle runtime = create();
  constexpr int kTokens = 80;
  const auto k = vectors(kTokens, kv_heads()), v = vectors(kTokens, kv_heads());
  ASSERT_EQ(begin(runtime.get(), {0}, {kTokens}), KVPLAN_OK);
  const Device on_k(k), on_v(v), out_k(k.size() * 2), out_v(v.size() * 2);
  ASSERT_EQ(kvplan_append(runtime.get(), 0, on_k, on_v, nullptr), KVPLAN_OK);
  ASSERT_EQ(kvplan_read_back(runtime.get(), 0, 0, 0, kTokens, out_k, out_v, nullptr), KVPLAN_OK)
      << kvplan_last_error();
  const auto found_k = out_k.values<std::uint16_t>(k.size());
  const auto found_v = out_v.values<std::uint16_t>(v.size());
  const std::size_t row = k.size() / kTokens;
  for (std::size_t i = 0; i < k.size(); ++i) {
    const bool in_page = i / row >= 4 && i / row < 68;
    if (in_page) continue;
    ASSERT_EQ(found_k[i], k[i]) << "position " << i / row;
    ASSERT_EQ(found_v[i], v[i]) << "position " << i / row;
  }
  // Another layer lacks the step's tokens still.
  EXPECT_EQ(kvplan_read_back(runtime.get(), 1, 0, 0, 1, out_k, nullptr, nullptr),
            KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("1 positions from 0 were asked of the 0"));
}

TEST_F(CApi, AttentionInHalvesIsTheRoundedAttentionOfOneToken) {
  // A single token attends to itself: its value comes out, its score is the log-sum-exp.
  const Handle runtime = create();
  const auto k = vectors(1, kv_heads()), v = vectors(1, kv_heads()), q = vectors(1, 6);
  ASSERT_EQ(begin(runtime.get(), {0}, {1}), KVPLAN_OK);
  const Device on_k(k), on_v(v), on_q(q), out(q.size() * 2), lse(6 * sizeof(float));
  ASSERT_EQ(kvplan_append(runtime.get(), 1, on_k, on_v, nullptr), KVPLAN_OK);
  const kvplan_attention options{0.5f, 0, 0};
  ASSERT_EQ(kvplan_attend(runtime.get(), 1, on_q, &options, out,
                          static_cast<float*>(static_cast<void*>(lse)), nullptr),
            KVPLAN_OK)
      << kvplan_last_error();
  const auto found = out.values<std::uint16_t>(q.size());
  const auto sums = lse.values<float>(6);
  for (std::size_t head = 0; head < 6; ++head) {
    double score = 0;
    for (std::size_t i = 0; i < 64; ++i) {
      EXPECT_NEAR(quant::from_half(found[head * 64 + i]), quant::from_half(v[head / 3 * 64 + i]),
                  4e-3);
      score += 0.5 * quant::from_half(q[head * 64 + i]) * quant::from_half(k[head / 3 * 64 + i]);
    }
    EXPECT_NEAR(sums[head], score, 5e-3);
  }
}

struct GeometryError {
  const char* name;
  void (*change)(kvplan_geometry&);
  const char* message;
};

class CApiGeometry : public CApi, public ::testing::WithParamInterface<GeometryError> {};

TEST_P(CApiGeometry, IsRefused) {
  GetParam().change(geometry_);
  kvplan_runtime* runtime = nullptr;
  EXPECT_EQ(kvplan_create(path_.c_str(), &geometry_, &runtime), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr(GetParam().message));
  EXPECT_EQ(runtime, nullptr);
}

INSTANTIATE_TEST_SUITE_P(
    Limits, CApiGeometry,
    ::testing::Values(
        GeometryError{"QueryHeads", [](kvplan_geometry& g) { g.query_heads = 7; }, "query_heads"},
        GeometryError{"NoQueryHeads", [](kvplan_geometry& g) { g.query_heads = 0; }, "query_heads"},
        GeometryError{"Group", [](kvplan_geometry& g) { g.query_heads = 34; }, "at most 16 times"},
        GeometryError{"Sequences", [](kvplan_geometry& g) { g.max_sequences = 0; },
                      "max_sequences"},
        GeometryError{"Tokens", [](kvplan_geometry& g) { g.max_tokens = 0; }, "max_tokens"},
        GeometryError{"TooManyTokens", [](kvplan_geometry& g) { g.max_tokens = INT64_MAX; },
                      "max_tokens"},
        GeometryError{"Blocks", [](kvplan_geometry& g) { g.blocks = -1; }, "blocks"},
        GeometryError{"QueryTokens", [](kvplan_geometry& g) { g.max_query_tokens = 5; },
                      "max_query_tokens"},
        GeometryError{"Device", [](kvplan_geometry& g) { g.device = 99; }, "device 99"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_F(CApi, RefusesPlansThatItCannotReadOrHold) {
  kvplan_runtime* runtime = nullptr;
  const std::string nowhere = folder_.path() / "nowhere";
  EXPECT_EQ(kvplan_create(nowhere.c_str(), &geometry_, &runtime), KVPLAN_BAD_PLAN);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("nowhere"));

  std::filesystem::create_directory(nowhere);
  std::ofstream(nowhere + "/plan.json") << "{\"format\":";
  EXPECT_EQ(kvplan_create(nowhere.c_str(), &geometry_, &runtime), KVPLAN_BAD_PLAN);

  const std::string blocks = folder_.path() / "q4_0";
  write_plan(baseline("q4_0", bundle_.plan.model), blocks);
  EXPECT_EQ(kvplan_create(blocks.c_str(), &geometry_, &runtime), KVPLAN_BAD_PLAN);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("/codec"));
  EXPECT_EQ(runtime, nullptr);
}

TEST_F(CApi, RefusesWrongStepsAndChangesNothing) {
  const Handle runtime = create();
  fill(runtime.get(), 0, 100);
  EXPECT_EQ(begin(runtime.get(), {0, 0}, {1, 1}), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("named twice"));
  EXPECT_EQ(begin(runtime.get(), {3}, {1}), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("slots 0..2"));
  EXPECT_EQ(begin(runtime.get(), {-1}, {1}), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(begin(runtime.get(), {1}, {0}), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(begin(runtime.get(), {}, {}), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(begin(runtime.get(), {1, 0}, {5, 101}), KVPLAN_TOO_LONG);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("at most 200"));
  std::int64_t length = 0;
  for (const auto& [slot, expected] : {std::pair{0, 100}, {1, 0}}) {
    ASSERT_EQ(kvplan_length(runtime.get(), slot, &length), KVPLAN_OK);
    EXPECT_EQ(length, expected);
  }
  EXPECT_EQ(kvplan_begin_step(runtime.get(), 1, nullptr, nullptr, nullptr), KVPLAN_BAD_ARGUMENT);
}

TEST_F(CApi, TellsWhenThePoolIsEmpty) {
  geometry_.blocks = 2;
  const Handle runtime = create();
  fill(runtime.get(), 0, 140);
  EXPECT_EQ(begin(runtime.get(), {1}, {68}), KVPLAN_OUT_OF_BLOCKS);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("release a sequence"));
  ASSERT_EQ(kvplan_release(runtime.get(), 0), KVPLAN_OK);
  fill(runtime.get(), 1, 68);
}

TEST_F(CApi, CallsOutOfOrderAreRefused) {
  const Handle runtime = create();
  const Device x(std::vector<std::uint16_t>(64 * 6 * 8)), lse(1024);
  float* const sums = static_cast<float*>(static_cast<void*>(lse));
  const auto append = [&](int layer) { return kvplan_append(runtime.get(), layer, x, x, nullptr); };
  const auto attend = [&](int layer) {
    return kvplan_attend(runtime.get(), layer, x, nullptr, x, sums, nullptr);
  };
  EXPECT_EQ(append(0), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("begin one first"));
  ASSERT_EQ(begin(runtime.get(), {0}, {1}), KVPLAN_OK);
  EXPECT_EQ(attend(0), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("append to it before attention"));
  EXPECT_EQ(append(2), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(append(-1), KVPLAN_BAD_ARGUMENT);
  ASSERT_EQ(append(0), KVPLAN_OK);
  EXPECT_EQ(append(0), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("already"));
  ASSERT_EQ(attend(0), KVPLAN_OK) << kvplan_last_error();
  EXPECT_EQ(attend(1), KVPLAN_BAD_ARGUMENT);
  // Layer 1 lacks the step.
  EXPECT_EQ(begin(runtime.get(), {1}, {1}), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("layer 1 lacks"));
  EXPECT_EQ(kvplan_fork(runtime.get(), 0, 1, nullptr), KVPLAN_BAD_ARGUMENT);
  ASSERT_EQ(append(1), KVPLAN_OK);
  // More tokens than attention was asked for at create.
  ASSERT_EQ(begin(runtime.get(), {0, 1}, {1, 3}), KVPLAN_OK);
  ASSERT_EQ(append(0), KVPLAN_OK);
  EXPECT_EQ(attend(0), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("at most 2"));
  // Releasing a slot of the step ends it.
  ASSERT_EQ(kvplan_release(runtime.get(), 1), KVPLAN_OK);
  EXPECT_EQ(append(1), KVPLAN_BAD_ARGUMENT);
}

TEST_F(CApi, PointersAndOptionsAreChecked) {
  const Handle runtime = create();
  const Device x(std::vector<std::uint16_t>(64 * 6 + 16));
  auto* const odd = static_cast<std::uint16_t*>(static_cast<void*>(x)) + 1;
  ASSERT_EQ(begin(runtime.get(), {0}, {1}), KVPLAN_OK);
  EXPECT_EQ(kvplan_append(runtime.get(), 0, nullptr, x, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_append(runtime.get(), 0, x, odd, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("v must be aligned to 16"));
  ASSERT_EQ(kvplan_append(runtime.get(), 0, x, x, nullptr), KVPLAN_OK);
  const auto attend = [&](const void* q, void* out, const kvplan_attention* options) {
    return kvplan_attend(runtime.get(), 0, q, options, out, nullptr, nullptr);
  };
  EXPECT_EQ(attend(nullptr, x, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(attend(x, nullptr, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(attend(odd, x, nullptr), KVPLAN_BAD_ARGUMENT);
  for (const kvplan_attention& options :
       {kvplan_attention{NAN, 0, 0}, kvplan_attention{0, -1, 0}, kvplan_attention{0, 0, -1}})
    EXPECT_EQ(attend(x, x, &options), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(attend(x, x, nullptr), KVPLAN_OK) << kvplan_last_error();
}

TEST_F(CApi, ForksAndCopiesThatCannotBeAreRefused) {
  const Handle runtime = create();
  fill(runtime.get(), 0, 70);
  fill(runtime.get(), 1, 1);
  for (const auto& [from, to] : {std::pair{0, 1}, {2, 0}, {2, 1}, {0, 0}, {0, 3}, {-1, 2}})
    EXPECT_EQ(kvplan_fork(runtime.get(), from, to, nullptr), KVPLAN_BAD_ARGUMENT)
        << from << " to " << to;
  std::vector<std::byte> page(1 << 16);
  const auto copy = [&](int layer, int slot, std::int64_t index, std::size_t capacity) {
    return kvplan_copy_page(runtime.get(), layer, slot, index, page.data(), capacity, nullptr);
  };
  EXPECT_EQ(copy(0, 0, 0, page.size()), KVPLAN_OK);
  EXPECT_EQ(copy(0, 0, 1, page.size()), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(copy(0, 0, -1, page.size()), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(copy(0, 1, 0, page.size()), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(copy(2, 0, 0, page.size()), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(copy(0, 0, 0, 16), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_read_back(runtime.get(), 0, 0, 60, 11, nullptr, nullptr, nullptr),
            KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_read_back(runtime.get(), 0, 0, -1, 1, nullptr, nullptr, nullptr),
            KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_release(runtime.get(), 3), KVPLAN_BAD_ARGUMENT);
}

TEST(CApiWithoutDevice, NullArgumentsAreRefusedByName) {
  kvplan_geometry geometry{};
  kvplan_size size;
  kvplan_runtime* runtime = nullptr;
  EXPECT_EQ(kvplan_create(nullptr, &geometry, &runtime), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("plan_path"));
  EXPECT_EQ(kvplan_create("x", nullptr, &runtime), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_create("x", &geometry, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_size_of("x", &geometry, 1, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_size_of("x", &geometry, -1, &size), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_release(nullptr, 0), KVPLAN_BAD_ARGUMENT);
  EXPECT_EQ(kvplan_begin_step(nullptr, 0, nullptr, nullptr, nullptr), KVPLAN_BAD_ARGUMENT);
  EXPECT_THAT(kvplan_last_error(), HasSubstr("runtime must not be null"));
  kvplan_destroy(nullptr);
}

TEST(CApiWithoutDevice, SizesNeedNoGpu) {
  const TemporaryFolder folder;
  const PlanBundle bundle = plan();
  write_plan(bundle, folder.path() / "plan");
  kvplan_geometry geometry = geometry_of(bundle.plan.model);
  kvplan_size size{};
  ASSERT_EQ(kvplan_size_of((folder.path() / "plan").c_str(), &geometry, 132, &size), KVPLAN_OK)
      << kvplan_last_error();
  const auto formats = quant::page_format(bundle);
  EXPECT_EQ(size.block_bytes, formats[0].block_bytes + formats[1].block_bytes);
  EXPECT_GE(size.pages, 9 * size.block_bytes);
  EXPECT_LT(size.pages, 9 * size.block_bytes + 2 * quant::kBufferAlignment);
}

}  // namespace
}  // namespace kvplan::kernels
