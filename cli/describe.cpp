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

std::string shown(const TextTable& table, bool markdown) {
  return markdown ? table.markdown() : table.text();
}

/// A single draw has no spread to show.
std::string estimate(const MeanEstimate& e, int draws) {
  return significant(e.mean) + (draws > 1 ? " ± " + significant(e.standard_error, 2) : "");
}

/// "75 %".
std::string share(double fraction, int decimals = 0) {
  return percent(fraction, decimals).substr(1);
}

std::string by_text_table(const Validation& v, bool markdown) {
  if (v.by_text.empty()) return "";
  TextTable t({"candidate", "mode", "text", "windows", "perplexity", "rise", "KL ± s.e."});
  for (const auto& r : v.by_text)
    t.add_row({r.name, r.mode, r.text, std::to_string(r.windows), fixed(r.perplexity, 3),
               percent(r.perplexity_rise, 2), estimate(r.kl, r.windows)});
  return "\nby text\n\n" + shown(t, markdown);
}

/// A row per candidate and context, a column per depth.
std::string passkey_table(const Validation& v, bool markdown) {
  if (v.passkey.empty()) return "";
  std::vector<std::string> header = {"candidate", "mode", "context"};
  const auto& first = v.passkey.front();
  const auto same_row = [](const PasskeyResult& a, const PasskeyResult& b) {
    return a.name == b.name && a.mode == b.mode && a.context == b.context;
  };
  for (const auto& r : v.passkey)
    if (same_row(r, first)) header.push_back("depth " + fixed(r.depth, 2));
  TextTable t(header);
  double found = 0, cells = 0;
  for (auto row = v.passkey.begin(); row != v.passkey.end();) {
    std::vector<std::string> line = {row->name, row->mode, std::to_string(row->context)};
    const auto& of_row = *row;
    for (; row != v.passkey.end() && same_row(*row, of_row); ++row) {
      line.push_back(share(row->exact_match.mean) + " " + fixed(row->log_probability.mean, 2) +
                     (row->name == "fp16"
                          ? ""
                          : " (" + fixed(row->log_probability_change.mean, 2) + " ± " +
                                fixed(row->log_probability_change.standard_error, 2) + ")"));
      if (row->name == "fp16") {
        found += row->exact_match.mean;
        ++cells;
      }
    }
    t.add_row(std::move(line));
  }
  std::string out = "\npasskey, " + std::to_string(first.trials) +
                    " trials: share of keys repeated exactly, log-probability of the key in nats "
                    "(change against fp16 ± s.e.)\n\n" +
                    shown(t, markdown);
  constexpr double kAble = 0.5;
  out += "fp16 itself repeats " + share(found / cells) + " of the keys";
  return out + (found / cells < kAble
                    ? ": this model fails the task; read the change of the log-probability\n"
                    : "\n");
}

std::string prompts_table(const Validation& v, bool markdown) {
  if (v.prompts.empty()) return "";
  TextTable t({"candidate", "mode", "category", "prompts", "tokens", "same token", "± s.e.",
               "first change", "unchanged", "KL ± s.e.", "answer log p", "change ± s.e."});
  for (const auto& r : v.prompts)
    t.add_row(
        {r.name, r.mode, r.category.empty() ? "all" : r.category, std::to_string(r.prompts),
         std::to_string(r.tokens), share(r.greedy_agreement.mean, 1),
         r.prompts > 1 ? share(r.greedy_agreement.standard_error, 1) : "-",
         fixed(r.first_divergence.mean, 1), share(r.identical.mean), estimate(r.kl, r.prompts),
         r.answer_log_probability ? significant(r.answer_log_probability->mean) : "-",
         r.answer_log_probability_change ? estimate(*r.answer_log_probability_change, r.answers)
                                         : "-"});
  return "\nprompts of " + v.prompt_source->name + ", continuations of up to " +
         std::to_string(v.prompt_source->max_tokens) +
         " tokens: share of fp16's greedy tokens, tokens before the first change, continuations "
         "unchanged\n\n" +
         shown(t, markdown);
}

/// "6420|4422+8x8": widths by group, heads apart, then outlier channels x their bits; one number
/// where all are equal.
std::string widths_text(const SidePlan& side, int outlier_bits) {
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
    if (!head.outliers.empty())
      out += "+" + std::to_string(head.outliers.size()) + "x" + std::to_string(outlier_bits);
  }
  return out;
}

std::string rope_text(const RopeSpec& rope) {
  const auto& scaling = rope.scaling;
  return significant(rope.base, 6) +
         (!scaling ? ""
          : scaling->type == "longrope"
              ? ", scaling longrope beyond " + std::to_string(scaling->original_context) + " tokens"
              : ", scaling " + scaling->type + " x" + significant(scaling->factor, 4));
}

std::string rotary_text(const models::ModelConfig& c) {
  if (c.rotary_dim == 0) return "none";
  return std::to_string(c.rotary_dim) + ", " + rope_text(c.rope) +
         (c.local_rope ? "; layers with a window " + rope_text(*c.local_rope) : "");
}

/// What differs from scores / sqrt(head_dim) over all earlier tokens.
std::string attention_text(const models::ModelConfig& c) {
  const auto windows = std::ranges::count_if(c.windows, [](int w) { return w > 0; });
  std::string out;
  const auto add = [&](const std::string& text) { out += (out.empty() ? "" : ", ") + text; };
  if (windows > 0)
    add("window " + std::to_string(std::ranges::max(c.windows)) + " in " + std::to_string(windows) +
        " of " + std::to_string(c.num_layers) + " layers");
  if (c.attention_scale != 0) add("scale " + significant(c.attention_scale, 4));
  if (c.attention_soft_cap > 0) add("scores capped at " + significant(c.attention_soft_cap, 4));
  if (c.logit_soft_cap > 0) add("logits capped at " + significant(c.logit_soft_cap, 4));
  if (c.head_norms) add("norm of each query and key");
  if (c.learned_positions) add("learned positions");
  return out.empty() ? "plain" : out;
}

}  // namespace

std::string describe(const models::ModelReader& model) {
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
  t.add_row({"rotary dims, base", rotary_text(c)});
  t.add_row({"attention", attention_text(c)});
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
  if (!p.origin)
    out += "quality  predicted KL " + significant(p.predicted_kl) + " nats per token\n";
  TextTable t(
      {"layer", "K bits", "V bits", "KL share", "K widths by group, heads apart", "V widths"});
  for (const auto& layer : p.layers) {
    t.add_row({std::to_string(layer.index), fixed(layer.k.bits, 2), fixed(layer.v.bits, 2),
               percent(layer.predicted_kl_share), widths_text(layer.k, p.variant.outlier_bits),
               widths_text(layer.v, p.variant.outlier_bits)});
  }
  return out + "\n" + t.text();
}

std::string validated_context(const Plan& plan, const Validation& v) {
  return "validated in " + std::to_string(v.windows) + " windows of " + std::to_string(v.window) +
         " tokens" +
         (v.window < plan.context
              ? ", shorter than the context of " + std::to_string(plan.context) +
                    " that the plan is for: validate with --window " +
                    std::to_string(plan.context) + " to cover it"
              : ", which cover the context of " + std::to_string(plan.context) +
                    " that the plan is for") +
         "\n";
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
    t.add_row({c.name, c.runtime == "cpu" ? c.mode : c.mode + ", " + c.runtime,
               fixed(c.effective_bits, 3), fixed(c.perplexity, 3), percent(c.perplexity_rise, 2),
               percent(c.perplexity_rise_interval.low, 2) + " .. " +
                   percent(c.perplexity_rise_interval.high, 2),
               significant(c.kl.mean), significant(c.kl.standard_error, 2), significant(c.kl.p95),
               significant(c.kl.p99), significant(c.kl.max), significant(c.kl.cvar95),
               percent(c.same_top1, 1).substr(1),
               c.predicted_kl ? significant(*c.predicted_kl) : "-"});
  }
  out += shown(t, markdown);
  out += verdicts(v);
  out += by_text_table(v, markdown) + passkey_table(v, markdown) + prompts_table(v, markdown);
  for (const auto& g : v.gates) {
    out += "gate " + g.expression + ": measured " + significant(g.measured) +
           (g.passed ? ", passed\n" : ", FAILED\n");
  }
  return out;
}

}  // namespace kvplan::cli
