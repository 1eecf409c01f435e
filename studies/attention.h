#pragma once
// Attention over random queries and keys, and the distance between two attention distributions.

#include <span>
#include <vector>

#include "schemas/types.h"

namespace kvplan::studies {

/// scale * <q_i, k_j>: [queries, keys] from q [queries,d] and k [keys,d].
Array<float> attention_logits(const Array<float>& q, const Array<float>& k, double scale);

/// Softmax of one row of logits.
std::vector<double> softmax(std::span<const float> logits);
/// Entropy in nats.
double entropy(std::span<const double> p);
/// KL(softmax(logits) || softmax(approximate)) in nats.
double softmax_kl(std::span<const float> logits, std::span<const float> approximate);
/// Mean of softmax_kl over the rows.
double attention_kl(const Array<float>& logits, const Array<float>& approximate);
/// Mean over the rows of 1/2 the variance, under p = softmax(logits), of the logit errors: the
/// second order of the KL divergence.
double half_error_variance(const Array<float>& logits, const Array<float>& approximate);

}  // namespace kvplan::studies
