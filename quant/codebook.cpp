#include "quant/codebook.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

#include "quant/byte_levels.h"
#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr double kInverseSqrt2Pi = 0.39894228040143267794;

// Of one cell [a,b] with level c: the integrals of f and of (x - c) f.
struct CellMoments {
  double mass = 0, centred = 0;
};

/// A symmetric log-concave density of unit variance on [-edge, edge].
class Density {
 public:
  virtual ~Density() = default;
  virtual double value(double x) const = 0;
  virtual double edge() const = 0;

  /// Gauss-Legendre with 8 nodes on pieces of at most 1/4, exact to rounding for these densities.
  /// The moment is taken about the level: a difference of closed forms would lose it in the narrow
  /// cells of 7 and 8 bits.
  CellMoments moments(double a, double b, double level) const {
    static constexpr std::array<std::pair<double, double>, 4> kNodeWeight = {{
        {0.18343464249564980494, 0.36268378337836198297},
        {0.52553240991632898582, 0.31370664587788728734},
        {0.79666647741362673959, 0.22238103445337447054},
        {0.96028985649753623168, 0.10122853629037625915},
    }};
    const int pieces = static_cast<int>(std::ceil((b - a) * 4));
    const double half = (b - a) / (2 * pieces);
    CellMoments sum;
    for (int i = 0; i < pieces; ++i) {
      const double centre = a + (2 * i + 1) * half;
      for (const auto& [node, weight] : kNodeWeight)
        for (const double x : {centre - node * half, centre + node * half}) {
          const double mass = weight * half * value(x);
          sum.mass += mass;
          sum.centred += (x - level) * mass;
        }
    }
    return sum;
  }
};

class Gaussian : public Density {
 public:
  double value(double x) const override { return kInverseSqrt2Pi * portable_exp(-0.5 * x * x); }
  double edge() const override { return 12; }  // the mass beyond is below 1e-32
};

// A coordinate of a uniform unit vector in R^d times sqrt(d): f(x) = C u^((d-3)/2), u = 1 - x^2/d.
class UnitVectorCoordinate : public Density {
 public:
  explicit UnitVectorCoordinate(int d) : d_(d) { scale_ = 0.5 / moments(0, edge(), 0).mass; }
  double value(double x) const override { return scale_ * power_of_sqrt(x, d_ - 3); }
  double edge() const override { return std::sqrt(static_cast<double>(d_)); }

 private:
  // u^(exponent/2) by repeated squaring.
  double power_of_sqrt(double x, int exponent) const {
    double base = std::sqrt(std::max(0.0, 1 - x * x / d_)), power = 1;
    for (; exponent > 0; exponent /= 2, base *= base)
      if (exponent % 2) power *= base;
    return power;
  }
  int d_;
  double scale_ = 1;
};

void require_bits(int bits) {
  if (bits < 1 || bits > kMaxCodebookBits)
    throw ArgumentError("a codebook has 1 to " + std::to_string(kMaxCodebookBits) + " bits, got " +
                        std::to_string(bits));
}

// The cells of the positive half: calls visit(i, lower, upper, last) with the midpoints as limits.
template <class Visit>
void for_each_cell(const Density& density, const std::vector<double>& levels, Visit visit) {
  double lower = 0;
  for (std::size_t i = 0; i < levels.size(); ++i) {
    const bool last = i + 1 == levels.size();
    const double upper = last ? density.edge() : 0.5 * (levels[i] + levels[i + 1]);
    visit(i, lower, upper, last);
    lower = upper;
  }
}

// Mirrors the positive levels about 0. Distortion: E X^2 - 2 E X c + E c^2.
Codebook mirrored(const Density& density, const std::vector<double>& positive, int bits) {
  Codebook book;
  book.bits = bits;
  for (auto level = positive.rbegin(); level != positive.rend(); ++level)
    book.levels.push_back(static_cast<float>(-*level));
  for (const double level : positive) book.levels.push_back(static_cast<float>(level));
  book.boundaries = midpoints(book.levels);
  double gain = 0;
  for_each_cell(density, positive, [&](std::size_t i, double lower, double upper, bool) {
    const auto [mass, centred] = density.moments(lower, upper, positive[i]);
    gain += positive[i] * (2 * centred + positive[i] * mass);
  });
  book.distortion = 1 - 2 * gain;
  return book;
}

// Newton's method on the centroid conditions of the positive half, whose Jacobian is tridiagonal.
// The densities are log-concave, so there is one solution and it is the best (Fleischer 1964).
Codebook lloyd_max(const Density& density, int bits) {
  require_bits(bits);
  const std::size_t n = std::size_t{1} << (bits - 1);
  // The point density of a fine optimal quantizer is f^(1/3): for N(0,1) the quantiles of N(0,3)
  // (Panter and Dite 1951).
  std::vector<double> levels(n);
  for (std::size_t i = 0; i < n; ++i) {
    const double rank = 0.5 + (static_cast<double>(i) + 0.5) / (2 * static_cast<double>(n));
    levels[i] = std::sqrt(3.0) * normal_quantile(rank);
  }
  const double shrink = std::min(1.0, 0.95 * density.edge() / levels.back());
  for (double& level : levels) level *= shrink;

  constexpr int kMaxIterations = 100;
  constexpr double kTolerance = 1e-12;
  std::vector<double> masses(n), below(n), diagonal(n), above(n), step(n), lloyd(n);
  for (int iteration = 0; iteration < kMaxIterations; ++iteration) {
    for_each_cell(density, levels, [&](std::size_t i, double lower, double upper, bool last) {
      const auto [mass, centred] = density.moments(lower, upper, levels[i]);
      const double at_lower = i == 0 ? 0 : 0.5 * (levels[i] - lower) * density.value(lower);
      const double at_upper = last ? 0 : 0.5 * (levels[i] - upper) * density.value(upper);
      masses[i] = mass;
      below[i] = -at_lower;
      above[i] = at_upper;
      diagonal[i] = mass - at_lower + at_upper;
      step[i] = -centred;
    });
    // Where the error is not convex yet, one Lloyd step (each level to its cell's centroid) is
    // taken instead.
    lloyd = step;
    bool convex = diagonal[0] > 0;
    for (std::size_t i = 1; i < n; ++i) {
      const double factor = below[i] / diagonal[i - 1];
      diagonal[i] -= factor * above[i - 1];
      step[i] -= factor * step[i - 1];
      convex = convex && diagonal[i] > 0;
    }
    double largest = 0;
    for (std::size_t i = n; i-- > 0;) {
      if (i + 1 < n) step[i] -= above[i] * step[i + 1];
      step[i] = convex ? step[i] / diagonal[i] : lloyd[i] / masses[i];
      largest = std::max(largest, std::abs(step[i]));
    }
    if (!std::isfinite(largest)) break;
    // Levels keep their order: no step takes more than half of the gap to a neighbour.
    double damping = 1;
    for (std::size_t i = 0; i < n; ++i) {
      const double gap = levels[i] - (i == 0 ? 0 : levels[i - 1]);
      const double closing = step[i] - (i == 0 ? 0 : step[i - 1]);
      if (closing > 0.5 * gap) damping = std::min(damping, 0.5 * gap / closing);
    }
    for (std::size_t i = 0; i < n; ++i) levels[i] -= damping * step[i];
    if (largest < kTolerance) return mirrored(density, levels, bits);
  }
  throw InternalError("the Lloyd-Max codebook of " + std::to_string(bits) +
                      " bits did not converge");
}

}  // namespace

std::vector<float> midpoints(std::span<const float> levels) {
  std::vector<float> boundaries;
  for (std::size_t i = 0; i + 1 < levels.size(); ++i)
    boundaries.push_back(static_cast<float>(0.5 * (double{levels[i]} + double{levels[i + 1]})));
  return boundaries;
}

Codebook lloyd_max_gaussian(int bits) { return lloyd_max(Gaussian(), bits); }

Codebook lloyd_max_beta(int bits, int d) {
  constexpr int kSmallestDimension =
      8;  // below, the density's edge is too sharp for the quadrature
  if (d < kSmallestDimension)
    throw ArgumentError(
        "the codebook of a rotated unit vector needs a dimension of at least 8, got " +
        std::to_string(d));
  return lloyd_max(UnitVectorCoordinate(d), bits);
}

Codebook uniform_gaussian(int bits) {
  require_bits(bits);
  const Gaussian density;
  const std::size_t n = std::size_t{1} << (bits - 1);
  std::vector<double> levels(n);
  const auto set_levels = [&](double width) {
    for (std::size_t i = 0; i < n; ++i) levels[i] = (static_cast<double>(i) + 0.5) * width;
  };
  // d/d(width) of the error, up to a negative factor: positive while the width is too small.
  const auto slope = [&](double width) {
    set_levels(width);
    double sum = 0;
    for_each_cell(density, levels, [&](std::size_t i, double lower, double upper, bool) {
      sum += (static_cast<double>(i) + 0.5) * density.moments(lower, upper, levels[i]).centred;
    });
    return sum;
  };
  // 2^bits steps span between 2 and 12 standard deviations.
  double narrow = 1.0 / static_cast<double>(n), wide = 6.0 / static_cast<double>(n);
  constexpr int kBisections = 52;
  for (int i = 0; i < kBisections; ++i) {
    const double middle = 0.5 * (narrow + wide);
    (slope(middle) > 0 ? narrow : wide) = middle;
  }
  set_levels(0.5 * (narrow + wide));
  return mirrored(density, levels, bits);
}

const Codebook& codebook(const std::string& name, int bits) {
  if (name != "lloyd_max" && name != "lloyd_max_byte" && name != "uniform")
    throw ArgumentError("unknown codebook \"" + name +
                        "\"; expected lloyd_max, lloyd_max_byte or uniform");
  require_bits(bits);
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, Codebook> cache;
  const std::lock_guard lock(mutex);
  const auto key = std::pair(name, bits);
  auto found = cache.find(key);
  if (found == cache.end()) {
    Codebook book = name == "uniform" ? uniform_gaussian(bits) : lloyd_max_gaussian(bits);
    if (name == "lloyd_max_byte") book = on_byte_grid(book);
    found = cache.emplace(key, std::move(book)).first;
  }
  return found->second;
}

double unbiased_distortion(const std::string& name, int bits) {
  if (bits == 0) return 1;
  const double d = codebook(name, bits).distortion;
  return d / (1 - d);
}

}  // namespace kvplan::quant
