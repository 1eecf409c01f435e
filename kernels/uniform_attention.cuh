#pragma once
// Attention of one segment over pages whose tiles of keys have one width, and those of values:
// nothing is looked up, and the scores of a page are summed while the values of the page before are
// weighted, so that each fills the other's waits. Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// What a warp does with a page: fp16 norms, full tiles, one block of four columns or two, keys not
// centred by position. Levels become bytes once for all columns.
template <int KeyWidth, int ValueWidth, int Tiles, int Blocks>
class UniformPage {
 protected:
  using PageScores = Scores<Blocks>;
  using Query = std::uint32_t[Blocks];  // of a tile: uint2 of AttentionView, "Queries"

  KVPLAN_DEVICE UniformPage(const AttentionView& v, const Work<Blocks>& work, Running<Blocks>& r)
      : v_(v),
        work_(work),
        r_(r),
        key_tile_(work.runs[0].levels),
        value_tile_(work.runs[1].levels) {}

  KVPLAN_DEVICE void load_query(Query& query, int j) const {
    // One by one: an mma wants the words of two tiles side by side, not those of two blocks.
    const std::uint32_t from = shared_address(work_.query + j * kLanes + lane());
#pragma unroll
    for (int e = 0; e < Blocks; ++e) query[e] = load_shared1(from + 4 * e);
  }

  // sums_ += tiles j, j + 1 of the keys at `keys` . queries.
  KVPLAN_DEVICE void add_scores(std::uint32_t keys, int j, const Query& query,
                                const Query& next_query) {
    std::uint32_t a[2][8];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t w[KeyWidth];
      key_tile_.load(w, keys + static_cast<std::uint32_t>(j + k) * (128 * KeyWidth));
      key_tile_.registers(w, a[k]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int e = 0; e < Blocks; ++e)
        mma_bytes(sums_[e][i], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i], a[1][2 * i + 1], query[e],
                  next_query[e]);
  }
  // The same with queries from shared memory, in a short loop: code that runs for the first time
  // waits for its instructions.
  KVPLAN_DEVICE void add_all_scores(std::uint32_t keys) {
#pragma unroll 1
    for (int j = 0; j < Tiles; j += 2) {
      Query query, next_query;
      load_query(query, j);
      load_query(next_query, j + 1);
      add_scores(keys, j, query, next_query);
    }
  }

  // o += values of tile j at `values` . weights.
  KVPLAN_DEVICE void add_values(std::uint32_t values, int j, const ByteWeights<Blocks>& p,
                                const float (&unit)[Blocks], float (&o)[2 * Blocks]) const {
    std::uint32_t w[ValueWidth], a[8];
    value_tile_.load(w, values + static_cast<std::uint32_t>(j) * (128 * ValueWidth));
    value_tile_.registers(w, a);
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      int sums[4];
      multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][e], p[1][e]);
      mma_unsigned(sums, a[4], a[5], a[6], a[7], p[2][e], p[3][e]);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        o[2 * e + h] = fused(digits(sums[2 * h], sums[2 * h + 1]), unit[e], o[2 * e + h]);
    }
  }

  // The sums become scores without norms.
  KVPLAN_DEVICE void take_scores(PageScores& s) {
    for_scores<Blocks>([&](int i, int h, int e) {
      s[i][h][e] =
          fused(digits(sums_[e][i][2 * h], sums_[e][i][2 * h + 1]), work_.unit[e], work_.bias[e]);
    });
#pragma unroll
    for (int e = 0; e < Blocks; ++e)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[e][i][k] = 0;
  }

  // Scores of page `page` with norms, caps and masks, relative to the running maximum, which
  // follows; scale(factors) multiplies the outputs.
  template <class Scale>
  KVPLAN_DEVICE void relate(PageScores& s, const float (&norms)[8], int page, Scale scale) {
    const int first = v_.layer.sink_tokens + quant::kPageTokens * page;
    const bool whole = first + quant::kPageTokens - 1 <= work_.first_query && first >= work_.lowest;
    const bool plain = r_.started && whole && !v_.layer.k_mean && !(v_.soft_cap > 0);
    if (plain) {
      for_scores<Blocks>(
          [&](int i, int h, int e) { s[i][h][e] = fused(s[i][h][e], norms[2 * i + h], -r_.m[e]); });
    } else {
      for_scores<Blocks>([&](int i, int h, int e) {
        const float constant = v_.layer.k_mean ? work_.constant[e] : 0;
        s[i][h][e] = fused(s[i][h][e], norms[2 * i + h], constant);
      });
      if (v_.soft_cap > 0) cap<Blocks>(s, v_.soft_cap);
      if (!whole) mask<Blocks>(s, v_, work_, first);
    }
    follow_maximum<Blocks>(r_, s, plain, scale);
  }

  // Probabilities become weights.
  KVPLAN_DEVICE void weigh(PageScores& s, std::uint32_t values, float (&factor)[Blocks],
                           float (&unit)[Blocks]) {
    float norms[8];
    load_norms(norms, values + work_.value_norms, 2);
    for_scores<Blocks>([&](int i, int h, int e) {
      s[i][h][e] *= norms[2 * i + h];
      r_.norms[e] += s[i][h][e];
    });
    measure_weights<Blocks>(s, kTopByteWeight, factor, unit);
  }

  const AttentionView& v_;
  const Work<Blocks>& work_;
  Running<Blocks>& r_;
  const ByteTile<KeyWidth> key_tile_;
  const ByteTile<ValueWidth> value_tile_;
  int sums_[Blocks][kRows][4] = {};  // of the page to come
};

// A few pages, or more tiles than registers hold: the code is loops over tiles, outputs are in
// shared memory.
template <int KeyWidth, int ValueWidth, int Tiles, int Blocks>
class FewPages : UniformPage<KeyWidth, ValueWidth, Tiles, Blocks> {
 public:
  using Page = UniformPage<KeyWidth, ValueWidth, Tiles, Blocks>;

  KVPLAN_DEVICE FewPages(const AttentionView& v, const Work<Blocks>& work, Running<Blocks>& r)
      : Page(v, work, r) {}

  KVPLAN_DEVICE void attend(HalfFeed& feed, int first, int count) {
    clear_output(this->work_, Tiles);
    this->add_all_scores(feed.wait());
    feed.done();
#pragma unroll 1
    for (int page = 0; page < count; ++page) {
      const bool more = page + 1 < count;
      typename Page::PageScores s;
      this->take_scores(s);
      if (more) {
        this->add_all_scores(feed.wait());
        feed.done();
      }
      const std::uint32_t values = feed.wait();
      float norms[8], factor[Blocks], unit[Blocks];
      load_norms(norms, values + this->work_.key_norms, 2);
      this->relate(s, norms, first + page,
                   [&](const float(&by)[Blocks]) { scale_output<Blocks>(this->work_, Tiles, by); });
      exponentiate<Blocks>(s, this->r_);
      this->weigh(s, values, factor, unit);
      ByteWeights<Blocks> p;
      make_byte_weights<Blocks>(p, s, factor);
#pragma unroll 1
      for (int j = 0; j < Tiles; ++j) {
        Output<Blocks>& to = this->work_.output[j * kLanes + lane()];
        Output<Blocks> o = to;
        this->add_values(values, j, p, unit, o.x);
        to = o;
      }
      feed.done();
    }
  }
};

// Loops are unrolled, queries and outputs stay in registers.
template <int KeyWidth, int ValueWidth, int Tiles, int Blocks>
class ManyPages : UniformPage<KeyWidth, ValueWidth, Tiles, Blocks> {
 public:
  using Page = UniformPage<KeyWidth, ValueWidth, Tiles, Blocks>;

  KVPLAN_DEVICE ManyPages(const AttentionView& v, const Work<Blocks>& work, Running<Blocks>& r)
      : Page(v, work, r) {
#pragma unroll
    for (int j = 0; j < Tiles; ++j) this->load_query(query_[j], j);
  }

  KVPLAN_DEVICE void attend(HalfFeed& feed, int first, int count) {
    this->add_all_scores(feed.wait());
    feed.done();
#pragma unroll 1
    for (int page = 0; page < count; ++page) attend_page(feed, first + page, page + 1 < count);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) this->work_.output[j * kLanes + lane()] = output_[j];
  }

 private:
  KVPLAN_DEVICE void add_scores(std::uint32_t keys, int j) {
    Page::add_scores(keys, j, query_[j], query_[j + 1]);
  }
  // Turns the sums of page `page` into its part of the outputs; `more`: a page follows, whose sums
  // are left.
  KVPLAN_DEVICE void attend_page(HalfFeed& feed, int page, bool more) {
    typename Page::PageScores s;
    this->take_scores(s);
    // Behind the last page any bytes serve: their sums are not used.
    std::uint32_t keys = 0;
    if (more) keys = feed.wait();
    const std::uint32_t values = feed.wait();
    if (!more) keys = values;

    float norms[8], factor[Blocks], unit[Blocks];
    load_norms(norms, values + this->work_.key_norms, 2);
    add_scores(keys, 0);
    this->relate(s, norms, page, [&](const float(&by)[Blocks]) {
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int k = 0; k < 2 * Blocks; ++k) output_[j].x[k] *= by[k / 2];
    });
    if constexpr (Tiles > 2) add_scores(keys, 2);
    exponentiate<Blocks>(s, this->r_);
    this->weigh(s, values, factor, unit);
#pragma unroll
    for (int j = 4; j < Tiles; j += 2) add_scores(keys, j);
    if (more) feed.done();
    ByteWeights<Blocks> p;
    make_byte_weights<Blocks>(p, s, factor);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) this->add_values(values, j, p, unit, output_[j].x);
    feed.done();
  }

  typename Page::Query query_[Tiles];
  Output<Blocks> output_[Tiles] = {};
};

template <int KeyWidth, int ValueWidth, int Tiles, int Blocks>
struct UniformPath {
  static constexpr int kBlocks = Blocks, kWarps = uniform_warps(4 * Blocks);
  using Feed = HalfFeed;

  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<Blocks>& work, Feed& feed,
                                   Running<Blocks>& r, int first, int count) {
    // What loops cost more they save in instructions that come late.
    constexpr int kFew = 8;
    if constexpr (Tiles <= kMostUnrolledTiles) {
      if (count > kFew) {
        ManyPages<KeyWidth, ValueWidth, Tiles, Blocks>(v, work, r).attend(feed, first, count);
        return;
      }
    }
    FewPages<KeyWidth, ValueWidth, Tiles, Blocks>(v, work, r).attend(feed, first, count);
  }
};

}  // namespace kvplan::kernels
