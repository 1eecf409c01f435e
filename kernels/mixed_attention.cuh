#pragma once
// Attention of one segment over pages whose tiles are all bytes, of any widths: code for one width
// after the other, each skipped where a page has no such tiles. Private to the decode kernels.

#include "kernels/key_centre.cuh"
#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/tile_plan.h"
#include "kernels/views.h"

namespace kvplan::kernels {

// The tiles of a side of a page, eight bits per width: twice their number, and whether a half tile
// follows.
class TileCounts {
 public:
  KVPLAN_DEVICE TileCounts(const RunEntry* runs, int count) {
    for (int i = 0; i < count; ++i) {
      const int width = runs[i].kind % kHalfKinds;
      const std::uint32_t field = runs[i].kind >= kHalfKinds ? 1 : 2u * runs[i].tiles;
      (width > 3 ? wide_ : narrow_) |= field << shift(width);
    }
    wide_ = uniform(wide_);
    narrow_ = uniform(narrow_);
  }
  /// Bytes of the tiles of a page.
  KVPLAN_DEVICE std::uint32_t bytes() const {
    std::uint32_t sum = 0;
#pragma unroll
    for (int width = 1; width <= 8; ++width)
      if (width != 7)
        sum += 64 * static_cast<std::uint32_t>(width) *
               ((width > 3 ? wide_ : narrow_) >> shift(width) & 255);
    return sum;
  }
  template <int Width>
  KVPLAN_DEVICE bool any() const {
    return (word<Width>() & 255u << shift(Width)) != 0;
  }
  template <int Width>
  KVPLAN_DEVICE bool half() const {
    return (word<Width>() & 1u << shift(Width)) != 0;
  }
  /// Whether full tiles are left.
  template <int Width>
  KVPLAN_DEVICE bool full() const {
    return (word<Width>() & 254u << shift(Width)) != 0;
  }
  template <int Width>
  KVPLAN_DEVICE void take() {
    (Width > 3 ? wide_ : narrow_) -= 2u << shift(Width);
  }

 private:
  KVPLAN_DEVICE static constexpr int shift(int width) {
    return 8 * (width == 8 ? 3 : width > 3 ? width - 4 : width - 1);
  }
  template <int Width>
  KVPLAN_DEVICE std::uint32_t word() const {
    return Width > 3 ? wide_ : narrow_;
  }
  std::uint32_t wide_ = 0, narrow_ = 0;
};

// The bytes of a width's levels; none where codes become bytes by themselves.
template <int Width>
struct StepTable {
  std::uint32_t words[8];
  KVPLAN_DEVICE explicit StepTable(std::uint32_t tables) {
#pragma unroll
    for (int i = 0; i < table_words(Width); i += 4) {
      const uint4 v = load_shared4(tables + 4 * (table_word_of(Width) + i));
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }
};

// Brings the tiles of one width, which begin at visit.at, as registers of operand A to
// visit.tile(a), or visit.tile(a, b) with a + b, and visit.half(a).
template <int Width, class Visit>
KVPLAN_DEVICE void for_tiles_of(TileCounts counts, std::uint32_t tables, Visit& visit) {
  if (!counts.any<Width>()) return;
  constexpr std::uint32_t kBytes = 128 * Width;
  const StepTable<Width> table(tables);
  if (counts.full<Width>()) {
    const ByteTile<Width> tile(table.words);
#pragma unroll 1
    do {
      std::uint32_t w[Width], a[8];
      tile.load(w, visit.at);
      visit.at += kBytes;
      visit.prepare();
      counts.take<Width>();
      if constexpr (Width == 4) {
        std::uint32_t b[8];
#pragma unroll
        for (int k = 0; k < 4; ++k) tile.table.summands(w, k, a + 2 * k, b + 2 * k);
        visit.tile(a, b);
      } else {
        tile.registers(w, a);
        visit.tile(a);
      }
    } while (counts.full<Width>());
  }
  if (!counts.half<Width>()) return;
  const ByteHalfTile<Width> half(table.words);
  std::uint32_t w[Width], a[4];
  half.load(w, visit.at);
  visit.at += kBytes / 2;
  visit.prepare();
  half.registers(w, a);
  visit.half(a);
}

// All tiles of a side of a page: they come in descending width.
template <class Visit>
KVPLAN_DEVICE void for_tiles(const TileCounts& counts, std::uint32_t tables, Visit& visit) {
  for_tiles_of<8>(counts, tables, visit);
  for_tiles_of<6>(counts, tables, visit);
  for_tiles_of<5>(counts, tables, visit);
  for_tiles_of<4>(counts, tables, visit);
  for_tiles_of<3>(counts, tables, visit);
  for_tiles_of<2>(counts, tables, visit);
  for_tiles_of<1>(counts, tables, visit);
}

// Scores: sums += keys . queries.
struct KeyTiles {
  std::uint32_t at;
  std::uint32_t query;  // of the lane in the fragments
  int (&sums)[kRows][4];
  std::uint32_t q = 0;

  /// Ahead of the next tile.
  KVPLAN_DEVICE void prepare() {
    q = load_shared1(query);
    query += 8 * kLanes;  // bytes of a tile of the fragments
  }
  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) mma_bytes(sums[i], a[2 * i], a[2 * i + 1], q);
  }
  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      mma_bytes(sums[i], a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1], q, q);
  }
  KVPLAN_DEVICE void half(const std::uint32_t (&a)[4]) {
    // The bytes of coordinates that are not there meet zeros.
#pragma unroll
    for (int i = 0; i < kRows; ++i) mma_bytes(sums[i], a[i], a[i] >> 8, q);
  }
};

// Outputs += (values . weights) * unit. The sums of a tile are added while the next one is at work.
struct ValueTiles {
  std::uint32_t at;
  Output<1>* output;  // of the lane
  const ByteWeights<1>& p;
  float unit;
  Output<1>* of_sums = output;
  int sums[4] = {};
  Output<1> o = {};

  KVPLAN_DEVICE void prepare() { o = *of_sums; }
  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8]) {
    add();
    multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][0], p[1][0]);
    mma_unsigned(sums, a[4], a[5], a[6], a[7], p[2][0], p[3][0]);
  }
  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8]) {
    add();
    multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][0], p[1][0]);
    mma_unsigned(sums, b[0], b[1], b[2], b[3], p[0][0], p[1][0]);
    mma_unsigned(sums, a[4], a[5], a[6], a[7], p[2][0], p[3][0]);
    mma_unsigned(sums, b[4], b[5], b[6], b[7], p[2][0], p[3][0]);
  }
  KVPLAN_DEVICE void half(const std::uint32_t (&a)[4]) {
    add();
    multiply_unsigned(sums, a[0], 0, a[1], 0, p[0][0], p[1][0]);
    mma_unsigned(sums, a[2], 0, a[3], 0, p[2][0], p[3][0]);
  }
  /// Adds what is left.
  KVPLAN_DEVICE void finish() {
    prepare();
    add();
  }

 private:
  KVPLAN_DEVICE void add() {
#pragma unroll
    for (int h = 0; h < 2; ++h) o.x[h] = fused(digits(sums[2 * h], sums[2 * h + 1]), unit, o.x[h]);
    *of_sums = o;
    of_sums = output;
    output += kLanes;
  }
};

// Only tiles of bytes, one block of four columns, centred or not.
class MixedPath {
 public:
  static constexpr int kBlocks = 1, kWarps = kMixedWarps;
  using Feed = PageRing;

  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<1>& work, Feed& feed,
                                   Running<1>& r, int first, int count) {
    clear_output(work, work.value_tiles);
    write_tables(work);
    MixedPath path(v, work, r);
#pragma unroll 1
    for (int page = first; page < first + count; ++page) path.attend_page(feed, page);
  }

 private:
  using PageScores = Scores<1>;
  static constexpr float kMost = 64;  // 2^kSlack

  KVPLAN_DEVICE static TileTables& tables_of(const Work<1>& work) {
    return *reinterpret_cast<TileTables*>(work.tables);
  }

  // The tables of the segment's runs, each width's in its place.
  KVPLAN_DEVICE static void write_tables(const Work<1>& work) {
    TileTables& tables = tables_of(work);
    if (lane() < work.key_runs + work.value_runs) {
      const RunEntry& run = work.runs[lane()];
      const int width = run.kind % kHalfKinds;
      for (int i = 0; i < table_words(width); ++i)
        tables.words[lane() < work.key_runs ? 0 : 1][table_word_of(width) + i] = run.levels[i];
    }
    sync_warp();
  }

  KVPLAN_DEVICE MixedPath(const AttentionView& v, const Work<1>& work, Running<1>& r)
      : v_(v),
        work_(work),
        r_(r),
        keys_(work.runs, work.key_runs),
        values_(work.runs + work.key_runs, work.value_runs),
        tables_(shared_address(&tables_of(work))),
        query_(shared_address(work.query + lane())),
        key_bytes_(keys_.bytes()),
        log_norms_(uniform(static_cast<std::uint32_t>(work.norm_bytes[0])) == 1),
        norms_(shared_address(tables_of(work).norms) +
               32 * static_cast<std::uint32_t>(lane() >> 2)),
        centre_(v, work) {
    const int first = v.layer.sink_tokens, lowest = work.lowest - first;
    const int visible = work.first_query + 1 - first;  // to every query, of the packed tokens
    plain_from_ = lowest > 0 ? (lowest + quant::kPageTokens - 1) / quant::kPageTokens : 0;
    const int until = v.soft_cap > 0 || visible < 0 ? 0 : visible / quant::kPageTokens;
    plain_pages_ = until > plain_from_ ? static_cast<unsigned>(until - plain_from_) : 0;
  }

  // What the scores of a column are differences to.
  KVPLAN_DEVICE float reference() const { return r_.m[0] > kLowest ? r_.m[0] : 0; }

  // Page `page` of the sequence.
  KVPLAN_DEVICE void attend_page(Feed& feed, int page) {
    PageScores s;
    const std::uint32_t keys = feed.wait();
    {
      int sums[kRows][4] = {};
      KeyTiles tiles{keys, query_, sums};
      for_tiles(keys_, tables_, tiles);
      for_scores<1>([&](int i, int h, int e) {
        s[i][h][e] =
            fused(digits(sums[i][2 * h], sums[i][2 * h + 1]), work_.unit[0], work_.bias[0]);
      });
    }
    float terms[2][4];
    const float start = work_.constant[0] - reference();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) terms[i][k] = start;
    centre_.add(terms, keys + key_bytes_);
    feed.done();

    const std::uint32_t rest = feed.wait();
    share_norms(rest);
    float norms[8];
    load_norms(norms, 0);
    for_scores<1>([&](int i, int h, int e) {
      s[i][h][e] = fused(s[i][h][e], norms[2 * i + h], terms[i % 2][2 * h + i / 2]);
    });
    if (static_cast<unsigned>(page - plain_from_) >= plain_pages_) [[unlikely]]
      cap_and_mask(s, page);
    PageScores w;
    float sum = exponentiate(w, s);
    if (any(!(sum <= most_))) [[unlikely]] {
      follow(s);
      sum = exponentiate(w, s);
    }
    r_.l[0] += sum;

    load_norms(norms, 4 * quant::kPageTokens);
    float sums[kRows] = {};
    for_scores<1>([&](int i, int h, int e) {
      w[i][h][e] *= norms[2 * i + h];
      sums[i] += w[i][h][e];
    });
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    r_.norms[0] += sum;
    // No weight of a column is above the largest sum of its lanes.
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) sum = fmaxf(sum, shuffle_xor(sum, step));
    sum = fmaxf(sum, 1e-30f);
    const float factor[1] = {kTopByteWeight * reciprocal_fast(sum)};
    ByteWeights<1> p;
    make_byte_weights<1>(p, w, factor);
    ValueTiles tiles{rest, work_.output + lane(), p, sum * (1 / kTopByteWeight)};
    for_tiles(values_, tables_ + sizeof(TileTables::words[0]), tiles);
    tiles.finish();
    feed.done();
  }

  // Norms of keys and of values, float [2][64] for all lanes: a lane takes two of each.
  KVPLAN_DEVICE void share_norms(std::uint32_t rest) const {
    float x[2][2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const std::uint32_t at = rest + (side == 0 ? work_.key_norms : work_.value_norms);
      if (log_norms_) {
        log_norms_of(x[side], load_shared_half(at + 2 * lane()));
      } else {
        const std::uint32_t two = load_shared1(at + 4 * lane());
        x[side][0] = low_half(two), x[side][1] = high_half(two);
      }
    }
    sync_warp();  // those of the page before have been read
#pragma unroll
    for (int side = 0; side < 2; ++side)
      tables_of(work_).norms[side][lane()] = float2{x[side][0], x[side][1]};
    sync_warp();
  }
  // Of the lane's tokens.
  KVPLAN_DEVICE void load_norms(float (&x)[8], std::uint32_t side) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 v = load_shared4(norms_ + side + 16 * static_cast<std::uint32_t>(k));
      x[4 * k] = float_of_bits(v.x), x[4 * k + 1] = float_of_bits(v.y);
      x[4 * k + 2] = float_of_bits(v.z), x[4 * k + 3] = float_of_bits(v.w);
    }
  }

  // Scores become probabilities w = 2^s; their sum.
  KVPLAN_DEVICE static float exponentiate(PageScores& w, const PageScores& s) {
    float sums[kRows] = {};
    for_scores<1>([&](int i, int h, int e) {
      w[i][h][e] = exp2_fast(s[i][h][e]);
      sums[i] += w[i][h][e];
    });
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  KVPLAN_DEVICE void cap_and_mask(PageScores& s, int page) const {
    if (v_.soft_cap > 0) {
      const float from = reference();
      for_scores<1>([&](int i, int h, int e) { s[i][h][e] += from; });
      cap<1>(s, v_.soft_cap);
      for_scores<1>([&](int i, int h, int e) { s[i][h][e] -= from; });
    }
    mask<1>(s, v_, work_, v_.layer.sink_tokens + quant::kPageTokens * page);
  }

  // Lets the maximum follow the scores, and what depends on it.
  KVPLAN_DEVICE void follow(PageScores& s) {
    float top[1];
    largest<1>(s, top);
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) top[0] = fmaxf(top[0], shuffle_xor(top[0], step));
    const bool known = r_.m[0] > kLowest, seen = top[0] > kLowest;
    const float shift = known ? fmaxf(top[0], 0) : seen ? top[0] : 0;
    const float factor[1] = {known ? exp2_fast(-shift) : 1};
    if (known || seen) r_.m[0] = reference() + shift;
    r_.l[0] *= factor[0];
    r_.norms[0] *= factor[0];
    scale_output<1>(work_, work_.value_tiles, factor);
    for_scores<1>([&](int i, int h, int e) { s[i][h][e] -= shift; });
    if (!any(r_.m[0] <= kLowest)) most_ = kMost;
  }

  const AttentionView& v_;
  const Work<1>& work_;
  Running<1>& r_;
  const TileCounts keys_, values_;
  std::uint32_t tables_, query_, key_bytes_;
  bool log_norms_;
  std::uint32_t norms_;  // of the lane's tokens
  float most_ = -1;      // a lane's sum of probabilities beyond which the maximum follows
  int plain_from_;       // from here on so many pages need neither cap nor mask
  unsigned plain_pages_;
  KeyCentre centre_;
};

}  // namespace kvplan::kernels
