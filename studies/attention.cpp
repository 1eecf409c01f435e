#include "studies/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kvplan::studies {
namespace {

double log_sum_exp(std::span<const float> logits) {
  const double largest = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum);
}

template <class Measure>
double mean_over_rows(const Array<float>& a, const Array<float>& b, const Measure& measure) {
  double sum = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(a.shape[0]); ++i)
    sum += measure(a.row(i), b.row(i));
  return sum / static_cast<double>(a.shape[0]);
}

}  // namespace

// Keys are turned to [d, keys], so that the inner loop runs over independent outputs.
Array<float> attention_logits(const Array<float>& q, const Array<float>& k, double scale) {
  const auto queries = static_cast<std::size_t>(q.shape[0]);
  const auto keys = static_cast<std::size_t>(k.shape[0]);
  const auto d = static_cast<std::size_t>(q.shape[1]);
  std::vector<float> columns(k.data.size());
  for (std::size_t j = 0; j < keys; ++j)
    for (std::size_t i = 0; i < d; ++i) columns[i * keys + j] = k.data[j * d + i];
  Array<float> logits({q.shape[0], k.shape[0]});
  for (std::size_t row = 0; row < queries; ++row) {
    float* out = logits.data.data() + row * keys;
    for (std::size_t i = 0; i < d; ++i) {
      const float factor = static_cast<float>(scale * q.data[row * d + i]);
      const float* column = columns.data() + i * keys;
      for (std::size_t j = 0; j < keys; ++j) out[j] += factor * column[j];
    }
  }
  return logits;
}

std::vector<double> softmax(std::span<const float> logits) {
  const double log_total = log_sum_exp(logits);
  std::vector<double> p;
  p.reserve(logits.size());
  for (const float logit : logits) p.push_back(std::exp(logit - log_total));
  return p;
}

double entropy(std::span<const double> p) {
  double sum = 0;
  for (const double x : p)
    if (x > 0) sum -= x * std::log(x);
  return sum;
}

double softmax_kl(std::span<const float> logits, std::span<const float> approximate) {
  const double log_total = log_sum_exp(logits), log_other = log_sum_exp(approximate);
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double log_p = logits[i] - log_total;
    sum += std::exp(log_p) * (log_p - (approximate[i] - log_other));
  }
  return sum;
}

double attention_kl(const Array<float>& logits, const Array<float>& approximate) {
  return mean_over_rows(logits, approximate, softmax_kl);
}

double half_error_variance(const Array<float>& logits, const Array<float>& approximate) {
  return mean_over_rows(logits, approximate,
                        [](std::span<const float> exact, std::span<const float> other) {
                          const std::vector<double> p = softmax(exact);
                          double mean = 0, second = 0;
                          for (std::size_t i = 0; i < p.size(); ++i) {
                            const double error = double{other[i]} - double{exact[i]};
                            mean += p[i] * error;
                            second += p[i] * error * error;
                          }
                          return 0.5 * (second - mean * mean);
                        });
}

}  // namespace kvplan::studies
