#pragma once
// Attention of one segment over pages whose tiles are all bytes, of any widths: code for one width
// after the other, each skipped where a page has no such tiles. Private to the decode kernels.

#include "kernels/key_centre.cuh"
#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/tile_plan.h"
#include "kernels/views.h"

namespace kvplan::kernels {

// The tiles of a side of a page, eight bits per width: half of a tile, a single one, and the number
// of pairs of tiles; of wide tiles the number.
class TileCounts {
 public:
  static constexpr int kMaxPairedWidth = 5;
  static constexpr std::uint32_t kHalf = 1, kSingle = 2;

  KVPLAN_DEVICE TileCounts(const RunEntry* runs, int count) {
    for (int i = 0; i < count; ++i) {
      const int width = runs[i].kind % kHalfKinds;
      const std::uint32_t tiles = runs[i].tiles;
      const std::uint32_t field = runs[i].kind >= kHalfKinds ? kHalf
                                  : width > kMaxPairedWidth  ? tiles << 2
                                                             : tiles >> 1 << 2 | (tiles & 1) << 1;
      (width > 3 ? wide_ : narrow_) |= field << shift(width);
    }
    wide_ = uniform(wide_);
    narrow_ = uniform(narrow_);
  }
  template <int Width>
  KVPLAN_DEVICE bool has(std::uint32_t fields) const {
    return (word<Width>() & fields << shift(Width)) != 0;
  }
  template <int Width>
  KVPLAN_DEVICE std::uint32_t repeats() const {
    return word<Width>() >> (shift(Width) + 2) & 63;
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
// visit.pair(a, b), visit.tile(a), visit.half(a) and, a tile as two terms, visit.sum(a, b); each
// moves visit.at on by so many bytes.
template <int Width, class Visit>
KVPLAN_DEVICE void for_tiles_of(const TileCounts& counts, std::uint32_t tables, Visit& visit) {
  if (!counts.has<Width>(255)) return;
  constexpr bool kPaired = Width <= TileCounts::kMaxPairedWidth;
  // A product more costs less than adding the two halves of a table.
  constexpr bool kTerms = Width == 4;
  constexpr std::uint32_t kBytes = 128 * Width;
  const StepTable<Width> table(tables);
  const ByteTile<Width> tile(table.words);
  const auto single = [&] {
    std::uint32_t w[Width], a[8];
    tile.load(w, visit.at);
    if constexpr (kTerms) {
      std::uint32_t b[8];
      tile.terms(w, a, b);
      visit.sum(a, b, kBytes);
    } else {
      tile.registers(w, a);
      visit.tile(a, kBytes);
    }
  };
#pragma unroll 1
  for (std::uint32_t left = counts.repeats<Width>(); left > 0; --left) {
    if constexpr (kPaired) {
      std::uint32_t w[2][Width], a[2][8];
      tile.load(w[0], visit.at);
      tile.load(w[1], visit.at + kBytes);
      if constexpr (kTerms) {
        std::uint32_t b[2][8];
        tile.terms(w[0], a[0], b[0]);
        tile.terms(w[1], a[1], b[1]);
        visit.sum(a[0], b[0], kBytes);
        visit.sum(a[1], b[1], kBytes);
      } else {
        tile.registers(w[0], a[0]);
        tile.registers(w[1], a[1]);
        visit.pair(a[0], a[1], 2 * kBytes);
      }
    } else {
      single();
    }
  }
  if constexpr (kPaired)
    if (counts.has<Width>(TileCounts::kSingle)) single();
  if (!counts.has<Width>(TileCounts::kHalf)) return;
  const ByteHalfTile<Width> half(table.words);
  std::uint32_t w[Width], a[4];
  half.load(w, visit.at);
  half.registers(w, a);
  visit.half(a, kBytes / 2);
}

// All tiles of a side of a page: they come in descending width.
template <class Visit>
KVPLAN_DEVICE void for_tiles(const TileCounts& counts, std::uint32_t tables, Visit visit) {
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
  std::uint32_t at, query;  // of the lane in the fragments
  int (&sums)[kRows][4];

  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8], std::uint32_t bytes) {
    const std::uint32_t q = next(bytes, 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) mma_bytes(sums[i], a[2 * i], a[2 * i + 1], q);
  }
  KVPLAN_DEVICE void pair(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8],
                          std::uint32_t bytes) {
    const std::uint32_t next_q = load_shared1(query + kTileBytes), q = next(bytes, 2);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      mma_bytes(sums[i], a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1], q, next_q);
  }
  KVPLAN_DEVICE void sum(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8],
                         std::uint32_t bytes) {
    const std::uint32_t q = next(bytes, 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      mma_bytes(sums[i], a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1], q, q);
  }
  KVPLAN_DEVICE void half(const std::uint32_t (&a)[4], std::uint32_t bytes) {
    const std::uint32_t q = next(bytes, 1);
    // The bytes of coordinates that are not there meet zeros.
#pragma unroll
    for (int i = 0; i < kRows; ++i) mma_bytes(sums[i], a[i], a[i] >> 8, q);
  }

 private:
  static constexpr std::uint32_t kTileBytes = 8 * kLanes;  // of the fragments
  KVPLAN_DEVICE std::uint32_t next(std::uint32_t bytes, int tiles) {
    const std::uint32_t q = load_shared1(query);
    at += bytes;
    query += kTileBytes * static_cast<std::uint32_t>(tiles);
    return q;
  }
};

// Outputs += (values . weights) * unit.
struct ValueTiles {
  std::uint32_t at;
  Output<1>* output;  // of the lane
  const ByteWeights<1, 1>& p;
  float unit;

  KVPLAN_DEVICE void tile(const std::uint32_t (&a)[8], std::uint32_t bytes) {
    int sums[4];
    multiply(sums, a);
    add(sums, bytes);
  }
  KVPLAN_DEVICE void pair(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8],
                          std::uint32_t bytes) {
    tile(a, bytes);
    tile(b, 0);
  }
  KVPLAN_DEVICE void sum(const std::uint32_t (&a)[8], const std::uint32_t (&b)[8],
                         std::uint32_t bytes) {
    int sums[4];
    multiply(sums, a);
    mma_unsigned(sums, b[0], b[1], b[2], b[3], p[0][0][0], p[0][1][0]);
    mma_unsigned(sums, b[4], b[5], b[6], b[7], p[0][2][0], p[0][3][0]);
    add(sums, bytes);
  }
  KVPLAN_DEVICE void half(const std::uint32_t (&a)[4], std::uint32_t bytes) {
    int sums[4];
    multiply_unsigned(sums, a[0], 0, a[1], 0, p[0][0][0], p[0][1][0]);
    mma_unsigned(sums, a[2], 0, a[3], 0, p[0][2][0], p[0][3][0]);
    output->x[0] = fused(digits(sums[0], sums[1]), unit, output->x[0]);
    at += bytes;
    output += kLanes;
  }

 private:
  KVPLAN_DEVICE void multiply(int (&sums)[4], const std::uint32_t (&a)[8]) const {
    multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][0][0], p[0][1][0]);
    mma_unsigned(sums, a[4], a[5], a[6], a[7], p[0][2][0], p[0][3][0]);
  }
  KVPLAN_DEVICE void add(const int (&sums)[4], std::uint32_t bytes) {
    Output<1> o = *output;
#pragma unroll
    for (int h = 0; h < 2; ++h) o.x[h] = fused(digits(sums[2 * h], sums[2 * h + 1]), unit, o.x[h]);
    *output = o;
    at += bytes;
    output += kLanes;
  }
};

// Only tiles of bytes, one block of four columns, centred or not.
class MixedPath {
 public:
  static constexpr int kPages = 1, kBlocks = 1;
  using Feed = RingFeed;

  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<1>& work, Feed& feed,
                                   Running<1>& r, int first, int count) {
    clear_output(work, work.value_tiles);
    write_tables(v, work, count);
    MixedPath path(v, work, r);
#pragma unroll 1
    for (int done = 0; done < count; ++done) {
      if (done % 2 == 0)
        path.begin_pages(done, first + done, first + count - 1);
      else
        path.pass_terms();
      path.attend_page(feed, first + done);
    }
  }

 private:
  using PageScores = Scores<1, 1>;

  KVPLAN_DEVICE static TileTables& tables_of(const Work<1>& work) {
    return *reinterpret_cast<TileTables*>(work.tables);
  }

  // The tables of the segment's runs, each width's in its place, and turns.
  KVPLAN_DEVICE static void write_tables(const AttentionView& v, const Work<1>& work, int count) {
    TileTables& tables = tables_of(work);
    if (lane() < work.key_runs + work.value_runs) {
      const RunEntry& run = work.runs[lane()];
      const int width = run.kind % kHalfKinds;
      for (int i = 0; i < table_words(width); ++i)
        tables.words[lane() < work.key_runs ? 0 : 1][table_word_of(width) + i] = run.levels[i];
    }
    if (v.layer.phase_steps > 0 && count > 2)
      KeyCentre::write_turns(v, reinterpret_cast<float2*>(&tables + 1));
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
        log_norms_(uniform(static_cast<std::uint32_t>(work.norm_bytes[0])) == 1),
        key_norms_(work.key_norms + norm_offset()),
        value_norms_(work.value_norms + norm_offset()),
        centre_(v, work, tables_ + sizeof(TileTables)) {
    const int first = v.layer.sink_tokens, lowest = work.lowest - first;
    const int visible = work.first_query + 1 - first;  // to every query, of the packed tokens
    plain_from_ = lowest > 0 ? (lowest + quant::kPageTokens - 1) / quant::kPageTokens : 0;
    const int until = v.soft_cap > 0 || visible < 0 ? 0 : visible / quant::kPageTokens;
    plain_pages_ = until > plain_from_ ? static_cast<unsigned>(until - plain_from_) : 0;
  }

  KVPLAN_DEVICE std::uint32_t norm_offset() const {
    return (log_norms_ ? 8u : 16u) * static_cast<std::uint32_t>(lane() >> 2);
  }

  // What the scores of a column are differences to.
  KVPLAN_DEVICE float reference() const { return r_.m[0] > kLowest ? r_.m[0] : 0; }

  // Terms of page `page`, the list's `done`, and of the next.
  KVPLAN_DEVICE void begin_pages(int done, int page, int last) {
    if (done % KeyCentre::kFreshPages == 0) centre_.look_at(page, last);
    float terms[kRows][4];
    centre_.next(terms, work_.constant[0] - reference());
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      terms_[k] = terms[k / 2][k % 2 * 2];
      next_terms_[k] = terms[k / 2][k % 2 * 2 + 1];
    }
  }
  KVPLAN_DEVICE void pass_terms() {
#pragma unroll
    for (int k = 0; k < 8; ++k) terms_[k] = next_terms_[k];
  }

  KVPLAN_DEVICE void attend_page(Feed& feed, int page) {
    int sums[kRows][4] = {};
    for_tiles(keys_, tables_, KeyTiles{feed.wait(), query_, sums});
    feed.done();

    const std::uint32_t rest = feed.wait();
    float norms[8];
    read_norms(norms, rest + key_norms_);
    PageScores s;
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      const float product =
          fused(digits(sums[i][2 * h], sums[i][2 * h + 1]), work_.unit[0], work_.bias[0]);
      s[n][i][h][e] = fused(product, norms[2 * i + h], terms_[2 * i + h]);
    });
    if (static_cast<unsigned>(page - plain_from_) >= plain_pages_) [[unlikely]]
      cap_and_mask(s, page);
    follow(s);
    exponentiate<1, 1>(s, r_);

    read_norms(norms, rest + value_norms_);
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      s[n][i][h][e] *= norms[2 * i + h];
      r_.norms[e] += s[n][i][h][e];
    });
    float factor[1], unit[1];
    measure_weights<1, 1>(s, kTopByteWeight, factor, unit);
    ByteWeights<1, 1> p;
    make_byte_weights<1, 1>(p, s, factor);
    for_tiles(values_, tables_ + sizeof(TileTables::words[0]),
              ValueTiles{rest, work_.output + lane(), p, unit[0]});
    feed.done();
  }

  // Norms of the lane's tokens.
  KVPLAN_DEVICE void read_norms(float (&x)[8], std::uint32_t at) const {
    if (log_norms_)
      load_log_norms(x, at);
    else
      load_half_norms(x, at);
  }

  KVPLAN_DEVICE void cap_and_mask(PageScores& s, int page) const {
    if (v_.soft_cap > 0) {
      const float from = reference();
      for_scores<1, 1>([&](int n, int i, int h, int e) { s[n][i][h][e] += from; });
      cap<1, 1>(s, v_.soft_cap);
      for_scores<1, 1>([&](int n, int i, int h, int e) { s[n][i][h][e] -= from; });
    }
    mask<1, 1>(s, v_, work_, v_.layer.sink_tokens + quant::kPageTokens * page, quant::kPageTokens);
  }

  // Lets the maximum follow the scores, and what depends on it.
  KVPLAN_DEVICE void follow(PageScores& s) {
    float top[1];
    largest<1, 1>(s, top);
    if (!any(top[0] > (r_.started ? kSlack : kLowest))) [[likely]]
      return;
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) top[0] = fmaxf(top[0], shuffle_xor(top[0], step));
    const bool known = r_.m[0] > kLowest, seen = top[0] > kLowest;
    const float shift = known ? fmaxf(top[0], 0) : seen ? top[0] : 0;
    const float factor[1] = {known ? exp2_fast(-shift) : 1};
    if (known || seen) r_.m[0] = reference() + shift;
    r_.l[0] *= factor[0];
    r_.norms[0] *= factor[0];
    scale_output<1>(work_, work_.value_tiles, factor);
    for_scores<1, 1>([&](int n, int i, int h, int e) { s[n][i][h][e] -= shift; });
#pragma unroll
    for (int k = 0; k < 8; ++k) next_terms_[k] -= shift;
    r_.started = !any(r_.m[0] <= kLowest);
  }

  const AttentionView& v_;
  const Work<1>& work_;
  Running<1>& r_;
  const TileCounts keys_, values_;
  std::uint32_t tables_, query_;
  bool log_norms_;
  std::uint32_t key_norms_, value_norms_;  // of the lane, in the second half of a page
  int plain_from_;                         // pages that need neither cap nor mask
  unsigned plain_pages_;
  KeyCentre centre_;
  float terms_[8], next_terms_[8];  // added to scores: what centring took, minus reference()
};

}  // namespace kvplan::kernels
