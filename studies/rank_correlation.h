#pragma once
// Spearman's rank correlation.

#include <span>

namespace kvplan::studies {

/// Pearson's correlation, 0 where one of the two does not vary. ArgumentError unless both have the
/// same number of values, at least two.
double correlation(std::span<const double> a, std::span<const double> b);

/// Correlation of the ranks, equal values sharing their mean rank (Spearman 1904).
double rank_correlation(std::span<const double> a, std::span<const double> b);

}  // namespace kvplan::studies
