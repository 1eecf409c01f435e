#include "schemas/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <type_traits>

#include "schemas/error.h"
#include "tests/schemas/gguf_builder.h"
#include "tests/temporary_folder.h"

namespace kvplan {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

class GgufTest : public testing::Test {
 protected:
  GgufFile open(const std::string& bytes) const {
    std::ofstream(file_, std::ios::binary) << bytes;
    return GgufFile(file_);
  }

  TemporaryFolder folder_;
  std::filesystem::path file_ = folder_.path() / "test.gguf";
};

template <class T>
std::string scalar(std::uint32_t type, T value) {
  return GgufBytes().raw(type).raw(value).bytes();
}

template <class T>
std::string array(std::uint32_t type, const std::vector<T>& values, std::int64_t extra_count = 0) {
  GgufBytes out;
  out.raw(std::uint32_t{9}).raw(type).raw(static_cast<std::int64_t>(values.size()) + extra_count);
  for (const auto& v : values) {
    if constexpr (std::is_same_v<T, std::string>) {
      out.text(v);
    } else {
      out.raw(v);
    }
  }
  return out.bytes();
}

/// Two tensors, one of them in blocks, and a little metadata.
GgufBuilder small_file() {
  GgufBuilder b;
  b.set("name", GgufBuilder::text("tiny"));
  b.set("layers", GgufBuilder::u32(3));
  b.set("tokens", array<std::string>(8, {"a", "bc"}));
  b.tensors.push_back(
      {.name = "first", .dimensions = {2, 3}, .type = 0, .data = std::string(24, '\1')});
  b.tensors.push_back(
      {.name = "second", .dimensions = {64, 2}, .type = 8, .data = std::string(4 * 34, '\2')});
  return b;
}

TEST_F(GgufTest, ReadsEveryMetadataType) {
  GgufBuilder b;
  b.set("u8", scalar<std::uint8_t>(0, 200));
  b.set("i8", scalar<std::int8_t>(1, -100));
  b.set("u16", scalar<std::uint16_t>(2, 60000));
  b.set("i16", scalar<std::int16_t>(3, -30000));
  b.set("u32", scalar<std::uint32_t>(4, 4000000000));
  b.set("i32", scalar<std::int32_t>(5, -2000000000));
  b.set("f32", GgufBuilder::f32(0.5f));
  b.set("bool", GgufBuilder::boolean(1));
  b.set("text", GgufBuilder::text("h\xc3\xa9"));
  b.set("u64", scalar<std::uint64_t>(10, std::uint64_t{1} << 40));
  b.set("huge", scalar<std::uint64_t>(10, std::uint64_t{1} << 63));
  b.set("i64", scalar<std::int64_t>(11, std::numeric_limits<std::int64_t>::min()));
  b.set("f64", scalar<double>(12, 0.1));
  b.set("integers", array<std::int16_t>(3, {-1, 2}));
  b.set("numbers", array<float>(6, {1.5f}));
  b.set("flags", array<std::uint8_t>(7, {1, 0}));
  b.set("texts", array<std::string>(8, {"", "x"}));
  const auto gguf = open(b.bytes());

  EXPECT_EQ(gguf.integer("u8"), 200);
  EXPECT_EQ(gguf.integer("i8"), -100);
  EXPECT_EQ(gguf.integer("u16"), 60000);
  EXPECT_EQ(gguf.integer("i16"), -30000);
  EXPECT_EQ(gguf.integer("u32"), 4000000000);
  EXPECT_EQ(gguf.integer("i32"), -2000000000);
  EXPECT_EQ(gguf.number("f32"), 0.5);
  EXPECT_TRUE(gguf.boolean_or("bool", false));
  EXPECT_EQ(gguf.string("text"), "h\xc3\xa9");
  EXPECT_EQ(gguf.integer("u64"), std::int64_t{1} << 40);
  EXPECT_EQ(std::get<std::uint64_t>(gguf.metadata().at("huge")), std::uint64_t{1} << 63);
  EXPECT_EQ(gguf.integer("i64"), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(gguf.number("f64"), 0.1);
  EXPECT_EQ(gguf.number("u8"), 200.0);
  EXPECT_THAT(gguf.integers("integers"), ElementsAre(-1, 2));
  EXPECT_THAT(gguf.numbers("numbers"), ElementsAre(1.5));
  EXPECT_THAT(gguf.integers("flags"), ElementsAre(1, 0));
  EXPECT_THAT(gguf.strings("texts"), ElementsAre("", "x"));
}

TEST_F(GgufTest, LookUpsNameKeyExpectedAndFoundType) {
  const auto gguf = open(small_file().bytes());
  EXPECT_EQ(gguf.integer_or("absent", 7), 7);
  EXPECT_EQ(gguf.number_or("absent", 0.25), 0.25);
  EXPECT_EQ(gguf.string_or("absent", "default"), "default");
  EXPECT_TRUE(gguf.boolean_or("absent", true));
  EXPECT_THAT([&] { gguf.integer("absent"); },
              ThrowsMessage<InputError>(
                  HasSubstr("[absent]: expected an integer, found no such metadata key")));
  EXPECT_THAT([&] { gguf.integer("name"); },
              ThrowsMessage<InputError>(HasSubstr("[name]: expected an integer, found a string")));
  EXPECT_THAT([&] { gguf.number_or("tokens", 0); },
              ThrowsMessage<InputError>(HasSubstr("expected a number, found an array of strings")));
  EXPECT_THAT([&] { gguf.boolean_or("layers", true); },
              ThrowsMessage<InputError>(HasSubstr("expected a boolean, found an integer")));
}

TEST_F(GgufTest, TensorsLieWhereTheHeaderSays) {
  const auto gguf = open(small_file().bytes());
  ASSERT_EQ(gguf.tensors().size(), 2u);
  const auto& first = gguf.tensors().at("first");
  const auto& second = gguf.tensors().at("second");
  EXPECT_THAT(first.shape, ElementsAre(3, 2));
  EXPECT_EQ(first.data.size(), 24u);
  EXPECT_EQ(first.data.back(), std::byte{1});
  EXPECT_THAT(second.shape, ElementsAre(2, 64));
  EXPECT_EQ(second.data.size(), 4u * 34);
  EXPECT_EQ(second.data.front(), std::byte{2});
}

TEST_F(GgufTest, KeepsTensorsOfUnknownTypesWithoutData) {
  auto b = small_file();
  b.tensors[1].type = 16;
  const auto gguf = open(b.bytes());
  EXPECT_EQ(gguf.tensors().at("second").type, 16u);
  EXPECT_TRUE(gguf.tensors().at("second").data.empty());
}

struct Broken {
  const char* name;
  std::function<void(GgufBuilder&)> change;
  const char* message;
};

void PrintTo(const Broken& row, std::ostream* out) { *out << row.name; }

class BrokenGguf : public GgufTest, public testing::WithParamInterface<Broken> {};

TEST_P(BrokenGguf, IsRefused) {
  auto b = small_file();
  GetParam().change(b);
  EXPECT_THAT([&] { open(b.bytes()); }, ThrowsMessage<InputError>(HasSubstr(GetParam().message)));
}

constexpr std::int64_t kHuge = std::int64_t{1} << 60;

INSTANTIATE_TEST_SUITE_P(
    Files, BrokenGguf,
    testing::Values(
        Broken{"version", [](auto& b) { b.version = 2; }, "expected GGUF version 3"},
        Broken{"big_endian", [](auto& b) { b.version = 3u << 24; }, "expected GGUF version 3"},
        Broken{"tensor_count", [](auto& b) { b.extra_tensors = kHuge; },
               "[tensor count]: a count of"},
        Broken{"metadata_count", [](auto& b) { b.extra_metadata = kHuge; },
               "[metadata count]: a count of"},
        Broken{"array_count", [](auto& b) { b.set("a", array<std::uint8_t>(0, {1}, kHuge)); },
               "[a]: a count of"},
        Broken{"string_array_count",
               [](auto& b) { b.set("a", array<std::string>(8, {"x"}, kHuge)); }, "cannot fit"},
        Broken{"negative_count", [](auto& b) { b.set("a", array<std::uint8_t>(0, {1}, -2)); },
               "cannot fit"},
        Broken{"string_length",
               [](auto& b) { b.set("a", GgufBytes().raw(std::uint32_t{8}).raw(kHuge).bytes()); },
               "the file ends early"},
        Broken{"nested_array", [](auto& b) { b.set("a", array<std::uint32_t>(9, {0, 0, 0})); },
               "arrays of arrays"},
        Broken{"value_type", [](auto& b) { b.set("a", scalar<std::uint64_t>(13, 0)); },
               "unknown value type 13"},
        Broken{"element_type", [](auto& b) { b.set("a", array<std::uint8_t>(77, {1})); },
               "unknown array element type 77"},
        Broken{"boolean", [](auto& b) { b.set("a", GgufBuilder::boolean(2)); },
               "expected a boolean 0 or 1"},
        Broken{"integer_range",
               [](auto& b) { b.set("a", array<std::uint64_t>(10, {~std::uint64_t{0}})); },
               "is too large"},
        Broken{"empty_key", [](auto& b) { b.set("", GgufBuilder::u32(1)); },
               "expected a name of 1 to"},
        Broken{"control_characters", [](auto& b) { b.set("a\x1b[2J", GgufBuilder::u32(1)); },
               "control characters"},
        Broken{"key_twice", [](auto& b) { b.metadata.push_back(b.metadata[0]); }, "appears twice"},
        Broken{"tensor_twice", [](auto& b) { b.tensors[1].name = "first"; }, "appears twice"},
        Broken{"no_dimension", [](auto& b) { b.tensors[0].dimensions = {}; },
               "expected 1 to 4 dimensions"},
        Broken{"many_dimensions", [](auto& b) { b.tensors[0].dimensions = {1, 1, 1, 1, 1}; },
               "expected 1 to 4 dimensions"},
        Broken{"zero_dimension", [](auto& b) { b.tensors[0].dimensions = {0, 4}; },
               "a dimension is zero"},
        Broken{"negative_dimension", [](auto& b) { b.tensors[0].dimensions = {~std::uint64_t{0}}; },
               "a dimension is zero"},
        Broken{"element_overflow",
               [](auto& b) { b.tensors[0].dimensions = {1ull << 40, 1ull << 40}; },
               "product overflows"},
        Broken{"byte_overflow", [](auto& b) { b.tensors[0].dimensions = {1ull << 62}; },
               "size overflows"},
        Broken{"partial_block", [](auto& b) { b.tensors[1].dimensions = {48, 2}; },
               "no multiple of the Q8_0 block of 32"},
        Broken{"beyond_the_end", [](auto& b) { b.tensors[1].dimensions = {64, 3}; },
               "is the file complete?"},
        Broken{"offset_beyond_the_end", [](auto& b) { b.tensors[1].move = kHuge; },
               "is the file complete?"},
        Broken{"misaligned", [](auto& b) { b.tensors[1].move = 4; },
               "no multiple of the alignment 32"},
        Broken{"overlap", [](auto& b) { b.tensors[1].move = -32; }, "overlap those of first"},
        Broken{"alignment_zero", [](auto& b) { b.set("general.alignment", GgufBuilder::u32(0)); },
               "expected a power of two"},
        Broken{"alignment_odd", [](auto& b) { b.set("general.alignment", GgufBuilder::u32(48)); },
               "expected a power of two"},
        Broken{"alignment_huge",
               [](auto& b) { b.set("general.alignment", GgufBuilder::u32(1u << 31)); },
               "expected a power of two"},
        Broken{"alignment_text",
               [](auto& b) { b.set("general.alignment", GgufBuilder::text("32")); },
               "expected an integer, found a string"}),
    [](const auto& row) { return row.param.name; });

TEST_F(GgufTest, RefusesOtherFiles) {
  EXPECT_THROW(open(""), InputError);
  EXPECT_THAT([&] { open("PK\3\4 no model"); },
              ThrowsMessage<InputError>(HasSubstr("expected a GGUF file")));
  EXPECT_THROW(GgufFile(folder_.path() / "absent.gguf"), InputError);
}

TEST_F(GgufTest, RefusesEveryTruncation) {
  const auto bytes = small_file().bytes();
  open(bytes);
  for (auto size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(file_, size);
    EXPECT_THROW(GgufFile{file_}, InputError) << size << " of " << bytes.size() << " bytes";
  }
}

TEST_F(GgufTest, SurvivesEveryFlippedHeaderBit) {
  const auto builder = small_file();
  const auto bytes = builder.bytes();
  const auto header_bits = builder.header().size() * 8;
  open(bytes);
  std::fstream file(file_, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](std::size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  std::size_t refused = 0;
  for (std::size_t bit = 0; bit < header_bits; ++bit) {
    const auto at = bit / 8;
    put(at, static_cast<char>(bytes[at] ^ 1 << bit % 8));
    try {
      const GgufFile gguf(file_);
      const auto whole = gguf.file().bytes();
      for (const auto& [name, tensor] : gguf.tensors()) {
        EXPECT_GE(tensor.data.data(), whole.data());
        EXPECT_LE(tensor.data.data() + tensor.data.size(), whole.data() + whole.size());
      }
    } catch (const InputError&) {
      ++refused;
    }
    put(at, bytes[at]);
  }
  EXPECT_GT(refused, header_bits / 2);  // most bits are lengths, counts, types or the magic
}

}  // namespace
}  // namespace kvplan
