#pragma once
// Writes GGUF files for tests, well-formed or not: every field can be given a wrong value.

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvplan {

/// Little-endian bytes of the parts of a GGUF file.
class GgufBytes {
 public:
  template <class T>
  GgufBytes& raw(T value) {
    const auto at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
    return *this;
  }
  GgufBytes& text(std::string_view s) {
    raw(std::uint64_t{s.size()});
    return append(s);
  }
  GgufBytes& append(std::string_view s) {
    bytes_.append(s);
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

struct GgufBuilder {
  struct Tensor {
    std::string name;
    std::vector<std::uint64_t> dimensions;  // fastest first, as in the file
    std::uint32_t type = 0;
    std::string data;
    std::int64_t move = 0;  // added to the offset, to misplace it
  };

  std::uint32_t version = 3;
  std::uint64_t alignment = 32;    // of the layout; general.alignment is a key like any other
  std::int64_t extra_tensors = 0;  // added to the counts
  std::int64_t extra_metadata = 0;
  std::vector<std::pair<std::string, std::string>> metadata;  // key, bytes of type and value
  std::vector<Tensor> tensors;

  void set(const std::string& key, std::string value) {
    for (auto& [name, old] : metadata) {
      if (name == key) {
        old = std::move(value);
        return;
      }
    }
    metadata.emplace_back(key, std::move(value));
  }
  static std::string u32(std::uint32_t v) {
    return GgufBytes().raw(std::uint32_t{4}).raw(v).bytes();
  }
  static std::string i32(std::int32_t v) {
    return GgufBytes().raw(std::uint32_t{5}).raw(v).bytes();
  }
  static std::string f32(float v) { return GgufBytes().raw(std::uint32_t{6}).raw(v).bytes(); }
  static std::string boolean(std::uint8_t v) {
    return GgufBytes().raw(std::uint32_t{7}).raw(v).bytes();
  }
  static std::string text(std::string_view v) {
    return GgufBytes().raw(std::uint32_t{8}).text(v).bytes();
  }

  std::string header() const {
    GgufBytes out;
    out.append("GGUF").raw(version);
    out.raw(static_cast<std::uint64_t>(static_cast<std::int64_t>(tensors.size()) + extra_tensors));
    out.raw(
        static_cast<std::uint64_t>(static_cast<std::int64_t>(metadata.size()) + extra_metadata));
    for (const auto& [key, value] : metadata) out.text(key).append(value);
    std::uint64_t offset = 0;
    for (const auto& t : tensors) {
      out.text(t.name).raw(static_cast<std::uint32_t>(t.dimensions.size()));
      for (const auto n : t.dimensions) out.raw(n);
      out.raw(t.type).raw(offset + static_cast<std::uint64_t>(t.move));
      offset = aligned(offset + t.data.size());
    }
    return out.bytes();
  }
  std::string bytes() const {
    std::string out = header();
    for (const auto& t : tensors) {
      out.resize(aligned(out.size()));
      out += t.data;
    }
    return out;
  }

 private:
  std::uint64_t aligned(std::uint64_t n) const {
    return (n + alignment - 1) / alignment * alignment;
  }
};

}  // namespace kvplan
