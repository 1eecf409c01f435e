#pragma once
// SHA-256 (FIPS 180-4).

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace kvplan {

class Sha256 {
 public:
  /// Takes `count` blocks of 64 bytes into the state.
  using Blocks = void(std::array<std::uint32_t, 8>& state, const std::byte* blocks,
                      std::size_t count);

  /// By the fastest code that this machine runs.
  Sha256();
  explicit Sha256(Blocks* blocks) : blocks_(blocks) {}
  void update(std::span<const std::byte> bytes);
  /// 64 lower-case hex digits; the object must not be used afterwards.
  std::string finish();

 private:
  Blocks* blocks_;
  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> buffer_{};
  std::uint64_t length_ = 0;
};

std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);
std::string sha256_file(const std::filesystem::path& path);

}  // namespace kvplan
