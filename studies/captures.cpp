#include "studies/captures.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "schemas/error.h"
#include "studies/attention.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

/// [a, b, row] -> [b, a, row].
std::vector<float> swapped(std::span<const float> x, std::size_t a, std::size_t b,
                           std::size_t row) {
  std::vector<float> out(x.size());
  for (std::size_t i = 0; i < a; ++i)
    for (std::size_t j = 0; j < b; ++j)
      std::ranges::copy(x.subspan((i * b + j) * row, row),
                        out.begin() + static_cast<std::ptrdiff_t>((j * a + i) * row));
  return out;
}

/// Rows of one head of x [heads, tokens, head_dim].
struct HeadRows {
  HeadRows(const Array<float>& x, std::size_t head)
      : values(x.row(head)), d(static_cast<std::size_t>(x.shape[2])) {}
  std::span<const float> operator[](std::size_t token) const {
    return values.subspan(token * d, d);
  }
  std::span<const float> values;
  std::size_t d;
};

struct Attended {
  std::vector<float> logits;
  std::vector<double> p;
  std::vector<double> output;
};

/// Attention of a query at position `last` to positions 0 .. last.
Attended attend(std::span<const float> q, const HeadRows& k, const HeadRows& v, std::size_t last) {
  Attended out;
  const double scale = 1 / std::sqrt(static_cast<double>(q.size()));
  for (std::size_t t = 0; t <= last; ++t)
    out.logits.push_back(static_cast<float>(scale * dot(q, k[t])));
  out.p = softmax(out.logits);
  out.output.assign(v.d, 0.0);
  for (std::size_t t = 0; t <= last; ++t)
    for (std::size_t i = 0; i < v.d; ++i) out.output[i] += out.p[t] * double{v[t][i]};
  return out;
}

double square_sum(std::span<const double> x) {
  double sum = 0;
  for (const double value : x) sum += square(value);
  return sum;
}

}  // namespace

Array<float> read_back(const quant::Codec& codec, const Array<float>& x, int sink_tokens) {
  if (x.shape.size() != 3)
    throw ArgumentError("vectors to store have " + std::to_string(x.shape.size()) +
                        " dimensions; expected [kv_heads, tokens, head_dim]");
  const auto heads = static_cast<std::size_t>(x.shape[0]),
             tokens = static_cast<std::size_t>(x.shape[1]),
             d = static_cast<std::size_t>(x.shape[2]);
  const std::size_t sinks = std::min(tokens, static_cast<std::size_t>(std::max(sink_tokens, 0)));
  const std::vector<float> rows = swapped(x.data, heads, tokens, d);
  std::vector<float> read = rows;
  quant::round_trip(
      codec,
      {static_cast<std::int64_t>(tokens - sinks), static_cast<int>(heads), static_cast<int>(d)},
      static_cast<std::int64_t>(sinks), std::span(rows).subspan(sinks * heads * d),
      std::span(read).subspan(sinks * heads * d));
  Array<float> out;
  out.shape = x.shape;
  out.data = swapped(read, tokens, heads, d);
  return out;
}

VectorErrors vector_errors(const Array<float>& x, const Array<float>& x_hat, int first_token) {
  if (x.shape != x_hat.shape || x.shape.size() != 3)
    throw ArgumentError("vectors and what was read back must both be [kv_heads, tokens, head_dim]");
  VectorErrors errors;
  double count = 0;
  for (std::size_t head = 0; head < static_cast<std::size_t>(x.shape[0]); ++head) {
    const HeadRows exact(x, head), read(x_hat, head);
    for (auto t = static_cast<std::size_t>(first_token); t < static_cast<std::size_t>(x.shape[1]);
         ++t) {
      const double norm = std::sqrt(squared_norm(exact[t])),
                   read_norm = std::sqrt(squared_norm(read[t]));
      if (norm == 0) continue;
      const double cosine = read_norm > 0 ? dot(exact[t], read[t]) / (norm * read_norm) : 0;
      errors.relative_mse += squared_distance(exact[t], read[t]) / square(norm);
      errors.norm_error += std::abs(read_norm / norm - 1);
      errors.norm_bias += read_norm / norm - 1;
      errors.direction_error += 1 - cosine;
      ++count;
    }
  }
  if (count == 0) throw ArgumentError("no vector behind the sinks to measure errors on");
  for (double* mean :
       {&errors.relative_mse, &errors.norm_error, &errors.norm_bias, &errors.direction_error})
    *mean /= count;
  return errors;
}

std::vector<StoredLayer> stored_layers(const std::vector<calib::LayerCapture>& capture,
                                       const PlanBundle& bundle) {
  std::vector<StoredLayer> stored;
  for (std::size_t l = 0; l < capture.size(); ++l) {
    const auto read = [&](Side side, const Array<float>& x) {
      return read_back(*quant::make_codec(bundle, static_cast<int>(l), side), x,
                       bundle.plan.sink_tokens);
    };
    stored.push_back({read(Side::kKey, capture[l].k), read(Side::kValue, capture[l].v)});
  }
  return stored;
}

AttentionErrors attention_errors(const calib::LayerCapture& layer, const StoredLayer& stored,
                                 std::int64_t first_query, std::int64_t query_step) {
  const std::int64_t tokens = layer.q.shape[1];
  if (first_query < 0 || first_query >= tokens || query_step < 1)
    throw ArgumentError("queries from position " + std::to_string(first_query) + " in steps of " +
                        std::to_string(query_step) + " were asked of " + std::to_string(tokens) +
                        " tokens");
  const auto query_heads = static_cast<std::size_t>(layer.q.shape[0]),
             kv_heads = static_cast<std::size_t>(layer.k.shape[0]),
             d = static_cast<std::size_t>(layer.q.shape[2]);
  const std::size_t group = query_heads / kv_heads;
  AttentionErrors errors;
  double count = 0, energy = 0, error_energy = 0, group_energy = 0;
  for (std::size_t kv = 0; kv < kv_heads; ++kv) {
    const HeadRows k(layer.k, kv), v(layer.v, kv), k_hat(stored.k, kv), v_hat(stored.v, kv);
    for (std::int64_t position = tokens - 1; position >= first_query; position -= query_step) {
      const auto last = static_cast<std::size_t>(position);
      std::vector<double> group_error(d, 0.0);
      for (std::size_t member = 0; member < group; ++member) {
        const HeadRows q(layer.q, kv * group + member);
        const Attended exact = attend(q[last], k, v, last),
                       read = attend(q[last], k_hat, v_hat, last);
        std::vector<double> error(d);
        for (std::size_t i = 0; i < d; ++i) {
          error[i] = read.output[i] - exact.output[i];
          group_error[i] += error[i];
        }
        errors.entropy += entropy(exact.p);
        errors.stored_entropy += entropy(read.p);
        errors.kl += softmax_kl(exact.logits, read.logits);
        energy += square_sum(exact.output);
        error_energy += square_sum(error);
        ++count;
      }
      group_energy += square_sum(group_error);
    }
  }
  for (double* mean : {&errors.entropy, &errors.stored_entropy, &errors.kl}) *mean /= count;
  errors.output_error = energy > 0 ? error_energy / energy : 0;
  if (error_energy > 0) errors.group_growth = group_energy / error_energy;
  if (group > 1)
    errors.head_correlation = (errors.group_growth - 1) / static_cast<double>(group - 1);
  return errors;
}

}  // namespace kvplan::studies
