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

// What a warp does with a page: fp16 norms, full tiles, one block of four columns, keys not centred
// by position.
template <int KeyWidth, int ValueWidth, int Tiles>
class UniformPage {
 protected:
  using PageScores = Scores<1, 1>;

  KVPLAN_DEVICE UniformPage(const AttentionView& v, const Work<1>& work, Running<1>& r)
      : v_(v),
        work_(work),
        r_(r),
        key_tile_(work.runs[0].levels),
        value_tile_(work.runs[1].levels) {}

  // sums_ += tiles j, j + 1 of the keys at `keys` . queries.
  KVPLAN_DEVICE void add_scores(std::uint32_t keys, int j, std::uint32_t query,
                                std::uint32_t next_query) {
    std::uint32_t a[2][8];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t w[KeyWidth];
      key_tile_.load(w, keys + static_cast<std::uint32_t>(j + k) * (128 * KeyWidth));
      key_tile_.registers(w, a[k]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      mma_bytes(sums_[i], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i], a[1][2 * i + 1], query,
                next_query);
  }
  // The same with queries from shared memory, in a short loop: code that runs for the first time
  // waits for its instructions.
  KVPLAN_DEVICE void add_all_scores(std::uint32_t keys) {
#pragma unroll 1
    for (int j = 0; j < Tiles; j += 2)
      add_scores(keys, j, work_.query[j * kLanes + lane()].x,
                 work_.query[(j + 1) * kLanes + lane()].x);
  }

  // o += values of tile j at `values` . weights.
  KVPLAN_DEVICE void add_values(std::uint32_t values, int j, const ByteWeights<1, 1>& p, float unit,
                                float (&o)[2]) const {
    std::uint32_t w[ValueWidth], a[8];
    value_tile_.load(w, values + static_cast<std::uint32_t>(j) * (128 * ValueWidth));
    value_tile_.registers(w, a);
    int sums[4];
    multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][0][0], p[0][1][0]);
    mma_unsigned(sums, a[4], a[5], a[6], a[7], p[0][2][0], p[0][3][0]);
#pragma unroll
    for (int h = 0; h < 2; ++h) o[h] = fused(digits(sums[2 * h], sums[2 * h + 1]), unit, o[h]);
  }

  // The sums become scores without norms.
  KVPLAN_DEVICE void take_scores(PageScores& s) {
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      s[n][i][h][e] =
          fused(digits(sums_[i][2 * h], sums_[i][2 * h + 1]), work_.unit[0], work_.bias[0]);
    });
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums_[i][k] = 0;
  }

  // Scores of page `page` with norms, caps and masks, relative to the running maximum, which
  // follows; scale(factor) multiplies the outputs.
  template <class Scale>
  KVPLAN_DEVICE void relate(PageScores& s, const float (&norms)[8], int page, Scale scale) {
    const int first = v_.layer.sink_tokens + quant::kPageTokens * page;
    const bool whole = first + quant::kPageTokens - 1 <= work_.first_query && first >= work_.lowest;
    const bool plain = r_.started && whole && !v_.layer.k_mean && !(v_.soft_cap > 0);
    if (plain) {
      for_scores<1, 1>([&](int n, int i, int h, int e) {
        s[n][i][h][e] = fused(s[n][i][h][e], norms[2 * i + h], -r_.m[0]);
      });
    } else {
      const float constant = v_.layer.k_mean ? work_.constant[0] : 0;
      for_scores<1, 1>([&](int n, int i, int h, int e) {
        s[n][i][h][e] = fused(s[n][i][h][e], norms[2 * i + h], constant);
      });
      if (v_.soft_cap > 0) cap<1, 1>(s, v_.soft_cap);
      if (!whole) mask<1, 1>(s, v_, work_, first, quant::kPageTokens);
    }
    follow_maximum<1, 1>(r_, s, plain, scale);
  }

  // Probabilities become weights.
  KVPLAN_DEVICE void weigh(PageScores& s, std::uint32_t values, float (&factor)[1],
                           float (&unit)[1]) {
    float norms[8];
    load_norms(norms, values + work_.value_norms, 2);
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      s[n][i][h][e] *= norms[2 * i + h];
      r_.norms[e] += s[n][i][h][e];
    });
    measure_weights<1, 1>(s, kTopByteWeight, factor, unit);
  }

  const AttentionView& v_;
  const Work<1>& work_;
  Running<1>& r_;
  const ByteTile<KeyWidth> key_tile_;
  const ByteTile<ValueWidth> value_tile_;
  int sums_[kRows][4] = {};  // of the page to come
};

// A few pages, or more tiles than registers hold: the code is loops over tiles, outputs are in
// shared memory.
template <int KeyWidth, int ValueWidth, int Tiles>
class FewPages : UniformPage<KeyWidth, ValueWidth, Tiles> {
 public:
  using Page = UniformPage<KeyWidth, ValueWidth, Tiles>;

  KVPLAN_DEVICE FewPages(const AttentionView& v, const Work<1>& work, Running<1>& r)
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
      float norms[8], factor[1], unit[1];
      load_norms(norms, values + this->work_.key_norms, 2);
      this->relate(s, norms, first + page,
                   [&](const float(&by)[1]) { scale_output<1>(this->work_, Tiles, by); });
      exponentiate<1, 1>(s, this->r_);
      this->weigh(s, values, factor, unit);
      ByteWeights<1, 1> p;
      make_byte_weights<1, 1>(p, s, factor);
#pragma unroll 1
      for (int j = 0; j < Tiles; ++j)
        this->add_values(values, j, p, unit[0], this->work_.output[j * kLanes + lane()].x);
      feed.done();
    }
  }
};

// Loops are unrolled, queries and outputs stay in registers.
template <int KeyWidth, int ValueWidth, int Tiles>
class ManyPages : UniformPage<KeyWidth, ValueWidth, Tiles> {
 public:
  using Page = UniformPage<KeyWidth, ValueWidth, Tiles>;

  KVPLAN_DEVICE ManyPages(const AttentionView& v, const Work<1>& work, Running<1>& r)
      : Page(v, work, r) {
#pragma unroll
    for (int j = 0; j < Tiles; ++j) query_[j] = work.query[j * kLanes + lane()].x;
  }

  KVPLAN_DEVICE void attend(HalfFeed& feed, int first, int count) {
    this->add_all_scores(feed.wait());
    feed.done();
#pragma unroll 1
    for (int page = 0; page < count; ++page) attend_page(feed, first + page, page + 1 < count);
#pragma unroll
    for (int j = 0; j < Tiles; ++j)
      this->work_.output[j * kLanes + lane()] = {{output_[j][0], output_[j][1]}};
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

    float norms[8], factor[1], unit[1];
    load_norms(norms, values + this->work_.key_norms, 2);
    add_scores(keys, 0);
    this->relate(s, norms, page, [&](const float(&by)[1]) {
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) output_[j][h] *= by[0];
    });
    if constexpr (Tiles > 2) add_scores(keys, 2);
    exponentiate<1, 1>(s, this->r_);
    this->weigh(s, values, factor, unit);
#pragma unroll
    for (int j = 4; j < Tiles; j += 2) add_scores(keys, j);
    if (more) feed.done();
    ByteWeights<1, 1> p;
    make_byte_weights<1, 1>(p, s, factor);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) this->add_values(values, j, p, unit[0], output_[j]);
    feed.done();
  }

  std::uint32_t query_[Tiles];
  float output_[Tiles][2] = {};
};

template <int KeyWidth, int ValueWidth, int Tiles>
struct UniformPath {
  static constexpr int kPages = 1, kBlocks = 1, kWarps = kDecodeWarps;
  using Feed = HalfFeed;

  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<1>& work, Feed& feed,
                                   Running<1>& r, int first, int count) {
    // What loops cost more they save in instructions that come late.
    constexpr int kFew = 8;
    if constexpr (Tiles <= kMostUnrolledTiles) {
      if (count > kFew) {
        ManyPages<KeyWidth, ValueWidth, Tiles>(v, work, r).attend(feed, first, count);
        return;
      }
    }
    FewPages<KeyWidth, ValueWidth, Tiles>(v, work, r).attend(feed, first, count);
  }
};

}  // namespace kvplan::kernels
