#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>

#include "models/families.h"
#include "models/model.h"
#include "schemas/error.h"
#include "tests/models/fixtures.h"
#include "tests/schemas/gguf_builder.h"
#include "tests/temporary_folder.h"

namespace kvplan::models {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr int kHidden = 8;  // two query heads of four channels, one key/value head

std::string floats(std::size_t count, const std::function<float(std::size_t)>& value) {
  GgufBytes out;
  for (std::size_t i = 0; i < count; ++i) out.raw(value(i));
  return out.bytes();
}

/// One llama layer; every weight of a matrix is the number of its row.
GgufBuilder small_llama() {
  GgufBuilder b;
  b.set("general.architecture", GgufBuilder::text("llama"));
  b.set("llama.block_count", GgufBuilder::u32(1));
  b.set("llama.context_length", GgufBuilder::u32(64));
  b.set("llama.embedding_length", GgufBuilder::u32(kHidden));
  b.set("llama.feed_forward_length", GgufBuilder::u32(8));
  b.set("llama.attention.head_count", GgufBuilder::u32(2));
  b.set("llama.attention.head_count_kv", GgufBuilder::u32(1));
  b.set("llama.attention.layer_norm_rms_epsilon", GgufBuilder::f32(1e-5f));
  const auto add = [&](const char* name, std::uint64_t rows) {
    b.tensors.push_back(
        {.name = name, .dimensions = {kHidden, rows}, .data = floats(kHidden * rows, [](auto i) {
                                                        return static_cast<float>(i / kHidden);
                                                      })});
  };
  const auto add_norm = [&](const char* name) {
    b.tensors.push_back({.name = name, .dimensions = {kHidden}, .data = floats(kHidden, [](auto) {
                                                                  return 1.0f;
                                                                })});
  };
  add("token_embd.weight", 5);
  add_norm("output_norm.weight");
  add_norm("blk.0.attn_norm.weight");
  add("blk.0.attn_q.weight", 8);
  add("blk.0.attn_k.weight", 4);
  add("blk.0.attn_v.weight", 4);
  add("blk.0.attn_output.weight", 8);
  add_norm("blk.0.ffn_norm.weight");
  for (const char* part : {"gate", "up", "down"}) {
    add(("blk.0.ffn_" + std::string(part) + ".weight").c_str(), 8);
  }
  return b;
}

GgufBuilder::Tensor& tensor(GgufBuilder& b, std::string_view name) {
  return *std::ranges::find(b.tensors, name, &GgufBuilder::Tensor::name);
}

class GgufModel : public testing::Test {
 protected:
  std::unique_ptr<ModelReader> open(const std::string& bytes) const {
    std::ofstream(file_, std::ios::binary) << bytes;
    return open_model(file_);
  }

  TemporaryFolder folder_;
  std::filesystem::path file_ = folder_.path() / "model.gguf";
};

TEST_F(GgufModel, DefaultsOfLlamaCppAreTaken) {
  const auto model = open(small_llama().bytes());
  const auto& c = model->config();
  EXPECT_EQ(c.vocab_size, 5);
  EXPECT_EQ(c.head_dim, 4);
  EXPECT_EQ(c.rotary_dim, 4);
  EXPECT_EQ(c.rope, RopeSpec{});
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_FALSE(c.qkv_bias || c.output_bias);
}

TEST_F(GgufModel, RowsOfQueriesAndKeysBecomeHalfSplit) {
  const auto model = open(small_llama().bytes());
  const auto rows = [&](const char* name) {
    const auto values = read_all(*model, name);
    std::vector<float> first;
    for (std::size_t i = 0; i < values.size(); i += kHidden) first.push_back(values[i]);
    return first;
  };
  EXPECT_THAT(rows("blk.0.attn_q.weight"), ElementsAre(0, 2, 1, 3, 4, 6, 5, 7));
  EXPECT_THAT(rows("blk.0.attn_k.weight"), ElementsAre(0, 2, 1, 3));
  EXPECT_THAT(rows("blk.0.attn_v.weight"), ElementsAre(0, 1, 2, 3));
}

TEST_F(GgufModel, RotaryFactorsMustBeThoseOfLlama3) {
  auto b = small_llama();
  b.tensors.push_back({.name = "rope_freqs.weight",
                       .dimensions = {2},
                       .data = floats(2, [](auto i) { return i ? 32.0f : 1.0f; })});
  // Pair 1 turns once in 4443 of 8192 tokens, where the factor lies between 1 and 32.
  b.set("llama.rope.freq_base", GgufBuilder::f32(500000));
  EXPECT_THAT(
      [&] { open(b.bytes()); },
      ThrowsMessage<InputError>(HasSubstr("the rotary factors are not those of Llama 3 scaling")));
  // Pair 1 turns once in 62832 tokens.
  b.set("llama.rope.freq_base", GgufBuilder::f32(1e8f));
  const auto scaling = open(b.bytes())->config().rope.scaling;
  ASSERT_TRUE(scaling);
  EXPECT_EQ(scaling->type, "llama3");
  EXPECT_EQ(scaling->factor, 32);
  EXPECT_EQ(scaling->original_context, 8192);
}

TEST_F(GgufModel, NonFiniteWeightsNameTensorAndElement) {
  auto b = small_llama();
  const float inf = std::numeric_limits<float>::infinity();
  tensor(b, "blk.0.attn_k.weight").data = floats(32, [&](auto i) { return i == 19 ? -inf : 0.0f; });
  tensor(b, "output_norm.weight").data =
      floats(8, [&](auto i) { return i == 3 ? std::nanf("") : 0.0f; });
  const auto model = open(b.bytes());
  EXPECT_THAT([&] { read_all(*model, "blk.0.attn_k.weight"); },
              ThrowsMessage<InputError>(
                  HasSubstr("[blk.0.attn_k.weight]: expected finite weights, found -inf at "
                            "element 19 of [4, 8]")));
  EXPECT_THAT([&] { read_all(*model, "output_norm.weight"); },
              ThrowsMessage<InputError>(HasSubstr("element 3 of [8]")));
  EXPECT_NO_THROW(read_all(*model, "token_embd.weight"));
}

TEST_F(GgufModel, ReadChecksNameAndSize) {
  const auto model = open(small_llama().bytes());
  std::vector<float> values(7);
  EXPECT_THROW(model->read("output_norm.weight", values), ArgumentError);
  EXPECT_THROW(model->read("blk.1.attn_norm.weight", values), InputError);
}

struct RefusedFile {
  const char* name;
  std::function<void(GgufBuilder&)> change;
  const char* message;
};
void PrintTo(const RefusedFile& row, std::ostream* out) { *out << row.name; }

class RefusedGguf : public GgufModel, public testing::WithParamInterface<RefusedFile> {};

TEST_P(RefusedGguf, NamesKeyOrTensorAndReason) {
  auto b = small_llama();
  GetParam().change(b);
  EXPECT_THAT([&] { open(b.bytes()); }, ThrowsMessage<InputError>(HasSubstr(GetParam().message)));
}

template <class Value>
auto setting(const char* key, Value value) {
  return [=](GgufBuilder& b) {
    if constexpr (std::is_same_v<Value, bool>) {
      b.set(key, GgufBuilder::boolean(value));
    } else if constexpr (std::is_same_v<Value, int>) {
      b.set(key, GgufBuilder::i32(value));
    } else if constexpr (std::is_same_v<Value, float>) {
      b.set(key, GgufBuilder::f32(value));
    } else {
      b.set(key, GgufBuilder::text(value));
    }
  };
}

void add_query_norm(GgufBuilder& b) {
  auto extra = tensor(b, "output_norm.weight");
  extra.name = "blk.0.attn_q_norm.weight";
  b.tensors.push_back(extra);
}

void add_block_bias(GgufBuilder& b) {
  b.tensors.push_back(
      {.name = "blk.0.attn_q.bias", .dimensions = {32}, .type = 8, .data = std::string(34, 0)});
}

void add_rope_factors(GgufBuilder& b) {
  b.tensors.push_back({.name = "rope_freqs.weight", .dimensions = {3}, .data = std::string(12, 0)});
}

const RefusedFile kRefusedFiles[] = {
    {"architecture", setting("general.architecture", "rwkv"), "supported are llama, qwen2"},
    {"other_prefix", setting("general.architecture", "qwen2"),
     "[qwen2.block_count]: expected an integer, found no such"},
    {"experts", setting("llama.expert_count", 8), "[llama.expert_count]: only 0"},
    {"sliding_window", setting("llama.attention.sliding_window", 512), "sliding_window]: only 0"},
    {"not_causal", setting("llama.attention.causal", false), "attention.causal]: only true"},
    {"rope_type", setting("llama.rope.scaling.type", "dynamic"), "\"dynamic\" is not supported"},
    {"yarn_extrapolation",
     [](auto& b) {
       setting("llama.rope.scaling.type", "yarn")(b);
       setting("llama.rope.scaling.yarn_ext_factor", 0.5f)(b);
     },
     "yarn_ext_factor]: only 1"},
    {"longrope", setting("llama.rope.scaling.type", "longrope"),
     "original_context_length]: expected an integer, found no such"},
    {"longrope_factors",
     [](auto& b) {
       setting("llama.rope.scaling.type", "longrope")(b);
       setting("llama.rope.scaling.original_context_length", 32)(b);
     },
     "[rope_factors_short.weight]: expected the rotary factors of longrope, found none"},
    {"unknown_key", setting("llama.attention.temperature_length", 4),
     "[llama.attention.temperature_length]: kvplan does not know this key"},
    {"rope_factor", setting("llama.rope.scaling.factor", -1.0f), "expected a factor above 0"},
    {"rope_attention", setting("llama.rope.scaling.attn_factor", 2.0f), "attn_factor]: only 1"},
    {"partial_rotary", setting("llama.rope.dimension_count", 2),
     "expected rotary embedding of all 4 channels of a head, found 2"},
    {"zero_heads", setting("llama.attention.head_count", 0), "expected 1 to"},
    {"indivisible", setting("llama.attention.head_count", 3), "is no multiple of the 3 heads"},
    {"kv_heads", setting("llama.attention.head_count_kv", 3), "must be a multiple of"},
    {"negative_layers", setting("llama.block_count", -1),
     "[llama.block_count]: expected 1 to 4096, found -1"},
    {"layers_text", setting("llama.block_count", "1"), "expected an integer, found a string"},
    {"value_length", setting("llama.attention.value_length", 8), "different sizes"},
    {"key_length",
     [](auto& b) {
       for (const char* name : {"key_length", "value_length"}) {
         b.set("llama.attention." + std::string(name), GgufBuilder::i32(6));
       }
     },
     "[blk.0.attn_q.weight]: expected the shape [12, 8], found [8, 8]"},
    {"epsilon", setting("llama.attention.layer_norm_rms_epsilon", std::nanf("")),
     "must be above 0"},
    {"tensor_type", [](auto& b) { tensor(b, "blk.0.ffn_up.weight").type = 16; },
     "[blk.0.ffn_up.weight]: the ggml tensor type 16 is not supported"},
    {"shape", [](auto& b) { tensor(b, "blk.0.attn_v.weight").dimensions = {4, 8}; },
     "[blk.0.attn_v.weight]: expected the shape [4, 8], found [8, 4]"},
    {"missing", [](auto& b) { b.tensors.pop_back(); },
     "[blk.0.ffn_down.weight]: expected a tensor of shape [8, 8], found none"},
    {"query_norm", add_query_norm,
     "[blk.0.attn_q_norm.weight]: a llama model of 1 layers has no place for this tensor"},
    {"block_bias", add_block_bias, "[blk.0.attn_q.bias]: expected a bias in F32, F16 or BF16"},
    {"no_embedding", [](auto& b) { b.tensors.erase(b.tensors.begin()); },
     "[token_embd.weight]: expected a matrix"},
    {"rope_factors", add_rope_factors, "expected 2 rotary factors"},
};

INSTANTIATE_TEST_SUITE_P(Files, RefusedGguf, testing::ValuesIn(kRefusedFiles),
                         [](const auto& row) { return row.param.name; });

TEST_F(GgufModel, SurvivesEveryFlippedHeaderBit) {
  const auto builder = small_llama();
  const auto bytes = builder.bytes();
  open(bytes);
  std::fstream file(file_, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](std::size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  const auto header_bits = builder.header().size() * 8;
  std::size_t refused = 0;
  for (std::size_t bit = 0; bit < header_bits; ++bit) {
    const auto at = bit / 8;
    put(at, static_cast<char>(bytes[at] ^ 1 << bit % 8));
    try {
      const auto model = open_model(file_);
      for (const auto& [name, shape] : expected_tensors(model->config())) read_all(*model, name);
    } catch (const InputError&) {
      ++refused;
    }
    put(at, bytes[at]);
  }
  EXPECT_GT(refused, header_bits / 2);
}

}  // namespace
}  // namespace kvplan::models
