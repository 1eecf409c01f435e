// B1-B3, B8, B9: polar pairs, attention entropy, sign sketches, local attention.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "studies/absmax.h"
#include "studies/attention.h"
#include "studies/blog_examples.h"
#include "studies/seed_runs.h"
#include "studies/sources.h"
#include "studies/study.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

std::string at_bits(const std::string& what, int bits) {
  return what + " at " + std::to_string(bits) + (bits == 1 ? " bit" : " bits");
}

// B1

/// Relative error of pairs whose angle, uniform in a bin of half-width h, is read as a value at
/// `reach` from the farthest angle of the bin: 2 (1 - sin(reach) / reach), reach = h at the
/// centre, 2 h at an edge.
double pair_error(double reach) { return 2 * (1 - std::sin(reach) / reach); }

void run_polar_pairs(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 256;
  auto random = study_stream(context, "B1");
  const Array<float> x = unit_vectors(context.size(2000, 200), kDim, random);
  StudyTable table{"Relative squared error, d = 256",
                   {"angle bits", "bin centre", "bin edge", "Lloyd-Max", "stored bits, polar"},
                   {}};
  for (int bits = 1; bits <= 6; ++bits) {
    const std::string digits = std::to_string(bits);
    const double half_bin = std::numbers::pi / std::pow(2, bits);
    const double centre = baseline_error("polar:" + digits, x);
    const double edge = baseline_error("polar:" + digits + "+edge", x);
    const double lloyd_max = baseline_error("turboquant:" + digits, x);
    const double stored_bits =
        baseline_codec("polar:" + digits, kDim)->bits_per_token() / double{kDim};
    if (bits == 3) {
      result.near_relative(Role::kClaim, "bin edge, 3 bits, against Lloyd-Max at 3 bits", edge,
                           lloyd_max, .05);
      result.near(Role::kClaim, "stored bits per coordinate of the 3-bit code", stored_bits, 3, .25,
                  "bits");
      result.near(Role::kExplanation, "the same: half an angle and half an fp16 radius",
                  stored_bits, 1.5 + 8, 0, "bits");
    }
    result.near_relative(Role::kExplanation,
                         at_bits("bin edge = bin centre with one bit less,", bits), edge,
                         pair_error(2 * half_bin), .01);
    result.near_relative(Role::kReference, at_bits("bin centre", bits), centre,
                         pair_error(half_bin), .01);
    table.rows.push_back(
        {digits, figure(centre), figure(edge), figure(lloyd_max), figure(stored_bits)});
  }
  result.table(std::move(table));
}

// B2

void run_polar_attention(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 256;
  struct Code {
    const char *name, *baseline, *options;
    double logit_error[3], divergence[3];  // expected at 2, 3, 4 bits; 0: not stated
  };
  constexpr Code kCodes[] = {
      {"Lloyd-Max, norm corrected", "turboquant:", "+nc", {30.9, 8.8, 2.4}, {2.87, .85, .215}},
      {"polar, bin centre", "polar:", "", {51, 13.1, 3.3}, {4.6, 1.2, .28}},
      {"polar, bin edge", "polar:", "+edge", {187, 51, 13}, {0, 0, 0}}};
  const auto n = context.size(512, 128);
  const auto draws = static_cast<std::uint32_t>(context.size(6, 1));
  double errors[3][3]{}, divergences[3][3]{};
  for (std::uint32_t draw = 0; draw < draws; ++draw) {
    auto random = study_stream(context, "B2", draw);
    const Array<float> q = gaussian_vectors(n, kDim, random), k = gaussian_vectors(n, kDim, random);
    const Array<float> logits = attention_logits(q, k, 1);
    for (std::size_t c = 0; c < 3; ++c)
      for (std::size_t b = 0; b < 3; ++b) {
        const auto codec =
            baseline_codec(kCodes[c].baseline + std::to_string(b + 2) + kCodes[c].options, kDim,
                           context.seed + draw);
        const Array<float> approximate = attention_logits(q, stored(*codec, k), 1);
        errors[c][b] += squared_distance(logits.data, approximate.data) /
                        static_cast<double>(logits.data.size()) / draws;
        divergences[c][b] += attention_kl(logits, approximate) / draws;
      }
  }
  StudyTable table{"Unscaled logits, d = 256", {"code", "bits", "logit MSE", "KL, nats"}, {}};
  for (std::size_t c = 0; c < 3; ++c)
    for (std::size_t b = 0; b < 3; ++b) {
      const Code& code = kCodes[c];
      const int bits = static_cast<int>(b) + 2;
      result.near_relative(Role::kReference, at_bits(std::string(code.name) + ": logit MSE", bits),
                           errors[c][b], code.logit_error[b], .04);
      if (code.divergence[b] > 0)
        result.near_relative(Role::kReference, at_bits(std::string(code.name) + ": KL", bits),
                             divergences[c][b], code.divergence[b], .15, "nats");
      table.rows.push_back(
          {code.name, std::to_string(bits), figure(errors[c][b]), figure(divergences[c][b])});
    }
  for (std::size_t b = 0; b < 3; ++b) {
    const int bits = static_cast<int>(b) + 2;
    result.at_least(Role::kClaim, at_bits("logit MSE of polar centre / Lloyd-Max", bits),
                    errors[1][b] / errors[0][b], 1);
    result.at_least(Role::kClaim, at_bits("logit MSE of polar edge / centre", bits),
                    errors[2][b] / errors[1][b], 1);
    result.at_least(Role::kClaim, at_bits("KL of polar centre / Lloyd-Max", bits),
                    divergences[1][b] / divergences[0][b], 1);
    result.at_least(Role::kClaim, at_bits("KL of polar edge / centre", bits),
                    divergences[2][b] / divergences[1][b], 1);
  }
  result.table(std::move(table));
}

// B3

/// Rows that are one of the directions, taken at random, plus noise of standard deviation .1.
Array<float> around_directions(const Array<float>& directions, std::int64_t n,
                               quant::RandomStream& random) {
  constexpr float kNoise = .1f;
  Array<float> x = gaussian_vectors(n, static_cast<int>(directions.shape[1]), random);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
    const auto direction =
        directions.row(random.next_below(static_cast<std::uint32_t>(directions.shape[0])));
    const auto row = x.row(i);
    for (std::size_t c = 0; c < row.size(); ++c) row[c] = direction[c] + kNoise * row[c];
  }
  return x;
}

/// Random signs, then a random order, of the channels: what the evaluated code calls a rotation.
class SignPermutation {
 public:
  SignPermutation(int d, quant::RandomStream& random) {
    for (int i = 0; i < d; ++i) {
      source_.push_back(static_cast<std::size_t>(i));
      sign_.push_back(random.next_below(2) == 0 ? 1.f : -1.f);
    }
    for (std::size_t i = source_.size() - 1; i > 0; --i)
      std::swap(source_[i], source_[random.next_below(static_cast<std::uint32_t>(i + 1))]);
  }
  Array<float> forward(const Array<float>& x) const {
    Array<float> y(x.shape);
    for (std::size_t i = 0; i < static_cast<std::size_t>(x.shape[0]); ++i)
      for (std::size_t c = 0; c < source_.size(); ++c)
        y.row(i)[c] = sign_[c] * x.row(i)[source_[c]];
    return y;
  }
  Array<float> inverse(const Array<float>& y) const {
    Array<float> x(y.shape);
    for (std::size_t i = 0; i < static_cast<std::size_t>(y.shape[0]); ++i)
      for (std::size_t c = 0; c < source_.size(); ++c)
        x.row(i)[source_[c]] = sign_[c] * y.row(i)[c];
    return x;
  }

 private:
  std::vector<std::size_t> source_;
  std::vector<float> sign_;
};

/// Mean over the queries, nats.
double mean_entropy(const Array<float>& logits) {
  double sum = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(logits.shape[0]); ++i)
    sum += entropy(softmax(logits.row(i)));
  return sum / static_cast<double>(logits.shape[0]);
}

Array<float> scaled(Array<float> x, float factor) {
  for (float& value : x.data) value *= factor;
  return x;
}

void run_attention_entropy(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 256, kDirections = 8;
  constexpr double kSteps = 1;  // 2 bits: levels -1, 0, 1
  const auto n = context.size(256, 128);
  const auto seeds = static_cast<std::uint32_t>(context.size(100, 12));
  const float inverse_root = 1 / std::sqrt(static_cast<float>(kDim));
  // Change of the mean entropy in percent: [structured, random][absmax, Lloyd-Max][unscaled,
  // scaled]
  std::vector<double> change[2][2][2];
  bool mixed = false;
  for (std::uint32_t seed = 0; seed < seeds; ++seed) {
    auto random = study_stream(context, "B3", seed);
    const SignPermutation rotation(kDim, random);
    const auto lloyd_max = baseline_codec("turboquant:2+nc", kDim, context.seed + seed);
    for (const std::size_t kind : {0, 1}) {
      const Array<float> directions = gaussian_vectors(kDirections, kDim, random);
      const auto draw = [&] {
        return kind == 0 ? around_directions(directions, n, random)
                         : gaussian_vectors(n, kDim, random);
      };
      const Array<float> q = draw(), k = draw();
      Array<float> rounded = rotation.forward(k), plain = k;
      rounded.data = absmax_round_trip(rounded.data, kSteps);
      plain.data = absmax_round_trip(k.data, kSteps);
      const Array<float> k_hat[2] = {rotation.inverse(rounded), stored(*lloyd_max, k)};
      mixed = mixed || k_hat[0].data != plain.data;
      const Array<float> logits = attention_logits(q, k, 1);
      const double before[2] = {mean_entropy(logits), mean_entropy(scaled(logits, inverse_root))};
      for (const std::size_t code : {0, 1}) {
        const Array<float> approximate = attention_logits(q, k_hat[code], 1);
        const double after[2] = {mean_entropy(approximate),
                                 mean_entropy(scaled(approximate, inverse_root))};
        for (const std::size_t scale : {0, 1})
          change[kind][code][scale].push_back(100 * (after[scale] / before[scale] - 1));
      }
    }
  }
  const char* const kinds[] = {"structured", "random"};
  const char* const codes[] = {"absmax per tensor", "Lloyd-Max after mixing"};
  const char* const scales[] = {"unscaled", "scaled by 1/sqrt(d)"};
  StudyTable table{"Change of the attention entropy at 2 bits, over the seeds",
                   {"keys", "code", "logits", "mean, %", "standard deviation, %"},
                   {}};
  Spread measured[2][2][2];
  for (const std::size_t kind : {0, 1})
    for (const std::size_t code : {0, 1})
      for (const std::size_t scale : {0, 1}) {
        const Spread& s = measured[kind][code][scale] = spread(change[kind][code][scale]);
        table.rows.push_back(
            {kinds[kind], codes[code], scales[scale], figure(s.mean, 3), figure(s.sd, 3)});
      }
  constexpr double kPublished = -65;
  const Spread& structured = measured[0][0][0];
  result.at_most(Role::kClaim, "TurboQuant's own code, structured keys, unscaled",
                 measured[0][1][0].mean, kPublished / 2, "%");
  result.at_most(Role::kExplanation, "distance of -65 % from the absmax mean, structured, unscaled",
                 std::abs(structured.mean - kPublished) / structured.sd, 2, "standard deviations");
  result.holds(Role::kExplanation, "signs and permutation leave absmax codes as they are", !mixed);
  result.near(Role::kExplanation, "absmax, structured, scaled by 1/sqrt(d)", measured[0][0][1].mean,
              -1.5, 1.5, "%");
  result.near(Role::kReference, "absmax, structured, unscaled", structured.mean, -79, 4, "%");
  result.near(Role::kReference, "absmax, random, unscaled", measured[1][0][0].mean, 20, 5, "%");
  for (const std::size_t kind : {0, 1})
    result.near(Role::kReference,
                std::string("Lloyd-Max after mixing, ") + kinds[kind] + ", unscaled",
                measured[kind][1][0].mean, 0, 4, "%");
  result.near(Role::kReference, "Lloyd-Max after mixing, structured, scaled by 1/sqrt(d)",
              measured[0][1][1].mean, 0, .1, "%");
  result.table(std::move(table));
}

// B8

void run_sign_sketch(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 128, kRows = 128;
  constexpr double kRelative = .1;
  const auto sketches = static_cast<std::uint32_t>(context.size(100, 10));
  const auto pairs = context.size(200, 100);
  const double scale = std::sqrt(std::numbers::pi / 2) / kRows;
  for (const double cosine : {0.0, 0.3}) {
    double sum = 0, squares = 0;
    std::int64_t inside = 0;
    for (std::uint32_t draw = 0; draw < sketches; ++draw) {
      auto random = study_stream(context, "B8", draw, cosine > 0 ? 1 : 0);
      const Array<float> rows = gaussian_vectors(kRows, kDim, random);
      Array<float> x = unit_vectors(pairs, kDim, random);
      Array<float> y = unit_vectors(pairs, kDim, random);
      for (std::size_t i = 0; i < static_cast<std::size_t>(pairs); ++i) {
        const std::span<float> a = x.row(i), b = y.row(i);
        const double along = dot(a, b), across = std::sqrt(1 - square(along));
        const double turn = std::sqrt(1 - square(cosine)) / across;
        for (std::size_t c = 0; c < a.size(); ++c)
          b[c] = static_cast<float>(cosine * a[c] + turn * (b[c] - along * a[c]));
      }
      const Array<float> sx = attention_logits(x, rows, 1), sy = attention_logits(y, rows, 1);
      for (std::size_t i = 0; i < static_cast<std::size_t>(pairs); ++i) {
        double estimate = 0;
        for (std::size_t m = 0; m < kRows; ++m)
          estimate += scale * std::copysign(1.0, sx.row(i)[m]) * sy.row(i)[m];
        sum += estimate - cosine;
        squares += square(estimate - cosine);
        inside += std::abs(estimate - cosine) <= kRelative * cosine ? 1 : 0;
      }
    }
    const double n = static_cast<double>(sketches) * static_cast<double>(pairs);
    const std::string at = ", cosine " + figure(cosine);
    if (cosine > 0)
      result.at_least(Role::kClaim, "share of pairs within 10 % of <x,y>" + at,
                      static_cast<double>(inside) / n, 1);
    result.near_relative(Role::kExplanation, "m x variance = pi/2 - cos^2" + at,
                         kRows * squares / n, std::numbers::pi / 2 - square(cosine), .04);
    result.near(Role::kReference, "bias" + at, sum / n, 0, .004);
  }
}

// B9

/// The columns from `first` on.
Array<float> last_columns(const Array<float>& x, std::int64_t count) {
  Array<float> last({x.shape[0], count});
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.shape[0]); ++i)
    std::ranges::copy(x.row(i).last(static_cast<std::size_t>(count)), last.row(i).begin());
  return last;
}

void run_local_attention(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 128, kKeys = 1024, kQueries = 64;
  constexpr std::int64_t kWindows[] = {1024, 256, 64, 16};
  const auto draws = static_cast<std::uint32_t>(context.size(40, 4));
  double divergence[std::size(kWindows)] = {}, spread[std::size(kWindows)] = {};
  for (std::uint32_t draw = 0; draw < draws; ++draw) {
    auto random = study_stream(context, "B9", draw);
    const Array<float> k = gaussian_vectors(kKeys, kDim, random);
    const Array<float> q = gaussian_vectors(kQueries, kDim, random);
    const auto codec = baseline_codec("turboquant:3+nc", kDim, context.seed + draw);
    const double scale = 1 / std::sqrt(double{kDim});
    const Array<float> logits = attention_logits(q, k, scale);
    const Array<float> approximate = attention_logits(q, stored(*codec, k), scale);
    for (std::size_t w = 0; w < std::size(kWindows); ++w) {
      const Array<float> local = last_columns(logits, kWindows[w]);
      divergence[w] += attention_kl(local, last_columns(approximate, kWindows[w])) / draws;
      for (std::size_t i = 0; i < kQueries; ++i) {
        double squares = 0;
        for (const double p : softmax(local.row(i))) squares += p * p;
        spread[w] += (1 - squares) / (double{kQueries} * draws);
      }
    }
  }
  StudyTable table{"Attention to the last W keys, 3 bits, norm corrected",
                   {"W", "KL, nats", "1 - sum p^2", "ratio"},
                   {}};
  const auto ratio = [&](std::size_t w) { return divergence[w] / spread[w]; };
  for (std::size_t w = 0; w < std::size(kWindows); ++w) {
    const std::string window = std::to_string(kWindows[w]);
    result.near_relative(Role::kExplanation, "KL / (1 - sum p^2), W = " + window, ratio(w), .0168,
                         .04, "nats");
    table.rows.push_back({window, figure(divergence[w]), figure(spread[w]), figure(ratio(w))});
  }
  result.at_least(Role::kClaim, "ratio of W = 16 to W = 1024, distance from 1",
                  std::abs(ratio(std::size(kWindows) - 1) / ratio(0) - 1), .1);
  result.table(std::move(table));
}

std::vector<Study> attention_demonstrations() {
  return {
      {{.id = "B1",
        .title = "Polar pairs as TurboQuant's first stage",
        .claim = "The first stage of TurboQuant turns pairs of coordinates into radius and angle, "
                 "keeps the radius in full precision and stores the angle in b bits; a table of "
                 "errors for 1 to 6 bits goes with it.",
        .source = std::string(kSourceYogesh) + "; repeated in " + kSourceBenchmarksBlog,
        .explanation =
            "The paper's first stage is a Lloyd-Max code per rotated coordinate; pairs are "
            "another code (PolarQuant). As coded, an angle is read at the lower edge of its bin, "
            "which costs exactly one bit against the bin's centre. The radius adds 8 bits per "
            "coordinate in fp16, so that \"3 bits\" are 9.5.",
        .expected = Verdict::kExplained},
       run_polar_pairs},
      {{.id = "B2",
        .title = "Polar pairs at the level of attention",
        .claim = "What the codes do to vectors they do to attention: the order of the errors is "
                 "the same in logits and in the softmax.",
        .source = kSourceYogesh,
        .explanation = "The logit error of an independent query is |q|^2 times the relative "
                       "error of the key, so the order carries over: Lloyd-Max, bin centre, bin "
                       "edge. Logits are unscaled here as in the source, which makes every KL "
                       "large.",
        .expected = Verdict::kConfirmed},
       run_polar_attention},
      {{.id = "B3",
        .title = "Attention entropy at 2 bits",
        .claim = "At 2 bits TurboQuant collapses attention on structured keys: the entropy falls "
                 "by 65 %.",
        .source = kSourceYogesh,
        .explanation =
            "Three causes have to meet: one absmax per tensor (2 bits leave -1, 0 and 1), signs "
            "and a permutation in place of a rotation, which mix nothing, and logits without "
            "1/sqrt(d). TurboQuant's own 2-bit code changes the entropy by a few percent at most, "
            "and with scaled logits even the absmax code does not collapse.",
        .expected = Verdict::kExplained},
       run_attention_entropy},
  };
}

std::vector<Study> limit_demonstrations() {
  return {
      {{.id = "B8",
        .title = "The Johnson-Lindenstrauss lemma as a guarantee",
        .claim = "Sign sketches preserve all inner products within a factor 1 +- epsilon.",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "The lemma bounds distances under a linear sketch whose size grows with log(n) / "
            "epsilon^2. A sign sketch of m rows has an unbiased estimate with variance "
            "(pi/2 - cos^2)/m, whatever the pair: true on average, no bound for any one pair, and "
            "at m = d = 128 most pairs are off by more than 10 %.",
        .expected = Verdict::kExplained},
       run_sign_sketch},
      {{.id = "B9",
        .title = "Local and sparse attention",
        .claim = "Sparse or local attention may react to quantised keys in another way than full "
                 "attention (a guess of the source).",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "Errors of different keys are independent, so KL = 1/2 Var(error) (1 - sum p^2): the "
            "window enters only through how concentrated the attention is.",
        .expected = Verdict::kExplained},
       run_local_attention},
  };
}

}  // namespace

std::vector<Study> demonstration_studies() {
  std::vector<Study> all;
  for (const auto part : {attention_demonstrations, blog_examples, limit_demonstrations})
    std::ranges::move(part(), std::back_inserter(all));
  return all;
}

}  // namespace kvplan::studies
