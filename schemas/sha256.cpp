#include "schemas/sha256.h"

#include <algorithm>

#include "schemas/mapped_file.h"
#include "schemas/sha256_blocks.h"

namespace kvplan {
namespace {

constexpr std::size_t kBlockBytes = 64;
constexpr std::size_t kLengthOffset =
    kBlockBytes - 8;  // the last block ends with the length in bits, u64 big endian

// CPUID is slow in virtual machines, so it is asked once.
Sha256::Blocks* fastest_blocks() {
  static Sha256::Blocks* const x86 = sha256_blocks_x86();
  return x86 ? x86 : sha256_blocks_portable;
}

}  // namespace

Sha256::Sha256() : Sha256(fastest_blocks()) {}

void Sha256::update(std::span<const std::byte> bytes) {
  std::size_t filled = length_ % kBlockBytes;
  length_ += bytes.size();
  if (filled > 0) {
    const std::size_t taken = std::min(kBlockBytes - filled, bytes.size());
    std::copy_n(bytes.begin(), taken, buffer_.begin() + static_cast<std::ptrdiff_t>(filled));
    bytes = bytes.subspan(taken);
    if (filled + taken < kBlockBytes) return;
    blocks_(state_, buffer_.data(), 1);
  }
  blocks_(state_, bytes.data(), bytes.size() / kBlockBytes);
  const auto rest = bytes.last(bytes.size() % kBlockBytes);
  std::copy(rest.begin(), rest.end(), buffer_.begin());
}

std::string Sha256::finish() {
  const std::uint64_t length_bits = length_ * 8;
  std::array<std::byte, 2 * kBlockBytes> tail{};
  tail[0] = std::byte{0x80};
  const std::size_t filled = length_ % kBlockBytes;
  const std::size_t padding =
      filled < kLengthOffset ? kLengthOffset - filled : kLengthOffset + kBlockBytes - filled;
  for (std::size_t i = 0; i < 8; ++i)
    tail[padding + i] = static_cast<std::byte>(length_bits >> (56 - 8 * i));
  update(std::span(tail).first(padding + 8));

  std::string hex;
  hex.reserve(64);
  for (const std::uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 0xf];
  }
  return hex;
}

std::string sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.finish();
}

std::string sha256(std::string_view text) { return sha256(std::as_bytes(std::span(text))); }

std::string sha256_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  return sha256(file.bytes());
}

}  // namespace kvplan
