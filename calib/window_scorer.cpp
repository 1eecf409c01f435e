#include "calib/window_scorer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "calib/task_model.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

/// Logits held at a time: 16 MiB each of reference and candidate.
constexpr std::int64_t kLogitsPerChunk = std::int64_t{1} << 22;

/// [windows, tokens] int64.
at::Tensor token_ids(std::span<const TextWindow> windows) {
  std::vector<at::Tensor> rows;
  for (const TextWindow& window : windows) rows.push_back(id_tensor(window.tokens));
  return at::cat(rows);
}

void append(TokenScores& scores, const at::Tensor& row) {
  append_window(scores, {row.const_data_ptr<double>(), static_cast<std::size_t>(row.numel())});
}

}  // namespace

ScoredRange scored_range(int window) { return {window / 4, window - 1 - window / 4}; }

WindowScorer::WindowScorer(const ModelReader& model, const std::vector<Pass>& passes,
                           const EvaluateOptions& options)
    : path_(model.path().string()),
      decoder_(model, options.weights, options.device),
      passes_(passes),
      range_(scored_range(options.window)),
      chunk_rows_(
          std::clamp<std::int64_t>(kLogitsPerChunk / model.config().vocab_size, 1, range_.count)) {}

bool WindowScorer::score(std::span<const TextWindow> windows, EvaluationState& state,
                         const std::function<bool(std::int64_t)>& go_on) const {
  const at::Tensor ids = token_ids(windows);
  const auto count = static_cast<std::int64_t>(windows.size());
  const auto window_ids = [&](std::int64_t w) { return ids.narrow(0, w, 1); };
  std::int64_t left = count * (static_cast<std::int64_t>(passes_.size()) + 1);
  const auto told = [&](std::int64_t done) {
    left -= done;
    return go_on(done) || left == 0;
  };

  std::vector<at::Tensor> reference;
  for (std::int64_t w = 0; w < count; ++w) {
    reference.push_back(scored_rows(decoder_.hidden(window_ids(w), store_as_fp16), 0));
    require_finite(reference.back(), windows[static_cast<std::size_t>(w)], kReferenceName);
    if (!told(1)) return false;
  }
  std::vector<std::vector<at::Tensor>> hidden(windows.size());  // [window][pass]
  for (const Pass& pass : passes_) {
    const at::Tensor together = pass.paged ? pass.paged->hidden(decoder_, ids) : at::Tensor();
    for (std::int64_t w = 0; w < count; ++w) {
      const auto index = static_cast<std::size_t>(w);
      hidden[index].push_back(
          pass.paged ? scored_rows(together, w)
                     : scored_rows(pass.what.mode == "decode"
                                       ? pass.simulated->hidden_decode(decoder_, window_ids(w))
                                       : pass.simulated->hidden_worst(decoder_, window_ids(w)),
                                   0));
      require_finite(hidden[index].back(), windows[index], pass.what.candidate->name);
      if (!told(1)) return false;
    }
  }
  for (std::int64_t w = 0; w < count; ++w) {
    const auto index = static_cast<std::size_t>(w);
    const at::Tensor labels = ids[w].narrow(0, range_.first + 1, range_.count);
    compare(reference[index], hidden[index], labels.to(decoder_.device()), windows[index], state);
  }
  return true;
}

/// [sequences, tokens, hidden] -> [scored, hidden] of one, without keeping the rest alive.
at::Tensor WindowScorer::scored_rows(const at::Tensor& hidden, std::int64_t sequence) const {
  return hidden[sequence].narrow(0, range_.first, range_.count).clone();
}

void WindowScorer::require_finite(const at::Tensor& x, const TextWindow& window,
                                  const std::string& candidate) const {
  if (!x.isfinite().all().item<bool>())
    throw InputError(path_, "window " + std::to_string(window.index),
                     "expected finite logits, found NaN or Inf in the forward pass of " +
                         candidate + "; check the weights of the model");
}

// Logits exist for a few rows at a time, those of the reference once for all candidates.
void WindowScorer::compare(const at::Tensor& reference, const std::vector<at::Tensor>& hidden,
                           const at::Tensor& labels, const TextWindow& window,
                           EvaluationState& state) const {
  struct Rows {
    at::Tensor kl, nll, same_top1;
  };
  const auto make_row = [&] { return at::empty({range_.count}, at::kDouble); };
  const at::Tensor reference_nll = make_row();
  std::vector<Rows> found;
  for (std::size_t i = 0; i < hidden.size(); ++i)
    found.push_back({make_row(), make_row(), make_row()});

  for (std::int64_t begin = 0; begin < range_.count; begin += chunk_rows_) {
    const std::int64_t rows = std::min(chunk_rows_, range_.count - begin);
    const auto chunk = [&](const at::Tensor& x) { return x.narrow(0, begin, rows); };
    const at::Tensor next = chunk(labels).unsqueeze(1);
    const at::Tensor log_p = decoder_.head(chunk(reference)).log_softmax(-1);
    const at::Tensor p = log_p.exp(), top = log_p.argmax(-1);
    chunk(reference_nll).copy_(-log_p.gather(1, next).squeeze(1));
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      at::Tensor log_q = decoder_.head(chunk(hidden[i])).log_softmax(-1);
      chunk(found[i].nll).copy_(-log_q.gather(1, next).squeeze(1));
      chunk(found[i].same_top1).copy_(log_q.argmax(-1) == top);
      chunk(found[i].kl)
          .copy_(log_q.neg_().add_(log_p).mul_(p).sum(-1, /*keepdim=*/false, at::kDouble));
    }
  }

  require_finite(reference_nll, window, kReferenceName);
  for (std::size_t i = 0; i < found.size(); ++i)
    require_finite(found[i].kl + found[i].nll, window, passes_[i].what.candidate->name);
  append(state.reference_nll, reference_nll);
  for (std::size_t i = 0; i < found.size(); ++i) {
    append(state.passes[i].kl, found[i].kl);
    append(state.passes[i].nll, found[i].nll);
    append(state.passes[i].same_top1, found[i].same_top1);
  }
}

}  // namespace kvplan::calib
