#include "calib/window_statistics.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <numeric>

#include "calib/fisher_pass.h"
#include "forward/decoder.h"
#include "quant/categorical.h"
#include "quant/random.h"
#include "tests/calib/tiny_profile.h"

namespace kvplan::calib {
namespace {

using quant::RandomStream;
using quant::StreamPurpose;

at::Tensor ids_of(const tokenizers::TextWindow& window) {
  std::vector<std::int64_t> ids(window.tokens.begin(), window.tokens.end());
  return at::from_blob(ids.data(), {1, static_cast<std::int64_t>(ids.size())}, at::kLong).clone();
}

// --- A reference for one window of a one-layer model: plain loops, labels and gradients from first
// principles -------------

using Vector = std::vector<double>;
/// [head][token] -> vector of head_dim.
using Vectors = std::vector<std::vector<Vector>>;

Vectors to_vectors(const at::Tensor& x) {
  const at::Tensor contiguous = x.contiguous();
  const float* value = contiguous.const_data_ptr<float>();
  Vectors out(kKvHeads, std::vector<Vector>(kWindow, Vector(kHeadDim)));
  for (auto& head : out)
    for (auto& token : head)
      for (double& channel : token) channel = *value++;
  return out;
}

struct Reference {
  Vectors k_pre, k, v, h_k, h_v;
};

double theta(int j) { return std::pow(100.0, -2.0 * j / kHeadDim); }

/// R_t^T x for pairs (j, j + head_dim/2).
Vector rotated_back(const Vector& x, int t) {
  Vector out(kHeadDim);
  for (int j = 0; j < kHeadDim / 2; ++j) {
    const double c = std::cos(t * theta(j)), s = std::sin(t * theta(j));
    out[j] = c * x[j] + s * x[j + kHeadDim / 2];
    out[j + kHeadDim / 2] = -s * x[j] + c * x[j + kHeadDim / 2];
  }
  return out;
}

/// Rows of log softmax in double.
std::vector<Vector> log_probabilities(const forward::Decoder& decoder, const at::Tensor& ids,
                                      const forward::KvHook& hook) {
  const at::Tensor logits = decoder.head(decoder.hidden(ids, hook)).contiguous();
  const float* value = logits.const_data_ptr<float>();
  std::vector<Vector> rows(kWindow, Vector(kVocab));
  for (Vector& row : rows) {
    for (double& x : row) x = *value++;
    double sum = 0;
    for (const double x : row) sum += std::exp(x);
    for (double& x : row) x -= std::log(sum);
  }
  return rows;
}

std::vector<int> labels_of(const std::vector<Vector>& log_p, std::uint64_t seed,
                           std::int64_t window) {
  std::vector<int> labels;
  for (std::size_t t = 0; t < log_p.size(); ++t) {
    std::vector<float> p;
    for (const double x : log_p[t]) p.push_back(static_cast<float>(std::exp(x)));
    const RandomStream stream(seed, StreamPurpose::kLabels, static_cast<std::uint32_t>(window),
                              static_cast<std::uint32_t>(window >> 32),
                              static_cast<std::uint32_t>(t));
    const std::size_t y = quant::draw_categorical(p, stream);
    labels.push_back(static_cast<int>(y));
  }
  return labels;
}

/// d sum log p(y) / d x by central differences, x = the keys or values of layer 0.
Vectors finite_differences(const forward::Decoder& decoder, const at::Tensor& ids,
                           const std::vector<int>& labels, Side side) {
  constexpr double kStep = 1.0 / 128;
  Vectors gradient(kKvHeads, std::vector<Vector>(kWindow, Vector(kHeadDim)));
  for (int head = 0; head < kKvHeads; ++head) {
    for (int t = 0; t < kWindow; ++t) {
      for (int i = 0; i < kHeadDim; ++i) {
        double values[2];
        for (const int sign : {0, 1}) {
          const auto log_p = log_probabilities(decoder, ids, [&](forward::LayerKv& kv) {
            at::Tensor& x = side == Side::kKey ? kv.k : kv.v;
            x = x.clone();
            x[0][head][t][i].add_(sign ? kStep : -kStep);
          });
          values[sign] = 0;
          for (int s = 0; s < kWindow; ++s) values[sign] += log_p[s][labels[s]];
        }
        gradient[head][t][i] = (values[1] - values[0]) / (2 * kStep);
      }
    }
  }
  return gradient;
}

Reference reference_of(const models::ModelReader& model, const tokenizers::TextWindow& window,
                       std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model);
  const at::Tensor ids = ids_of(window);
  Reference reference;
  const auto log_p = log_probabilities(decoder, ids, [&](forward::LayerKv& kv) {
    reference.k_pre = to_vectors(kv.k_pre[0]);
    reference.k = to_vectors(kv.k[0]);
    reference.v = to_vectors(kv.v[0]);
  });
  const std::vector<int> labels = labels_of(log_p, seed, window.index);
  reference.h_k = finite_differences(decoder, ids, labels, Side::kKey);
  reference.h_v = finite_differences(decoder, ids, labels, Side::kValue);
  return reference;
}

/// sum over non-sink tokens of a(t) b(t)^T for one head, appended to `out`.
template <class T, class A, class B>
void append_outer(std::vector<T>& out, const A& a, const B& b) {
  const std::size_t rows = a(kSinks).size(), columns = b(kSinks).size(), base = out.size();
  Vector sum(rows * columns);
  for (int t = kSinks; t < kWindow; ++t) {
    const Vector x = a(t), y = b(t);
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t j = 0; j < columns; ++j) sum[i * columns + j] += x[i] * y[j];
  }
  out.resize(base + sum.size());
  for (std::size_t i = 0; i < sum.size(); ++i) out[base + i] = static_cast<T>(sum[i]);
}

double norm(const Vector& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

TEST(WindowStatistics, MatchPlainLoopsAndFiniteDifferences) {
  const models::TinyModel model(small_config(1));
  // An index above 2^32 shows that both of its words key the labels.
  tokenizers::TextWindow window = random_windows(1)[0];
  window.index = (std::int64_t{5} << 32) + 3;
  constexpr std::uint64_t kSeed = 7;
  const forward::Decoder decoder(model);
  LayerProfile found;
  forward::ActivationStore activations(forward::ActivationStore::kUnlimited, "");
  const WindowBatch batch(&window, 1);
  FisherPass{decoder, "tiny", kSeed, RunControl{}, activations}.run(
      {&batch, 1}, [&](WindowBatch, int layer, const LayerTrace& trace) {
        TraceStatistics statistics(decoder, kSinks);
        found = statistics.sums(layer, trace).front();
        found.k.cross = found.v.cross = Array<float>({1, kKvHeads, kHeadDim, kHeadDim});
        found.k.phase = Array<float>({1, kKvHeads, kHeadDim, kHeadDim + 1});
        found.v.phase = Array<float>({1, kKvHeads, kHeadDim, 1});
        statistics.store_coherent(layer, trace, 1, 0, found);
      });
  const Reference r = reference_of(model, window, kSeed);

  LayerProfile expected = empty_sums(model.config())[0];
  for (const Side side : kSides)
    expected.side(side).outer.data = expected.side(side).fisher.data = {};
  for (std::size_t head = 0; head < kKvHeads; ++head) {
    const auto one = [](int) { return Vector{1}; };
    const auto k_pre = [&](int t) { return r.k_pre[head][t]; };
    const auto k = [&](int t) { return r.k[head][t]; };
    const auto v = [&](int t) { return r.v[head][t]; };
    const auto h_k = [&](int t) { return r.h_k[head][t]; };
    const auto h_v = [&](int t) { return r.h_v[head][t]; };
    const auto h_k_pre = [&](int t) { return rotated_back(r.h_k[head][t], t); };
    const auto phi = [](int t) {
      Vector x;
      for (int j = 0; j < kHeadDim / 2; ++j) x.push_back(std::cos(t * theta(j)));
      for (int j = 0; j < kHeadDim / 2; ++j) x.push_back(std::sin(t * theta(j)));
      x.push_back(1);
      return x;
    };
    append_outer(expected.k.outer.data, k_pre, k_pre);
    append_outer(expected.v.outer.data, v, v);
    append_outer(expected.k.fisher.data, h_k_pre, h_k_pre);
    append_outer(expected.v.fisher.data, h_v, h_v);
    append_outer(expected.k.cross.data, h_k, k);
    append_outer(expected.v.cross.data, h_v, v);
    append_outer(expected.k.phase.data, h_k, phi);
    append_outer(expected.v.phase.data, h_v, one);
    for (int t = 0; t < kWindow; ++t) {
      for (std::size_t i = 0; i < kHeadDim; ++i) {
        const std::size_t at = head * kHeadDim + i;
        expected.k.absmax.data[at] =
            std::max(expected.k.absmax.data[at], static_cast<float>(std::abs(k(t)[i])));
        expected.v.absmax.data[at] =
            std::max(expected.v.absmax.data[at], static_cast<float>(std::abs(v(t)[i])));
        if (t < kSinks) continue;
        expected.k.sum.data[at] += k_pre(t)[i];
        expected.v.sum.data[at] += v(t)[i];
        expected.k_rotated_sum.data[at] += k(t)[i];
        expected.k_rotated_sumsq.data[at] += k(t)[i] * k(t)[i];
      }
      if (t < kSinks) continue;
      expected.k.norm_sum.data[head] += norm(k(t));
      expected.v.norm_sum.data[head] += norm(v(t));
      expected.norm_ratio_sum.data[head] += norm(k(t)) / norm(v(t));
    }
  }
  expected.k.cross.shape = expected.v.cross.shape = {1, kKvHeads, kHeadDim, kHeadDim};
  expected.k.phase.shape = {1, kKvHeads, kHeadDim, kHeadDim + 1};
  expected.v.phase.shape = {1, kKvHeads, kHeadDim, 1};

  constexpr double kExact = 1e-6;       // the same float32 activations
  constexpr double kDifference = 2e-3;  // central differences of a float32 forward pass
  for (const Side side : kSides) {
    SCOPED_TRACE(side_name(side));
    const SideSums &e = expected.side(side), &f = found.side(side);
    EXPECT_LT(relative_difference(f.sum, e.sum), kExact);
    EXPECT_LT(relative_difference(f.outer, e.outer), kExact);
    EXPECT_LT(relative_difference(f.norm_sum, e.norm_sum), kExact);
    EXPECT_LT(relative_difference(f.absmax, e.absmax), kExact);
    EXPECT_LT(relative_difference(f.fisher, e.fisher), kDifference);
    EXPECT_LT(relative_difference(f.cross, e.cross), kDifference);
    EXPECT_LT(relative_difference(f.phase, e.phase), kDifference);
  }
  EXPECT_LT(relative_difference(found.k_rotated_sum, expected.k_rotated_sum), kExact);
  EXPECT_LT(relative_difference(found.k_rotated_sumsq, expected.k_rotated_sumsq), kExact);
  EXPECT_LT(relative_difference(found.norm_ratio_sum, expected.norm_ratio_sum), kExact);
}

// --- WindowTree
// ---------------------------------------------------------------------------------------------------------

WindowSums one_number(double value) {
  LayerProfile layer;
  layer.norm_ratio_sum = Array<double>({1}, value);
  layer.k.absmax = Array<float>({1}, static_cast<float>(value));
  return {layer};
}

/// Sum of the values with first <= index < first + size, by halves.
double tree_sum(const std::map<std::int64_t, double>& values, std::int64_t first,
                std::int64_t size) {
  const auto begin = values.lower_bound(first), end = values.lower_bound(first + size);
  if (std::distance(begin, end) == 0) return 0;
  if (std::distance(begin, end) == 1) return begin->second;
  return tree_sum(values, first, size / 2) + tree_sum(values, first + size / 2, size / 2);
}

TEST(WindowTree, AddsByHalvesOfTheIndexRangeWhateverIsMissing) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(seed);
    RandomStream stream(seed, StreamPurpose::kTest);
    std::map<std::int64_t, double> values;
    WindowTree tree;
    float largest = -1;
    for (std::int64_t index = 0; index < 64; ++index) {
      if (stream.next_below(4) == 0 && index != 63) continue;
      const double value = stream.next_uniform();
      values[index] = value;
      tree.add(index, one_number(value));
      largest = std::max(largest, static_cast<float>(value));
      EXPECT_LE(tree.nodes().size(), 8u);
    }
    const WindowSums total = std::move(tree).total();
    EXPECT_EQ(total[0].norm_ratio_sum.data[0], tree_sum(values, 0, 64));
    EXPECT_EQ(total[0].k.absmax.data[0], largest);
  }
}

}  // namespace
}  // namespace kvplan::calib
