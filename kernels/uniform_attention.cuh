#pragma once
// Attention of one segment over pages whose tiles of keys have one width, and those of values:
// nothing is looked up, loops are unrolled, queries and outputs stay in registers, and the scores
// of a page are summed while the values of the page before are weighted, so that each fills the
// other's waits. Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// fp16 norms, full tiles, one block of four columns, keys not centred by position.
template <int KeyWidth, int ValueWidth, int Tiles>
class UniformPath {
 public:
  static constexpr int kPages = 1, kBlocks = 1, kWarps = kDecodeWarps;
  using Feed = HalfFeed;

  KVPLAN_DEVICE static void attend(const AttentionView& v, const Work<1>& work, Feed& feed,
                                   Running<1>& r, int first, int count) {
    UniformPath path(v, work, r);
    const std::uint32_t keys = feed.wait();
#pragma unroll
    for (int j = 0; j < Tiles; j += 2) path.add_scores(keys, j);
    feed.done();
#pragma unroll 1
    for (int page = 0; page < count; ++page) path.attend_page(feed, first + page, page + 1 < count);
#pragma unroll
    for (int j = 0; j < Tiles; ++j)
      work.output[j * kLanes + lane()] = {{path.output_[j][0], path.output_[j][1]}};
  }

 private:
  using PageScores = Scores<1, 1>;

  KVPLAN_DEVICE UniformPath(const AttentionView& v, const Work<1>& work, Running<1>& r)
      : v_(v),
        work_(work),
        r_(r),
        key_tile_(work.runs[0].levels),
        value_tile_(work.runs[1].levels) {
#pragma unroll
    for (int j = 0; j < Tiles; ++j) query_[j] = work.query[j * kLanes + lane()].x;
  }

  // sums_ += tiles j, j + 1 of the keys at `keys` . query.
  KVPLAN_DEVICE void add_scores(std::uint32_t keys, int j) {
    std::uint32_t a[2][8];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t w[KeyWidth];
      key_tile_.load(w, keys + (j + k) * 128 * KeyWidth);
      key_tile_.registers(w, a[k]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      mma_bytes(sums_[i], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i], a[1][2 * i + 1], query_[j],
                query_[j + 1]);
  }

  // output_ += values of tile j at `values` . weights.
  KVPLAN_DEVICE void add_values(std::uint32_t values, int j, const ByteWeights<1, 1>& p,
                                float unit) {
    std::uint32_t w[ValueWidth], a[8];
    value_tile_.load(w, values + j * 128 * ValueWidth);
    value_tile_.registers(w, a);
    int sums[4];
    multiply_unsigned(sums, a[0], a[1], a[2], a[3], p[0][0][0], p[0][1][0]);
    mma_unsigned(sums, a[4], a[5], a[6], a[7], p[0][2][0], p[0][3][0]);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      output_[j][h] = fused(digits(sums[2 * h], sums[2 * h + 1]), unit, output_[j][h]);
  }

  // Turns the sums of page `page` into its part of the outputs; `more`: a page follows, whose sums
  // are left.
  KVPLAN_DEVICE void attend_page(Feed& feed, int page, bool more) {
    PageScores s;
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      s[n][i][h][e] =
          fused(digits(sums_[i][2 * h], sums_[i][2 * h + 1]), work_.unit[0], work_.bias[0]);
    });
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums_[i][k] = 0;
    // Behind the last page any bytes serve: their sums are not used.
    std::uint32_t keys = 0;
    if (more) keys = feed.wait();
    const std::uint32_t values = feed.wait();
    if (!more) keys = values;

    float norms[8];
    load_norms(norms, values + work_.key_norms, 2);
    add_scores(keys, 0);
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
    follow_maximum<1, 1>(r_, s, plain, [&](const float(&factor)[1]) {
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) output_[j][h] *= factor[0];
    });
    if constexpr (Tiles > 2) add_scores(keys, 2);
    exponentiate<1, 1>(s, r_);
    load_norms(norms, values + work_.value_norms, 2);
    PageScores w;
    for_scores<1, 1>([&](int n, int i, int h, int e) {
      w[n][i][h][e] = s[n][i][h][e] * norms[2 * i + h];
      r_.norms[e] += w[n][i][h][e];
    });
    float factor[1], unit[1];
    measure_weights<1, 1>(w, kTopByteWeight, factor, unit);
#pragma unroll
    for (int j = 4; j < Tiles; j += 2) add_scores(keys, j);
    if (more) feed.done();
    ByteWeights<1, 1> p;
    make_byte_weights<1, 1>(p, w, factor);
#pragma unroll
    for (int j = 0; j < Tiles; ++j) add_values(values, j, p, unit[0]);
    feed.done();
  }

  const AttentionView& v_;
  const Work<1>& work_;
  Running<1>& r_;
  const ByteTile<KeyWidth> key_tile_;
  const ByteTile<ValueWidth> value_tile_;
  std::uint32_t query_[Tiles];
  float output_[Tiles][2] = {};
  int sums_[kRows][4] = {};  // of the page to come
};

}  // namespace kvplan::kernels
