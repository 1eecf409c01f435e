#include "studies/grouped_queries.h"

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "studies/attention.h"
#include "studies/sources.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

constexpr int kDim = 128, kTokens = 512, kHeads = 16;
constexpr double kErrorVariance = .034, kQueryScale = 1.5;
constexpr std::array<int, 6> kGroups = {1, 2, 4, 7, 8, 16};

/// Output errors of the heads over the draws.
struct HeadErrors {
  std::array<double, kGroups.size()> group{};  // E|sum over the first g heads|^2
  double single = 0;                           // E|error|^2, mean over all heads
  double pair = 0;  // E<error_a, error_b>, mean over all pairs of different heads
};

/// Attention outputs [heads,d] for logits [heads,tokens].
std::vector<double> outputs(const Array<float>& logits, const Array<float>& v) {
  std::vector<double> o(static_cast<std::size_t>(kHeads) * kDim);
  for (std::size_t h = 0; h < kHeads; ++h) {
    const std::vector<double> p = softmax(logits.row(h));
    for (std::size_t t = 0; t < p.size(); ++t) {
      const auto row = v.row(t);
      for (std::size_t c = 0; c < kDim; ++c) o[h * kDim + c] += p[t] * double{row[c]};
    }
  }
  return o;
}

HeadErrors head_errors(const StudyContext& context, double query_correlation) {
  HeadErrors errors;
  const auto draws = static_cast<std::uint32_t>(context.size(400, 20));
  const double scale = 1 / std::sqrt(double{kDim});
  for (std::uint32_t draw = 0; draw < draws; ++draw) {
    auto random = study_stream(context, "F5", draw);
    const Array<float> k = gaussian_vectors(kTokens, kDim, random);
    const Array<float> v = gaussian_vectors(kTokens, kDim, random);
    Array<float> k_hat = gaussian_vectors(kTokens, kDim, random);
    for (std::size_t i = 0; i < k.data.size(); ++i)
      k_hat.data[i] = k.data[i] + static_cast<float>(std::sqrt(kErrorVariance)) * k_hat.data[i];
    const Array<float> shared = gaussian_vectors(1, kDim, random);
    Array<float> q = gaussian_vectors(kHeads, kDim, random);
    for (std::size_t h = 0; h < kHeads; ++h)
      for (std::size_t c = 0; c < kDim; ++c)
        q.row(h)[c] = static_cast<float>(kQueryScale *
                                         (std::sqrt(query_correlation) * double{shared.data[c]} +
                                          std::sqrt(1 - query_correlation) * double{q.row(h)[c]}));
    const std::vector<double> exact = outputs(attention_logits(q, k, scale), v);
    std::vector<double> error = outputs(attention_logits(q, k_hat, scale), v);
    for (std::size_t i = 0; i < error.size(); ++i) error[i] -= exact[i];

    std::array<double, kDim> sum{};
    double total = 0, own = 0;
    std::size_t group = 0;
    for (std::size_t h = 0; h < kHeads; ++h) {
      total = 0;
      for (std::size_t c = 0; c < kDim; ++c) {
        const double e = error[h * kDim + c];
        own += square(e);
        sum[c] += e;
        total += square(sum[c]);
      }
      if (static_cast<int>(h) + 1 == kGroups[group]) errors.group[group++] += total / draws;
    }
    errors.single += own / (double{kHeads} * draws);
    errors.pair += (total - own) / (double{kHeads} * (kHeads - 1) * draws);
  }
  // A group of one is any head.
  errors.group[0] = errors.single;
  return errors;
}

void run_grouped_queries(const StudyContext& context, StudyResult& result) {
  StudyTable table{"E|sum of the output errors of g heads|^2, relative to one head",
                   {"correlation of the queries", "of the output errors"},
                   {}};
  for (const int g : kGroups) table.header.push_back("g = " + std::to_string(g));
  table.header.push_back("exponent, 1 to 16");
  for (const double rho : {0.0, 0.5}) {
    const HeadErrors errors = head_errors(context, rho);
    const double r = errors.pair / errors.single;
    const double exponent =
        std::log(errors.group.back() / errors.group.front()) / std::log(kGroups.back());
    const std::string at = ", query correlation " + figure(rho);
    std::vector<std::string> cells{figure(rho), figure(r, 2)};
    for (std::size_t i = 0; i < kGroups.size(); ++i) {
      const double g = kGroups[i], relative = errors.group[i] / errors.single;
      cells.push_back(figure(relative, 3));
      result.near_relative(Role::kReference, "g (1 + (g - 1) r) at g = " + figure(g) + at, relative,
                           g * (1 + (g - 1) * r), .05);
    }
    cells.push_back(figure(exponent, 3));
    table.rows.push_back(std::move(cells));
    if (rho > 0) {
      result.at_least(Role::kClaim, "growth exponent in the group size" + at, exponent, 1.2);
      result.near(Role::kReference, "correlation of two heads' output errors" + at, r, .2, .02);
    }
    result.near(Role::kReference, "growth exponent" + at, exponent, rho > 0 ? 1.5 : 1.01, .06);
  }
  result.table(std::move(table));
}

}  // namespace

Study grouped_query_study() {
  return {{.id = "F5",
           .title = "Query heads that share a KV head",
           .claim = "The disagreement that a stored KV head causes grows faster than linearly "
                    "with the number of query heads that read it.",
           .source = kSourceSamak,
           .explanation =
               "The heads' output errors are correlated, because similar queries meet the same "
               "errors of keys: E|sum|^2 = s^2 g (1 + (g - 1) r). r is the correlation of the "
               "errors, much less than that of the queries; with independent queries growth is "
               "linear.",
           .expected = Verdict::kConfirmed},
          run_grouped_queries};
}

}  // namespace kvplan::studies
