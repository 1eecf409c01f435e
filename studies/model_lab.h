#pragma once
// The model side of studies: one model, its text, and measurements that several studies share and
// that are made once.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "calib/capture.h"
#include "evaluation/evaluator.h"
#include "forward/device.h"
#include "models/model.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/run_control.h"
#include "schemas/validation.h"
#include "tokenizers/text.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::studies {

/// How a stored cache is scored.
struct Measure {
  std::string mode = "worst";  // or "decode": pages as the runtime fills them
  std::int64_t windows = 0;    // of the held-out ones, from the first; 0: all
};

/// Scores of one stored cache on held-out windows.
struct LabScores {
  double effective_bits = 0;
  double perplexity = 0;
  double perplexity_rise = 0;         // relative to the fp16 cache
  Interval perplexity_rise_interval;  // 95 %, paired bootstrap over windows
  KlStatistics kl;                    // nats per token
  double same_top1 = 0;
  std::vector<double> kl_by_position;  // 16 equal bins of the scored positions
  evaluation::PassScores tokens;       // per scored token
};

class ModelLab {
 public:
  struct Options {
    int window = 1024;
    std::int64_t calibration_tokens = 16384;
    int threads = 0;
    std::uint64_t seed = 0;
    std::filesystem::path folder;  // keeps the profile and finished scores, so that runs resume
    forward::WeightType weights = forward::WeightType::kFloat32;
    const tokenizers::Tokenizer* tokenizer =
        nullptr;  // borrowed; without it no passkeys are hidden
  };
  using NamedBundles = std::vector<std::pair<std::string, PlanBundle>>;

  /// `held_out`: windows to score on, disjoint from `calibration`. Borrows the model. ArgumentError
  /// without a folder or windows. The measurements below throw what evaluation::evaluate and
  /// calib::run_profile throw; an interrupted one continues when it is asked for again, also by
  /// another lab of the same folder.
  ModelLab(const models::ModelReader& model, std::vector<tokenizers::TextWindow> calibration,
           std::vector<ProfileSource> calibration_sources,
           std::vector<tokenizers::TextWindow> held_out, Options options,
           const RunControl& control);
  ~ModelLab();

  const models::ModelReader& model() const;
  const ModelSpec& spec() const;
  const std::vector<tokenizers::TextWindow>& held_out() const;
  /// Of the fp16 cache on all held-out windows; measured at the first call.
  const evaluation::TokenScores& reference_nll() const;

  /// Profile of the calibration windows; made at the first call, kept in the folder.
  /// EnvironmentError when the folder holds one of another model or text.
  const Profile& profile();
  /// Scores of a bundle; measured once per plan bytes and measure. `name` is for progress and
  /// errors.
  const LabScores& scores(const std::string& name, const PlanBundle& bundle,
                          const Measure& measure = {});
  /// Scores of several at once: reference passes are shared by those that are not measured yet.
  void prepare(const NamedBundles& bundles, const Measure& measure = {});
  /// A named baseline (quant/baselines.h) with a rotation seed; the profile gives the channels and
  /// scales that some of them need.
  PlanBundle baseline(const std::string& name, std::uint64_t rotation_seed = 0);
  /// A calibrated or rotated `bundle` with every (layer, side) at fp16 but those that `keep` says.
  static PlanBundle only(const PlanBundle& bundle,
                         const std::function<bool(int layer, Side side)>& keep);
  /// A calibrated plan of the profile at `bits` with the product's defaults, made for the length of
  /// the windows. `seed`: of its mixing matrices.
  PlanBundle plan(double bits, std::uint64_t seed = 0);
  /// What the published rule "outlier83" makes of the profile: outlier key channels at 8 bits, the
  /// rest at 3.
  PlanBundle outlier_plan();

  /// Passkey retrieval (evaluation/passkey.h) in haystacks of one window's length from the held-out
  /// text: by bundle, "fp16" first, then by depth. Empty without a tokenizer.
  std::vector<PasskeyResult> passkey(const NamedBundles& bundles);
  /// Greedy continuations (evaluation/prompts.h) by `tokens` tokens of the beginnings of at most
  /// `prompts` held-out windows: by bundle, "fp16" first.
  std::vector<PromptResult> continuations(const NamedBundles& bundles, std::size_t prompts,
                                          int tokens);

  /// Queries, keys and values of the first held-out window, all layers; made at the first call.
  const std::vector<calib::LayerCapture>& capture();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvplan::studies
