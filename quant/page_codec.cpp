// The conversion of a page from and to the linear form
// (docs/formats/packing.md, "Pages and tiles").

#include <array>
#include <cstring>
#include <string>

#include "quant/packing.h"
#include "quant/page_layout.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kScaleBytes = 2;
constexpr unsigned kIntegerOffset = 128;  // outlier codes are stored as code + 128

constexpr int word_bits(bool half_tile) { return half_tile ? 16 : 32; }

/// The words of all lanes of a tile.
class TileWords {
 public:
  explicit TileWords(const TileRun& run)
      : code_(run.code), width_(run.width), half_tile_(run.half != 0) {}

  void load(const std::byte* tile) {
    for_each_word([&](std::uint32_t& word, std::size_t offset, std::size_t bytes) {
      std::memcpy(&word, tile + offset, bytes);
    });
  }
  void store(std::byte* tile) {
    for_each_word([&](const std::uint32_t& word, std::size_t offset, std::size_t bytes) {
      std::memcpy(tile + offset, &word, bytes);
    });
  }

  std::uint32_t code(const TilePlace& place) const {
    const auto& words = words_[static_cast<std::size_t>(place.lane)];
    const CodeParts parts = parts_of(place);
    std::uint32_t code = 0;
    for (int i = 0; i < parts.count; ++i) {
      const CodePart& part = parts.part[i];
      code |= (words[static_cast<std::size_t>(part.word)] >> part.shift & ((1u << part.bits) - 1))
              << part.from;
    }
    return stored_code(code_, width_, code);
  }
  void add_code(const TilePlace& place, std::uint32_t code) {
    auto& words = words_[static_cast<std::size_t>(place.lane)];
    const CodeParts parts = parts_of(place);
    const std::uint32_t stored = stored_code(code_, width_, code);
    for (int i = 0; i < parts.count; ++i) {
      const CodePart& part = parts.part[i];
      words[static_cast<std::size_t>(part.word)] |= (stored >> part.from & ((1u << part.bits) - 1))
                                                    << part.shift;
    }
  }

 private:
  CodeParts parts_of(const TilePlace& place) const {
    return code_parts(code_, width_, half_tile_, 2 * place.pair + place.half);
  }

  template <class Visit>
  void for_each_word(Visit visit) {
    for (int lane = 0; lane < kWarpLanes; ++lane)
      for (int word = 0; word < width_; ++word)
        visit(words_[static_cast<std::size_t>(lane)][static_cast<std::size_t>(word)],
              word_offset(width_, word, lane, half_tile_),
              static_cast<std::size_t>(word_bits(half_tile_) / 8));
  }

  TileCode code_;
  int width_;
  bool half_tile_;
  std::array<std::array<std::uint32_t, kFp16Width>, kWarpLanes> words_{};
};

/// Codes of one side of a page: those of the coordinates, then those of the outlier channels.
class PageCodes {
 public:
  explicit PageCodes(const SideLayout& layout)
      : row_(static_cast<std::size_t>(layout.coded + layout.outliers)),
        codes_(kPageTokens * row_) {}
  std::uint16_t& at(int token, int index) {
    return codes_[static_cast<std::size_t>(token) * row_ + static_cast<std::size_t>(index)];
  }

 private:
  std::size_t row_;
  std::vector<std::uint16_t> codes_;
};

/// Calls visit(token, index into PageCodes, place) for the codes of tile `tile` of a run.
template <class Visit>
void for_each_code(const SideLayout& layout, const TileRun& run, int tile, Side side, Visit visit) {
  const int coordinates = tile_coordinates(run.half != 0);
  const int first =
      run.coordinate + tile * coordinates + (run.code == TileCode::kInteger ? layout.coded : 0);
  for (int token = 0; token < kPageTokens; ++token)
    for (int i = 0; i < coordinates; ++i)
      visit(token, first + i, tile_place(side, token, i, run.half != 0));
}

/// Calls visit(run, tile, offset in the page) for all tiles that are stored as such.
template <class Visit>
void for_each_tile(const SideLayout& layout, Visit visit) {
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const TileRun& run = layout.runs[r];
    if (run.code == TileCode::kTrellis) continue;
    for (int tile = 0; tile < run.tiles; ++tile)
      visit(run, tile,
            run.offset + static_cast<std::size_t>(tile) * tile_bytes(run.width, run.half != 0));
  }
}

std::size_t norm_offset(const SideLayout& layout, int token) {
  return layout.norm_offset + token_index(token) * static_cast<std::size_t>(layout.norm_bytes);
}

std::size_t scale_offset(const SideLayout& layout, int token) {
  return layout.scale_offset + token_index(token) * kScaleBytes;
}

/// Calls visit(byte of a page, byte of the token's row in the linear form) for a token's stream,
/// the last bytes of the row.
template <class Visit>
void for_each_stream_byte(const SideLayout& layout, Side side, int token, Visit visit) {
  const std::size_t begin = linear_bytes(layout) - static_cast<std::size_t>(layout.stream_bytes);
  for (int i = 0; i < layout.stream_bytes; ++i)
    visit(layout.stream_offset + stream_byte(side, layout.stream_bytes, token, i),
          begin + static_cast<std::size_t>(i));
}

void check_sizes(const SideLayout& layout, std::size_t page, std::size_t token_stride,
                 std::size_t linear) {
  const std::size_t token = linear_bytes(layout);
  if (token_stride < token || linear < (kPageTokens - 1) * token_stride + token)
    throw ArgumentError("the linear form of a page has " + std::to_string(kPageTokens) +
                        " tokens of " + std::to_string(token) + " bytes; " +
                        std::to_string(linear) + " bytes with a stride of " +
                        std::to_string(token_stride) + " cannot hold them");
  std::size_t end = layout.norm_offset + kPageTokens * static_cast<std::size_t>(layout.norm_bytes);
  if (layout.outliers > 0) end = layout.scale_offset + kPageTokens * kScaleBytes;
  for_each_tile(layout, [&](const TileRun& run, int, std::size_t offset) {
    end = std::max(end, offset + tile_bytes(run.width, run.half != 0));
  });
  if (layout.stream_bytes > 0)
    end = std::max<std::size_t>(
        end, layout.stream_offset + kPageTokens * static_cast<std::size_t>(layout.stream_bytes));
  if (page < end)
    throw ArgumentError("a page of " + std::to_string(page) + " bytes was given for a layout of " +
                        std::to_string(end));
}

}  // namespace

std::size_t word_offset(int width, int word, int lane, bool half_tile) {
  if (half_tile) return static_cast<std::size_t>((word * kWarpLanes + lane) * 2);
  const int in_fours = width / 4 * 4, in_twos = width & 2;
  int first = word / 4 * 4, count = 4;  // words of the section
  if (word >= in_fours + in_twos) {
    first = in_fours + in_twos;
    count = 1;
  } else if (word >= in_fours) {
    first = in_fours;
    count = 2;
  }
  return static_cast<std::size_t>(4 * (first * kWarpLanes + lane * count + word - first));
}

TilePlace tile_place(Side side, int token, int coordinate, bool half_tile) {
  // Operand A: a lane 4g + t has rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9. Registers
  // count the row's block of 8 first, then the column's.
  const int row = side == Side::kKey ? token % 16 : coordinate;
  const int column = side == Side::kKey ? coordinate : token % 16;
  const int step = token / 16;
  TilePlace place;
  place.lane = row % 8 * 4 + column % 8 / 2;
  place.half = column % 2;
  if (half_tile)
    place.pair = 2 * step + (side == Side::kKey ? row / 8 : column / 8);
  else
    place.pair = 4 * step + row / 8 + 2 * (column / 8);
  return place;
}

std::size_t linear_bytes(const SideLayout& layout) {
  std::size_t bits = 0;
  for (int r = 0; r < layout.run_count; ++r) {
    const TileRun& run = layout.runs[r];
    bits += static_cast<std::size_t>(run.tiles * run.width * tile_coordinates(run.half != 0));
  }
  const auto outliers = static_cast<std::size_t>(layout.outliers);
  return static_cast<std::size_t>(layout.norm_bytes) + (outliers > 0 ? kScaleBytes + outliers : 0) +
         bits / 8;
}

void to_page(const SideLayout& layout, Side side, std::span<const std::byte> linear,
             std::size_t token_stride, std::span<std::byte> page) {
  check_sizes(layout, page.size(), token_stride, linear.size());
  PageCodes codes(layout);
  const auto norm_bytes = static_cast<std::size_t>(layout.norm_bytes);
  for (int token = 0; token < kPageTokens; ++token) {
    const std::byte* const row = linear.data() + static_cast<std::size_t>(token) * token_stride;
    const std::byte* from = row;
    std::memcpy(page.data() + norm_offset(layout, token), from, norm_bytes);
    from += norm_bytes;
    if (layout.outliers > 0) {
      std::memcpy(page.data() + scale_offset(layout, token), from, kScaleBytes);
      from += kScaleBytes;
      for (int i = 0; i < layout.outliers; ++i)
        codes.at(token, layout.coded + i) =
            static_cast<std::uint16_t>(std::to_integer<unsigned>(*from++) ^ kIntegerOffset);
    }
    BitReader reader({from, linear.data() + linear.size()});
    for (int r = 0; r < layout.run_count && layout.runs[r].code != TileCode::kTrellis; ++r) {
      const TileRun& run = layout.runs[r];
      for (int i = 0; i < run.tiles * tile_coordinates(run.half != 0); ++i)
        codes.at(token, run.coordinate + i) = static_cast<std::uint16_t>(reader.get(run.width));
    }
    for_each_stream_byte(layout, side, token,
                         [&](std::size_t to, std::size_t at) { page[to] = row[at]; });
  }
  for_each_tile(layout, [&](const TileRun& run, int tile, std::size_t offset) {
    TileWords words(run);
    for_each_code(layout, run, tile, side, [&](int token, int index, const TilePlace& place) {
      words.add_code(place, codes.at(token, index));
    });
    words.store(page.data() + offset);
  });
}

void from_page(const SideLayout& layout, Side side, std::span<const std::byte> page,
               std::size_t token_stride, std::span<std::byte> linear) {
  check_sizes(layout, page.size(), token_stride, linear.size());
  PageCodes codes(layout);
  for_each_tile(layout, [&](const TileRun& run, int tile, std::size_t offset) {
    TileWords words(run);
    words.load(page.data() + offset);
    for_each_code(layout, run, tile, side, [&](int token, int index, const TilePlace& place) {
      codes.at(token, index) = static_cast<std::uint16_t>(words.code(place));
    });
  });
  const auto norm_bytes = static_cast<std::size_t>(layout.norm_bytes);
  const std::size_t token_bytes = linear_bytes(layout);
  for (int token = 0; token < kPageTokens; ++token) {
    std::byte* const row = linear.data() + static_cast<std::size_t>(token) * token_stride;
    std::byte* to = row;
    std::memcpy(to, page.data() + norm_offset(layout, token), norm_bytes);
    to += norm_bytes;
    if (layout.outliers > 0) {
      std::memcpy(to, page.data() + scale_offset(layout, token), kScaleBytes);
      to += kScaleBytes;
      for (int i = 0; i < layout.outliers; ++i)
        *to++ = static_cast<std::byte>(codes.at(token, layout.coded + i) ^ kIntegerOffset);
    }
    std::fill(to, row + token_bytes, std::byte{0});
    BitWriter writer({to, row + token_bytes});
    for (int r = 0; r < layout.run_count && layout.runs[r].code != TileCode::kTrellis; ++r) {
      const TileRun& run = layout.runs[r];
      for (int i = 0; i < run.tiles * tile_coordinates(run.half != 0); ++i)
        writer.put(codes.at(token, run.coordinate + i), run.width);
    }
    for_each_stream_byte(layout, side, token,
                         [&](std::size_t at, std::size_t byte) { row[byte] = page[at]; });
  }
}

}  // namespace kvplan::quant
