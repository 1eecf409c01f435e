#include "quant/portable_math.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kvplan::quant {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// ln 2 as a head of 33 bits, exact when multiplied by an exponent, and a tail.
constexpr double kLn2High = 6.93147180369123816490e-01;
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kInverseLn2 = 1.44269504088896338700e+00;
constexpr double kLn2 = 6.93147180559945286227e-01;

template <std::size_t N>
double polynomial(const std::array<double, N>& ascending, double x) {
  double sum = 0;
  for (std::size_t i = N; i-- > 0;) sum = sum * x + ascending[i];
  return sum;
}

// 2^exponent for normal results.
double power_of_two(int exponent) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
}

double nearest_integer(double x) { return std::floor(x + 0.5); }

// x = 2^exponent (1 + f) with sqrt(1/2) < 1 + f <= sqrt(2); log(1 + f) = f - (half_square - rest).
struct LogParts {
  int exponent;
  double f, half_square, rest;
};

// Sun fdlibm e_log.c: with s = f/(2+f), log(1+f) = f - (f^2/2 - s (f^2/2 + R(s^2))).
LogParts log_parts(double x) {
  static constexpr std::array<double, 8> kSeries = {0,
                                                    6.666666666666735130e-01,
                                                    3.999999999940941908e-01,
                                                    2.857142874366239149e-01,
                                                    2.222219843214978396e-01,
                                                    1.818357216161805012e-01,
                                                    1.531383769920937332e-01,
                                                    1.479819860511658591e-01};
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.70710678118654752440) {
    mantissa *= 2;
    --exponent;
  }
  const double f = mantissa - 1;
  const double s = f / (2 + f);
  const double half_square = 0.5 * f * f;
  return {exponent, f, half_square, s * (half_square + polynomial(kSeries, s * s))};
}

// exp(high - low) 2^exponent with |high - low| <= ln(2)/2. Sun fdlibm e_exp.c.
double exp_reduced(double high, double low, int exponent) {
  static constexpr std::array<double, 6> kSeries = {0,
                                                    1.66666666666666019037e-01,
                                                    -2.77777777770155933842e-03,
                                                    6.61375632143793436117e-05,
                                                    -1.65339022054652515390e-06,
                                                    4.13813679705723846039e-08};
  const double r = high - low;
  const double c = r - polynomial(kSeries, r * r);
  return (1 - ((low - r * c / (2 - c)) - high)) * power_of_two(exponent);
}

// x = quadrant pi/2 + high + low. pi/2 is taken off in pieces of 23 bits, whose products with the
// quadrant (30 bits) are exact.
struct Reduced {
  std::int64_t quadrant;
  double high, low;
};

Reduced reduce(double x) {
  static constexpr std::array<double, 5> kHalfPi = {0x1.921fb4p+0, 0x1.4442d0p-24, 0x1.846988p-48,
                                                    0x1.8cc514p-72, 0x1.80dc1cd129025p-95};
  const double quadrant = nearest_integer(x * 6.36619772367581382433e-01);
  double high = x, low = 0;
  for (const double piece : kHalfPi) {
    const double product = quadrant * piece;
    const double sum = high - product;
    const double part = sum - high;
    low += (high - (sum - part)) - (product + part);
    high = sum;
  }
  const double sum = high + low;
  return {static_cast<std::int64_t>(quadrant), sum, low - (sum - high)};
}

// sin(x + y) and cos(x + y) for |x| <= pi/4 and a tail y. Sun fdlibm k_sin.c, k_cos.c.
double sin_kernel(double x, double y) {
  static constexpr double kFirst = -1.66666666666666324348e-01;
  static constexpr std::array<double, 5> kSeries = {
      8.33333333332248946124e-03, -1.98412698298579493134e-04, 2.75573137070700676789e-06,
      -2.50507602534068634195e-08, 1.58969099521155010221e-10};
  const double z = x * x, cube = z * x;
  return x - ((z * (0.5 * y - cube * polynomial(kSeries, z)) - y) - cube * kFirst);
}

double cos_kernel(double x, double y) {
  static constexpr std::array<double, 6> kSeries = {
      4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
      -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};
  const double z = x * x, half = 0.5 * z, w = 1 - half;
  return w + (((1 - w) - half) + (z * z * polynomial(kSeries, z) - x * y));
}

bool in_circle_domain(double x) { return std::abs(x) <= 0x1p30; }

}  // namespace

double portable_log(double x) {
  if (!(x > 0) || std::isinf(x)) return kNaN;
  const auto [exponent, f, half_square, rest] = log_parts(x);
  return exponent * kLn2High - ((half_square - (rest + exponent * kLn2Low)) - f);
}

double portable_log2(double x) {
  if (!(x > 0) || std::isinf(x)) return kNaN;
  const auto [exponent, f, half_square, rest] = log_parts(x);
  // Sun/FreeBSD e_log2.c: log(1+f) split so that the product with 1/ln 2 keeps its low bits.
  constexpr double kInverseLn2High = 1.44269504072144627571e+00;
  constexpr double kInverseLn2Low = 1.67517131648865118353e-10;
  const double high =
      std::bit_cast<double>(std::bit_cast<std::uint64_t>(f - half_square) & 0xffffffff00000000);
  const double low = (f - high) - half_square + rest;
  const double value_high = high * kInverseLn2High;
  const double value_low = (low + high) * kInverseLn2Low + low * kInverseLn2High;
  const double sum = exponent + value_high;
  return sum + (value_low + ((exponent - sum) + value_high));
}

double portable_exp(double x) {
  if (!(std::abs(x) <= 700)) return kNaN;
  const double k = nearest_integer(x * kInverseLn2);
  return exp_reduced(x - k * kLn2High, k * kLn2Low, static_cast<int>(k));
}

double portable_exp2(double x) {
  if (!(std::abs(x) <= 1000)) return kNaN;
  const double k = nearest_integer(x);
  return exp_reduced((x - k) * kLn2, 0, static_cast<int>(k));
}

double portable_sin(double x) {
  if (!in_circle_domain(x)) return kNaN;
  const auto [quadrant, high, low] = reduce(x);
  const double value = quadrant & 1 ? cos_kernel(high, low) : sin_kernel(high, low);
  return quadrant & 2 ? -value : value;
}

double portable_cos(double x) {
  if (!in_circle_domain(x)) return kNaN;
  const auto [quadrant, high, low] = reduce(x);
  const double value = quadrant & 1 ? sin_kernel(high, low) : cos_kernel(high, low);
  return (quadrant + 1) & 2 ? -value : value;
}

double normal_quantile(double p) {
  if (!(p > 0 && p < 1)) return kNaN;
  static constexpr std::array<double, 8> kCentreTop = {
      3.3871328727963666080e0,  1.3314166789178437745e+2, 1.9715909503065514427e+3,
      1.3731693765509461125e+4, 4.5921953931549871457e+4, 6.7265770927008700853e+4,
      3.3430575583588128105e+4, 2.5090809287301226727e+3};
  static constexpr std::array<double, 8> kCentreBottom = {1.0,
                                                          4.2313330701600911252e+1,
                                                          6.8718700749205790830e+2,
                                                          5.3941960214247511077e+3,
                                                          2.1213794301586595867e+4,
                                                          3.9307895800092710610e+4,
                                                          2.8729085735721942674e+4,
                                                          5.2264952788528545610e+3};
  static constexpr std::array<double, 8> kMiddleTop = {
      1.42343711074968357734e0,  4.63033784615654529590e0, 5.76949722146069140550e0,
      3.64784832476320460504e0,  1.27045825245236838258e0, 2.41780725177450611770e-1,
      2.27238449892691845833e-2, 7.74545014278341407640e-4};
  static constexpr std::array<double, 8> kMiddleBottom = {1.0,
                                                          2.05319162663775882187e0,
                                                          1.67638483018380384940e0,
                                                          6.89767334985100004550e-1,
                                                          1.48103976427480074590e-1,
                                                          1.51986665636164571966e-2,
                                                          5.47593808499534494600e-4,
                                                          1.05075007164441684324e-9};
  static constexpr std::array<double, 8> kTailTop = {
      6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,
      2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
      2.71155556874348757815e-5, 2.01033439929228813265e-7};
  static constexpr std::array<double, 8> kTailBottom = {1.0,
                                                        5.99832206555887937690e-1,
                                                        1.36929880922735805310e-1,
                                                        1.48753612908506148525e-2,
                                                        7.86869131145613259100e-4,
                                                        1.84631831751005468180e-5,
                                                        1.42151175831644588870e-7,
                                                        2.04426310338993978564e-15};
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * polynomial(kCentreTop, r) / polynomial(kCentreBottom, r);
  }
  const double r = std::sqrt(-portable_log(q < 0 ? p : 1 - p));
  const double magnitude =
      r <= 5 ? polynomial(kMiddleTop, r - 1.6) / polynomial(kMiddleBottom, r - 1.6)
             : polynomial(kTailTop, r - 5) / polynomial(kTailBottom, r - 5);
  return q < 0 ? -magnitude : magnitude;
}

}  // namespace kvplan::quant
