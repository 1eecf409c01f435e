#pragma once
// log, exp, sin, cos and the normal distribution from IEEE +,-,*,/,sqrt alone, so that results do
// not depend on the libm.

namespace kvplan::quant {

/// Each is within 2 ulp of the true value on its domain; NaN for arguments outside.
double portable_log(double x);   // x > 0
double portable_exp(double x);   // |x| <= 700
double portable_log2(double x);  // x > 0
double portable_exp2(double x);  // |x| <= 1000
double portable_sin(double x);   // |x| <= 2^30
double portable_cos(double x);
/// Inverse of the standard normal distribution function, 0 < p < 1 (Wichura 1988, AS 241 PPND16,
/// relative error < 1e-15).
double normal_quantile(double p);

}  // namespace kvplan::quant
