#include "cli/describe.h"

#include <algorithm>
#include <map>

#include "cli/console.h"

namespace kvplan::cli {
namespace {

std::string short_hash(const std::string& sha) { return sha.substr(0, 12); }

/// A line per text; of many, the first few. `--json` has them all.
std::string text_lines(const std::vector<std::string>& texts) {
  constexpr std::size_t kShown = 4;
  std::string out;
  for (std::size_t i = 0; i < std::min(texts.size(), kShown); ++i)
    out += "text     " + texts[i] + "\n";
  if (texts.size() > kShown)
    out += "text     and " + std::to_string(texts.size() - kShown) + " more\n";
  return out;
}

std::string model_line(const ModelSpec& m) {
  return m.architecture + ", " + std::to_string(m.num_layers) + " layers, " +
         std::to_string(m.query_heads) + " query and " + std::to_string(m.kv_heads) +
         " KV heads of " + std::to_string(m.head_dim) + ", k/v weights " +
         short_hash(m.kv_weights_sha256);
}

/// What the plan does to each baseline that is not smaller: one line each, with the paired interval
/// behind it.
std::string verdicts(const Validation& v) {
  std::string out;
  for (const auto& c : v.candidates) {
    const auto plan = std::find_if(
        v.candidates.begin(), v.candidates.end(),
        [&](const CandidateResult& p) { return p.name == "plan" && p.mode == c.mode; });
    if (c.name == "fp16" || c.name == "plan" || plan == v.candidates.end() ||
        plan->effective_bits > c.effective_bits)
      continue;
    const bool lower = c.kl_minus_plan.low > 0, higher = c.kl_minus_plan.high < 0;
    out += "plan (" + fixed(plan->effective_bits, 2) + " bits, KL " + significant(plan->kl.mean) +
           ") " +
           (lower    ? "beats "
            : higher ? "loses to "
                     : "is not distinguishable from ") +
           c.name + " (" + fixed(c.effective_bits, 2) + " bits, KL " + significant(c.kl.mean) +
           "), " + c.mode + ": difference in KL " + significant(c.kl_minus_plan.low) + " .. " +
           significant(c.kl_minus_plan.high) + " at 95 %\n";
  }
  return out.empty() ? out : "\n" + out;
}

/// "6 4 2 0 | 4 4 2 2": widths by group, heads apart; one number where all are equal.
std::string widths_text(const SidePlan& side) {
  const int first = side.heads.at(0).widths.at(0);
  const bool equal = std::all_of(side.heads.begin(), side.heads.end(), [&](const HeadPlan& h) {
    return h.outliers.empty() &&
           std::all_of(h.widths.begin(), h.widths.end(), [&](int w) { return w == first; });
  });
  if (equal) return first == kFp16Width ? "fp16" : std::to_string(first);
  std::string out;
  for (const auto& head : side.heads) {
    if (!out.empty()) out += '|';
    for (const int w : head.widths)
      out += w > 9 ? "(" + std::to_string(w) + ")" : std::to_string(w);
    if (!head.outliers.empty()) out += "+" + std::to_string(head.outliers.size()) + "x8";
  }
  return out;
}

}  // namespace

std::string describe(const calib::ModelReader& model) {
  const auto& c = model.config();
  const auto& s = model.spec();
  TextTable t({"model", model.path().filename().string()});
  t.add_row({"architecture", c.architecture + " (" + c.container + ")"});
  t.add_row({"layers", std::to_string(c.num_layers)});
  t.add_row({"hidden, feed-forward",
             std::to_string(c.hidden_size) + ", " + std::to_string(c.intermediate_size)});
  t.add_row({"query heads, KV heads, head_dim", std::to_string(c.query_heads) + ", " +
                                                    std::to_string(c.kv_heads) + ", " +
                                                    std::to_string(c.head_dim)});
  t.add_row({"rotary dims, base", std::to_string(c.rotary_dim) + ", " +
                                      significant(c.rope.base, 6) +
                                      (c.rope.scaling ? ", scaling " + c.rope.scaling->type : "")});
  t.add_row({"vocabulary", std::to_string(c.vocab_size) + (c.tied_embeddings ? " (tied)" : "")});
  t.add_row({"trained context", std::to_string(c.max_context)});
  t.add_row({"fp16 KV cache per token", std::to_string(2 * elements_per_token(s)) + " bytes"});
  t.add_row({"k/v weights SHA-256", s.kv_weights_sha256});
  return t.text();
}

std::string describe(const Profile& p) {
  std::string out = "model    " + model_line(p.model) + "\n";
  out += "profile  " + std::to_string(p.windows.size()) + " windows of " +
         std::to_string(p.window) + " tokens, " + std::to_string(p.tokens) + " tokens after " +
         std::to_string(p.sink_tokens) + " sinks per window, seed " + std::to_string(p.seed) + "\n";
  std::vector<std::string> texts;
  for (const auto& s : p.sources) {
    texts.push_back(s.name + " [" + significant(s.part_begin) + ":" + significant(s.part_end) +
                    "], " + std::to_string(s.tokens) + " tokens, sha256 " + short_hash(s.sha256));
  }
  out += text_lines(texts);
  TextTable t({"layer", "key norm", "value norm", "K/V", "mean share K", "mean share V",
               "outliers K", "outliers V", "sensitivity K", "sensitivity V"});
  for (std::size_t l = 0; l < p.summary.size(); ++l) {
    const auto& s = p.summary[l];
    t.add_row({std::to_string(l), significant(s.key_norm), significant(s.value_norm),
               significant(s.norm_ratio), fixed(s.mean_share_k, 3), fixed(s.mean_share_v, 3),
               std::to_string(s.outlier_channels_k.size()),
               std::to_string(s.outlier_channels_v.size()), significant(s.sensitivity_k),
               significant(s.sensitivity_v)});
  }
  return out + "\n" + t.text() +
         "\nnorms: mean over tokens and heads; mean share: energy of the mean (K before rotary); "
         "outliers: channels with RMS\n"
         "above 3 x the layer's median; sensitivity: nats per token at relative error 1 (1/2 tr "
         "FC).\n";
}

std::string describe(const PlanBundle& bundle) {
  const Plan& p = bundle.plan;
  std::string out = "model    " + model_line(p.model) + "\n";
  out += "plan     " + p.policy + ", codec " + p.codec + " (" + p.code + "), groups of " +
         std::to_string(p.group_size) + ", norm " + p.norm + ", scale " + p.scale_rule +
         (p.centre ? ", centred" : "") +
         (p.rotation.kind == "none"
              ? ""
              : ", rotation " + p.rotation.kind + " seed " + std::to_string(p.rotation.seed)) +
         "\n";
  out += "size     " + fixed(p.effective_bits, 4) + " effective bits per element (" +
         fixed(p.effective_bits_at_context, 4) + " at context " + std::to_string(p.context) +
         "), " + std::to_string(p.bytes_per_token) + " bytes per token, " +
         megabytes(p.static_bytes) + " static\n";
  out += "quality  predicted KL " + significant(p.predicted_kl) + " nats per token\n";
  TextTable t(
      {"layer", "K bits", "V bits", "KL share", "K widths by group, heads apart", "V widths"});
  for (const auto& layer : p.layers) {
    t.add_row({std::to_string(layer.index), fixed(layer.k.bits, 2), fixed(layer.v.bits, 2),
               percent(layer.predicted_kl_share), widths_text(layer.k), widths_text(layer.v)});
  }
  return out + "\n" + t.text();
}

std::string describe(const Validation& v, bool markdown) {
  std::string out;
  std::vector<std::string> texts;
  for (std::size_t i = 0; i < v.text_names.size(); ++i) {
    texts.push_back(v.text_names[i] + " [" + significant(v.part_begin) + ":" +
                    significant(v.part_end) + "], sha256 " + short_hash(v.text_sha256[i]));
  }
  out += text_lines(texts);
  out += std::to_string(v.windows) + " windows of " + std::to_string(v.window) +
         " tokens, no BOS, positions " + std::to_string(v.first_scored) + ".." +
         std::to_string(v.window - 2) + " scored (" + std::to_string(v.scored_tokens) +
         " tokens), runtime " + v.runtime + "\n\n";
  TextTable t({"candidate", "mode", "bits", "perplexity", "rise", "rise 95 %", "KL", "± s.e.",
               "p95", "p99", "max", "CVaR95", "same top-1", "predicted KL"});
  for (const auto& c : v.candidates) {
    t.add_row({c.name, c.mode, fixed(c.effective_bits, 3), fixed(c.perplexity, 3),
               percent(c.perplexity_rise, 2),
               percent(c.perplexity_rise_interval.low, 2) + " .. " +
                   percent(c.perplexity_rise_interval.high, 2),
               significant(c.kl.mean), significant(c.kl.standard_error, 2), significant(c.kl.p95),
               significant(c.kl.p99), significant(c.kl.max), significant(c.kl.cvar95),
               percent(c.same_top1, 1).substr(1),
               c.predicted_kl ? significant(*c.predicted_kl) : "-"});
  }
  out += markdown ? t.markdown() : t.text();
  out += verdicts(v);
  for (const auto& g : v.gates) {
    out += "gate " + g.expression + ": measured " + significant(g.measured) +
           (g.passed ? ", passed\n" : ", FAILED\n");
  }
  return out;
}

}  // namespace kvplan::cli
