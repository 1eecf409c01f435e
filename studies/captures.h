#pragma once
// What a codec does to the keys, values and attention of one window of text
// (calib/capture.h).

#include <cstdint>
#include <vector>

#include "calib/capture.h"
#include "quant/codec.h"
#include "schemas/plan.h"
#include "schemas/types.h"

namespace kvplan::studies {

/// decode(encode(x)) of x [kv_heads, tokens, head_dim] as cached from position 0, the first
/// `sink_tokens` tokens exact.
Array<float> read_back(const quant::Codec& codec, const Array<float>& x, int sink_tokens);

/// Errors of vectors, means over heads and tokens from `first_token` on; zero vectors are left out.
struct VectorErrors {
  double relative_mse = 0;     // E |x - x_hat|^2 / |x|^2
  double norm_error = 0;       // E | |x_hat| / |x| - 1 |
  double norm_bias = 0;        // E |x_hat| / |x| - 1
  double direction_error = 0;  // E 1 - cos(x, x_hat)
};
VectorErrors vector_errors(const Array<float>& x, const Array<float>& x_hat, int first_token);

/// K and V of one layer as read back.
struct StoredLayer {
  Array<float> k, v;
};
/// Every layer of a capture through the codecs of a plan, its sinks exact.
std::vector<StoredLayer> stored_layers(const std::vector<calib::LayerCapture>& capture,
                                       const PlanBundle& bundle);

/// Causal attention of one layer over the exact and the stored cache, means over query heads and
/// the query positions taken.
struct AttentionErrors {
  double entropy = 0, stored_entropy = 0;  // nats
  double kl = 0;                           // nats, exact against stored attention weights
  double output_error = 0;                 // E |o - o_hat|^2 / E |o|^2
  /// Of the output errors of two query heads of one KV head: E <e_a, e_b> / E |e|^2; 0 without
  /// such pairs.
  double head_correlation = 0;
  /// E |sum of a group's output errors|^2 over the sum of E |e|^2: 1 + (g - 1) head_correlation.
  double group_growth = 1;
};
/// `query_step`: every so many positions, counted back from the last to first_query.
AttentionErrors attention_errors(const calib::LayerCapture& layer, const StoredLayer& stored,
                                 std::int64_t first_query, std::int64_t query_step);

}  // namespace kvplan::studies
