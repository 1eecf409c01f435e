#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstring>
#include <random>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/mapped_file.h"
#include "schemas/safetensors.h"
#include "schemas/sha256.h"
#include "schemas/sha256_blocks.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

using test::read_bytes;
using test::refused;
using test::TemporaryFolder;
using test::write_bytes;
using testing::ElementsAre;
using testing::HasSubstr;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

/// Number of entries, to see that nothing was left behind.
std::ptrdiff_t entries_in(const std::filesystem::path& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), {});
}

// NIST, "Secure Hash Standard Validation System" examples and FIPS 180-4 sample messages.
struct HashCase {
  const char* name;
  std::string message;
  const char* digest;
};

class Sha256Vectors : public testing::TestWithParam<HashCase> {};

TEST_P(Sha256Vectors, MatchWholeAndInPieces) {
  const std::string& message = GetParam().message;
  EXPECT_EQ(sha256(message), GetParam().digest);
  Sha256 portable(sha256_blocks_portable);
  portable.update(bytes_of(message));
  EXPECT_EQ(portable.finish(), GetParam().digest);
  for (const std::size_t piece : {1u, 7u, 63u, 64u, 65u}) {
    Sha256 hash;
    for (std::size_t i = 0; i < message.size(); i += piece)
      hash.update(bytes_of(std::string_view(message).substr(i, piece)));
    EXPECT_EQ(hash.finish(), GetParam().digest) << "in pieces of " << piece;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Nist, Sha256Vectors,
    testing::Values(
        HashCase{"empty", "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        HashCase{"abc", "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        HashCase{"two_blocks", "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
                 "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        HashCase{"long",
                 "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqk"
                 "lmnopqrlmnopqrs"
                 "mnopqrstnopqrstu",
                 "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
        HashCase{"one_byte", "\xbd",
                 "68325720aabd7c82f30f554b313d0570c95accbb7dc4b5aae11204c08ffe732b"},
        HashCase{"million_a", std::string(1000000, 'a'),
                 "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}),
    [](const auto& info) { return std::string(info.param.name); });

/// The digest of `message` passed in pieces of at most 200 bytes.
std::string hash_in_pieces(std::span<const std::byte> message, Sha256::Blocks* blocks,
                           std::mt19937& random) {
  Sha256 hash(blocks);
  while (!message.empty()) {
    const std::size_t piece = std::min<std::size_t>(random() % 201, message.size());
    hash.update(message.first(piece));
    message = message.subspan(piece);
  }
  return hash.finish();
}

TEST(Sha256, InstructionsOfTheProcessorAgreeWithThePortableCode) {
  Sha256::Blocks* const x86 = sha256_blocks_x86();
  if (x86 == nullptr) GTEST_SKIP() << "this processor has no SHA instructions";
  std::mt19937 random(1);
  std::vector<std::size_t> lengths = {4095, 65536, 100'001, 1'000'003};
  for (std::size_t length = 0; length <= 300; ++length) lengths.push_back(length);
  for (const std::size_t length : lengths) {
    std::vector<std::byte> message(length);
    for (std::byte& b : message) b = static_cast<std::byte>(random());
    Sha256 whole(x86), reference(sha256_blocks_portable);
    whole.update(message);
    reference.update(message);
    const std::string digest = reference.finish();
    EXPECT_EQ(whole.finish(), digest) << length << " bytes";
    EXPECT_EQ(hash_in_pieces(message, x86, random), digest) << length << " bytes in pieces";
  }
}

TEST(Sha256, HashesFiles) {
  TemporaryFolder folder;
  write_bytes(folder / "f", "abc");
  EXPECT_EQ(sha256_file(folder / "f"), sha256("abc"));
}

TEST(MappedFile, MapsRefusesAndMoves) {
  TemporaryFolder folder;
  write_bytes(folder / "full", "hello");
  write_bytes(folder / "empty", "");
  MappedFile file(folder / "full");
  EXPECT_EQ(std::memcmp(file.bytes().data(), "hello", 5), 0);
  EXPECT_TRUE(MappedFile(folder / "empty").bytes().empty());
  MappedFile other(folder / "empty");
  other = std::move(file);
  EXPECT_EQ(other.bytes().size(), 5u);
  other.drop_pages(other.bytes());
  EXPECT_EQ(std::memcmp(other.bytes().data(), "hello", 5), 0);

  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  for (const char* name : {"missing", ".", "pipe"}) {
    SCOPED_TRACE(name);
    EXPECT_EQ(refused([&] { MappedFile{folder / name}; }).file(), (folder / name).string());
  }
}

TEST(AtomicFile, ReplacesTheWholeFile) {
  TemporaryFolder folder;
  write_file_atomically(folder / "f", std::string_view("a long old text"));
  write_file_atomically(folder / "f", std::string_view("new"));
  EXPECT_EQ(read_text_file(folder / "f"), "new");
  EXPECT_EQ(entries_in(folder.path()), 1);
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  TemporaryFolder folder;
  write_bytes(folder / "f", "old");
  {
    AtomicFile file(folder / "f");
    file.write(bytes_of("half"));
  }
  EXPECT_EQ(read_bytes(folder / "f"), "old");
  EXPECT_EQ(entries_in(folder.path()), 1);
}

TEST(AtomicFile, SaysWhyItCannotWrite) {
  TemporaryFolder folder;
  write_bytes(folder / "file", "");
  std::filesystem::create_directory(folder / "taken");
  for (const char* path : {"missing/f", "file/f", "taken"}) {
    SCOPED_TRACE(path);
    try {
      write_file_atomically(folder / path, std::string_view("text"));
      FAIL() << "expected an EnvironmentError";
    } catch (const EnvironmentError& error) {
      EXPECT_EQ(error.resource(), (folder / path).string());
      EXPECT_THAT(error.what(), HasSubstr("cannot "));
    }
  }
  EXPECT_EQ(entries_in(folder.path()), 2);  // no temporary file is left
}

TEST(AtomicFile, ReportsAFolderWithoutPermission) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  TemporaryFolder folder;
  std::filesystem::permissions(
      folder.path(), std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  EXPECT_THROW(write_file_atomically(folder / "f", std::string_view("text")), EnvironmentError);
  std::filesystem::permissions(folder.path(), std::filesystem::perms::owner_all);
}

TEST(AtomicFile, KeepsTheOldFileWhenTheDiskIsFull) {
  TemporaryFolder folder;
  write_bytes(folder / "f", "old");
  // A limit on the size of files fails write() half way, as a full disk does.
  struct rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit limit = before;
  limit.rlim_cur = 4096;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  EXPECT_THROW(write_file_atomically(folder / "f", std::string_view(std::string(100000, 'x'))),
               EnvironmentError);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(read_bytes(folder / "f"), "old");
  EXPECT_EQ(entries_in(folder.path()), 1);
}

TEST(ReadTextFile, HasALimit) {
  TemporaryFolder folder;
  write_bytes(folder / "f", "12345");
  EXPECT_EQ(read_text_file(folder / "f", 5), "12345");
  EXPECT_THAT(refused([&] { read_text_file(folder / "f", 4); }).what(),
              HasSubstr("at most 4 bytes, found 5"));
  EXPECT_THROW(read_text_file(folder / "missing"), InputError);
}

TEST(FolderLock, IsExclusiveUntilReleased) {
  TemporaryFolder folder;
  {
    FolderLock lock(folder / "a/b");
    EXPECT_THROW(FolderLock(folder / "a/b"), EnvironmentError);
  }
  EXPECT_NO_THROW(FolderLock(folder / "a/b"));
  write_bytes(folder / "file", "");
  EXPECT_THROW(FolderLock(folder / "file"), EnvironmentError);
}

TEST(FolderLock, IsReleasedByTheDeathOfItsProcess) {
  TemporaryFolder folder;
  int ready[2], leave[2];
  ASSERT_EQ(::pipe(ready), 0);
  ASSERT_EQ(::pipe(leave), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  char byte = 0;
  if (child == 0) {
    const FolderLock lock(folder.path());
    if (::write(ready[1], &byte, 1) == 1 && ::read(leave[0], &byte, 1) == 1)
      ::_exit(0);  // no destructor runs
    ::_exit(1);
  }
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_THROW(FolderLock(folder.path()), EnvironmentError);
  ASSERT_EQ(::write(leave[1], &byte, 1), 1);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_NO_THROW(FolderLock(folder.path()));
  for (const int fd : {ready[0], ready[1], leave[0], leave[1]}) ::close(fd);
}

/// A safetensors file from its header and data.
std::string container(const std::string& header, const std::string& data = "") {
  std::string text(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(text.data(), &length, sizeof length);
  return text + header + data;
}

Array<float> floats(std::vector<std::int64_t> shape, std::vector<float> values) {
  Array<float> array;
  array.shape = std::move(shape);
  array.data = std::move(values);
  return array;
}

TEST(SafetensorsWriter, WritesTheExactBytes) {
  SafetensorsWriter writer;
  Array<std::int64_t> last({1}, 258);
  writer.add("z", last);
  const Array<float> first = floats({1, 2}, {1.0f, -2.0f});
  writer.add_view("a", first);
  const std::string header =
      R"({"a":{"data_offsets":[0,8],"dtype":"F32","shape":[1,2]},"z":{"data_offsets":[8,16],"dtype":"I64","shape":[1]}})";
  const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
  const std::string data("\0\0\x80\x3f\0\0\0\xc0\x02\x01\0\0\0\0\0\0", 16);
  const std::vector<std::byte> bytes = writer.bytes();
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()),
            container(padded, data));

  TemporaryFolder folder;
  EXPECT_EQ(writer.write(folder / "f"), sha256(bytes));
  EXPECT_EQ(writer.sha256(), sha256(bytes));
  EXPECT_EQ(read_bytes(folder / "f"), container(padded, data));
  EXPECT_EQ(entries_in(folder.path()), 1);
}

TEST(SafetensorsWriter, RefusesBadTensors) {
  SafetensorsWriter writer;
  writer.add("a", floats({2}, {1, 2}));
  EXPECT_THROW(writer.add("a", floats({2}, {1, 2})), ArgumentError);
  EXPECT_THROW(writer.add("b", floats({3}, {1, 2})), ArgumentError);
  EXPECT_THROW(writer.write("/nonexistent-folder/f"), EnvironmentError);
}

TEST(SafetensorsFile, RoundTripsEveryType) {
  TemporaryFolder folder;
  SafetensorsWriter writer;
  const Array<double> f64 = test::ramp<double>({2, 3}, 0.1);
  const Array<float> f32 = test::ramp<float>({3}, 0.1);
  const Array<std::int64_t> i64({2}, -5);
  writer.add_view("b.f32", f32);  // 12 bytes: the tensors after it are unaligned
  writer.add("c.f64", f64);
  writer.add("d.i64", i64);
  writer.add("e.empty", Array<double>({0, 3}));
  const Array<std::uint16_t> f16({3}, 0x3c01);
  writer.add("f.f16", f16);
  writer.write(folder / "f");
  const SafetensorsFile file(folder / "f");
  EXPECT_EQ(file.f32("b.f32", std::vector<std::int64_t>{3}), f32);
  EXPECT_EQ(file.f64("c.f64"), f64);
  EXPECT_EQ(file.i64("d.i64"), i64);
  EXPECT_EQ(file.f16("f.f16"), f16);
  EXPECT_THAT(file.f64("e.empty").shape, ElementsAre(0, 3));
  EXPECT_EQ(refused([&] { file.at("x"); }).field(), "x");
  EXPECT_THAT(refused([&] { file.f64("b.f32"); }).what(),
              HasSubstr("expected dtype F64, found F32"));
  EXPECT_THAT(refused([&] { file.f64("c.f64", std::vector<std::int64_t>{3, 2}); }).what(),
              HasSubstr("expected shape [3,2], found [2,3]"));
}

TEST(SafetensorsFile, ReadsAHandMadeFile) {
  TemporaryFolder folder;
  write_bytes(
      folder / "f",
      container(
          R"({"__metadata__":{"format":"pt"},"h":{"dtype":"F16","shape":[],"data_offsets":[0,2]}})",
          "ab"));
  const SafetensorsFile file(folder / "f");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.at("h").dtype, "F16");
  EXPECT_EQ(file.at("h").data.size(), 2u);
  EXPECT_TRUE(file.at("h").shape.empty());
}

TEST(SafetensorsFile, RefusesEveryTruncation) {
  TemporaryFolder folder;
  SafetensorsWriter writer;
  writer.add("a", floats({2}, {1, 2}));
  writer.add("b", Array<double>({2, 2}, 1.5));
  writer.write(folder / "whole");
  const std::string whole = read_bytes(folder / "whole");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write_bytes(folder / "f", whole.substr(0, size));
    EXPECT_THROW(SafetensorsFile(folder / "f"), InputError) << "cut to " << size << " bytes";
  }
  write_bytes(folder / "f", whole + "x");
  EXPECT_THROW(SafetensorsFile(folder / "f"), InputError);
}

/// Any damaged byte gives a readable file or an InputError, nothing else.
TEST(SafetensorsFile, SurvivesEveryDamagedByte) {
  TemporaryFolder folder;
  SafetensorsWriter writer;
  writer.add("a", floats({2}, {1, 2}));
  writer.write(folder / "whole");
  const std::string whole = read_bytes(folder / "whole");
  int refusals = 0;
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const char value : {'\0', '\"', '9'}) {
      std::string damaged = whole;
      damaged[i] = value;
      write_bytes(folder / "f", damaged);
      try {
        SafetensorsFile{folder / "f"};
      } catch (const InputError&) {
        ++refusals;
      }
    }
  }
  EXPECT_GT(refusals, 50);
}

struct HostileFile {
  const char* name;
  std::string bytes;
  const char* field;
  const char* message;
};

class HostileSafetensors : public testing::TestWithParam<HostileFile> {};

TEST_P(HostileSafetensors, IsRefused) {
  TemporaryFolder folder;
  write_bytes(folder / "f", GetParam().bytes);
  const InputError error = refused([&] { SafetensorsFile{folder / "f"}; });
  EXPECT_EQ(error.file(), (folder / "f").string());
  EXPECT_EQ(error.field(), GetParam().field);
  EXPECT_THAT(error.what(), HasSubstr(GetParam().message));
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"t":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

INSTANTIATE_TEST_SUITE_P(
    Cases, HostileSafetensors,
    testing::Values(
        HostileFile{"huge_header", std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), "",
                    "header length"},
        HostileFile{"long_header", std::string("\x03\0\0\0\0\0\0\0{}", 10), "", "truncated"},
        HostileFile{"bad_json", container("{\"t\":"), "", "not valid JSON"},
        HostileFile{"no_object", container("[]"), "", "expected a JSON object"},
        HostileFile{"deep_nest", container(std::string(100000, '[')), "", "nested deeper"},
        HostileFile{"missing_field", container(R"({"t":{"dtype":"F32","shape":[]}})"), "t",
                    "expected an object of"},
        HostileFile{
            "extra_field",
            container(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", "1234"),
            "t", "expected an object of"},
        HostileFile{"unknown_dtype", container(one("F31", "[1]", "[0,4]"), "1234"), "t",
                    "unknown dtype \"F31\""},
        HostileFile{"overflow_shape", container(one("F32", "[4611686018427387904,4]", "[0,0]")),
                    "t", "does not match"},
        HostileFile{"overflow_to_size", container(one("U8", "[4294967296,4294967296]", "[0,0]")),
                    "t", "does not match"},
        HostileFile{"negative_shape", container(one("F32", "[-1]", "[0,4]"), "1234"), "t",
                    "non-negative"},
        HostileFile{"fraction_shape", container(one("F32", "[1.0]", "[0,4]"), "1234"), "t",
                    "non-negative"},
        HostileFile{"shape_beyond_63_bits",
                    container(one("U8", "[9223372036854775808]", "[0,4]"), "1234"), "t",
                    "non-negative"},
        HostileFile{"many_dimensions",
                    container(one("U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]"), "1"), "t",
                    "at most 16"},
        HostileFile{"range_outside", container(one("F32", "[2]", "[0,8]"), "1234"), "t",
                    "lie outside"},
        HostileFile{"range_reversed", container(one("F32", "[1]", "[4,0]"), "1234"), "t",
                    "lie outside"},
        HostileFile{"three_offsets", container(one("F32", "[1]", "[0,4,4]"), "1234"), "t",
                    "at most 2"},
        HostileFile{"hole_first", container(one("U8", "[2]", "[2,4]"), "1234"), "t", "hole"},
        HostileFile{"hole_last", container(one("U8", "[2]", "[0,2]"), "1234"), "",
                    "expected 2 bytes of data, found 4"},
        HostileFile{
            "overlap",
            container(
                R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                "1234"),
            "b", "overlaps"},
        HostileFile{
            "twice",
            container(
                R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
                "1234"),
            "a", "twice"},
        HostileFile{"metadata_number", container(R"({"__metadata__":{"n":1}})"), "__metadata__",
                    "expected a string"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvplan
