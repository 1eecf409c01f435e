#include "quant/moments.h"

#include <string>

#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// A complex number; std::complex would check every product for NaN.
struct Phase {
  double re = 0, im = 0;
};
Phase operator+(Phase a, Phase b) { return {a.re + b.re, a.im + b.im}; }
Phase operator*(Phase a, Phase b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
Phase conj(Phase a) { return {a.re, -a.im}; }
Phase unit_phase(double angle) { return {portable_cos(angle), portable_sin(angle)}; }

/// Mean of e^{i theta t} over t = first..last. The geometric sum is doubled bit by bit of the
/// count, S_2m = S_m (1 + z^m), which needs no division by 1 - z and so no care near theta = 0; the
/// error grows to count x 1e-16.
Phase mean_phase(double theta, std::int64_t first, std::int64_t last) {
  const auto count = static_cast<std::uint64_t>(last - first + 1);
  const Phase z = unit_phase(theta);
  Phase sum{0, 0}, power{1, 0};
  for (int bit = 63 - __builtin_clzll(count); bit >= 0; --bit) {
    sum = sum + sum * power;
    power = power * power;
    if (count >> bit & 1) {
      sum = sum + power;
      power = power * z;
    }
  }
  const Phase mean = sum * unit_phase(theta * static_cast<double>(first));
  return {mean.re / static_cast<double>(count), mean.im / static_cast<double>(count)};
}

/// The map X -> mean of R_t X R_t^T. With z_a = x_a + i x_{a+r/2}, R_t multiplies z_a by e^{i
/// theta_a t}, so the products z_a z_b*, z_a z_b and z_a x_u (u not rotated) are multiplied by mean
/// phases of theta_a - theta_b, theta_a + theta_b, theta_a.
class PositionAverage {
 public:
  PositionAverage(int d, int rotary_dim, std::span<const double> inv_freq, std::int64_t first,
                  std::int64_t last)
      : d_(d),
        half_(rotary_dim / 2),
        single_(half_),
        difference_(half_ * half_),
        sum_(half_ * half_) {
    for (std::size_t a = 0; a < half_; ++a) {
      single_[a] = mean_phase(inv_freq[a], first, last);
      for (std::size_t b = 0; b <= a; ++b) {
        const Phase turned_apart = mean_phase(inv_freq[a] - inv_freq[b], first, last);
        difference_[a * half_ + b] = turned_apart;
        difference_[b * half_ + a] = conj(turned_apart);
        sum_[a * half_ + b] = sum_[b * half_ + a] =
            mean_phase(inv_freq[a] + inv_freq[b], first, last);
      }
    }
  }

  std::vector<double> operator()(std::span<const double> x) const {
    std::vector<double> out(x.begin(), x.end());
    for (std::size_t a = 0; a < half_; ++a) {
      const std::size_t row = a * d_, paired_row = (a + half_) * d_;
      for (std::size_t b = 0; b < half_; ++b) {
        const double ab = x[row + b], ab2 = x[row + b + half_];
        const double a2b = x[paired_row + b], a2b2 = x[paired_row + b + half_];
        const Phase p = Phase{ab + a2b2, a2b - ab2} * difference_[a * half_ + b];
        const Phase q = Phase{ab - a2b2, a2b + ab2} * sum_[a * half_ + b];
        out[row + b] = (p.re + q.re) / 2;
        out[row + b + half_] = (q.im - p.im) / 2;
        out[paired_row + b] = (p.im + q.im) / 2;
        out[paired_row + b + half_] = (p.re - q.re) / 2;
      }
      for (std::size_t u = 2 * half_; u < d_; ++u) {
        const Phase column = Phase{x[row + u], x[paired_row + u]} * single_[a];
        out[row + u] = column.re;
        out[paired_row + u] = column.im;
        const Phase line = Phase{x[u * d_ + a], x[u * d_ + a + half_]} * single_[a];
        out[u * d_ + a] = line.re;
        out[u * d_ + a + half_] = line.im;
      }
    }
    return out;
  }

 private:
  std::size_t d_, half_;
  std::vector<Phase> single_, difference_, sum_;
};

std::span<const double> matrix_of(const Array<double>& matrices, int head, std::size_t size) {
  return std::span(matrices.data).subspan(static_cast<std::size_t>(head) * size, size);
}

}  // namespace

std::vector<double> average_over_positions(std::span<const double> x, int d, int rotary_dim,
                                           std::span<const double> inv_freq, std::int64_t first,
                                           std::int64_t last) {
  const auto size = static_cast<std::size_t>(d) * static_cast<std::size_t>(d);
  if (d <= 0 || x.size() != size)
    throw ArgumentError("average_over_positions: expected a matrix of " + std::to_string(size) +
                        " values for d = " + std::to_string(d) + ", found " +
                        std::to_string(x.size()));
  if (rotary_dim < 0 || rotary_dim > d || rotary_dim % 2 != 0 ||
      inv_freq.size() != static_cast<std::size_t>(rotary_dim / 2))
    throw ArgumentError("average_over_positions: expected an even rotary_dim of at most " +
                        std::to_string(d) + " and rotary_dim/2 frequencies, found " +
                        std::to_string(rotary_dim) + " and " + std::to_string(inv_freq.size()));
  if (first < 0 || last < first)
    throw ArgumentError("average_over_positions: expected positions 0 <= first <= last, found " +
                        std::to_string(first) + ".." + std::to_string(last));
  return PositionAverage(d, rotary_dim, inv_freq, first, last)(x);
}

HeadMoments head_moments(const Profile& profile, int layer, Side side, int head,
                         std::int64_t context, bool centre) {
  const LayerProfile& from = profile.layers.at(static_cast<std::size_t>(layer));
  const SideSums& sums = from.side(side);
  const auto d = static_cast<std::size_t>(from.head_dim);
  const auto n = static_cast<double>(profile.tokens);
  const auto fisher_n = static_cast<double>(profile.fisher_tokens);

  HeadMoments moments;
  moments.mean.assign(d, 0);
  if (centre) {
    const auto sum = sums.sum.row(static_cast<std::size_t>(head));
    for (std::size_t i = 0; i < d; ++i) moments.mean[i] = sum[i] / n;
  }
  const auto outer = matrix_of(sums.outer, head, d * d);
  const auto fisher = matrix_of(sums.fisher, head, d * d);
  moments.second.resize(d * d);
  moments.fisher.resize(d * d);
  for (std::size_t i = 0; i < d; ++i) {
    for (std::size_t j = 0; j < d; ++j) {
      moments.second[i * d + j] = outer[i * d + j] / n - moments.mean[i] * moments.mean[j];
      moments.fisher[i * d + j] = fisher[i * d + j] / fisher_n;
    }
  }
  if (side == Side::kKey && from.rotary_dim > 0) {
    const PositionAverage average(from.head_dim, from.rotary_dim, from.inv_freq,
                                  profile.sink_tokens, context - 1);
    moments.second = average(moments.second);
    moments.fisher = average(moments.fisher);
  }
  return moments;
}

std::vector<double> centred_cross(const Profile& profile, int layer, Side side, int head, int s,
                                  std::span<const double> mean) {
  const LayerProfile& from = profile.layers.at(static_cast<std::size_t>(layer));
  const SideSums& sums = from.side(side);
  const auto d = static_cast<std::size_t>(from.head_dim);
  const std::size_t half = side == Side::kKey ? static_cast<std::size_t>(from.rotary_dim) / 2 : 0;
  const std::size_t phases = 2 * half + 1;
  const std::size_t block = static_cast<std::size_t>(s) * static_cast<std::size_t>(from.kv_heads) +
                            static_cast<std::size_t>(head);
  const float* cross = sums.cross.data.data() + block * d * d;
  const float* phase = sums.phase.data.data() + block * d * phases;

  std::vector<double> out(d * d);
  for (std::size_t i = 0; i < d; ++i) {
    const float* h_cos = phase + i * phases;
    const float* h_sin = h_cos + half;
    const double h_sum = h_cos[2 * half];
    double* row = out.data() + i * d;
    for (std::size_t j = 0; j < half; ++j) {
      row[j] = cross[i * d + j] - (h_cos[j] * mean[j] - h_sin[j] * mean[j + half]);
      row[j + half] = cross[i * d + j + half] - (h_sin[j] * mean[j] + h_cos[j] * mean[j + half]);
    }
    for (std::size_t j = 2 * half; j < d; ++j) row[j] = cross[i * d + j] - h_sum * mean[j];
  }
  return out;
}

}  // namespace kvplan::quant
