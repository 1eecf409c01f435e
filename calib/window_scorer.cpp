#include "calib/window_scorer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "schemas/error.h"

namespace kvplan::calib {
namespace {

/// Logits held at a time: 16 MiB each of reference and candidate.
constexpr std::int64_t kLogitsPerChunk = std::int64_t{1} << 22;

at::Tensor token_ids(const TextWindow& window) {
  return at::from_blob(const_cast<std::int32_t*>(window.tokens.data()),
                       {1, static_cast<std::int64_t>(window.tokens.size())}, at::kInt)
      .to(at::kLong);
}

void append(TokenScores& scores, const at::Tensor& row) {
  append_window(scores, {row.const_data_ptr<double>(), static_cast<std::size_t>(row.numel())});
}

}  // namespace

ScoredRange scored_range(int window) { return {window / 4, window - 1 - window / 4}; }

WindowScorer::WindowScorer(const ModelReader& model, const std::vector<Pass>& passes, int window,
                           WeightType weights)
    : path_(model.path().string()),
      decoder_(model, weights),
      passes_(passes),
      range_(scored_range(window)),
      chunk_rows_(
          std::clamp<std::int64_t>(kLogitsPerChunk / model.config().vocab_size, 1, range_.count)) {}

bool WindowScorer::score(const TextWindow& window, EvaluationState& state,
                         const std::function<bool()>& go_on) const {
  const at::Tensor ids = token_ids(window);
  const at::Tensor reference = scored_rows(decoder_.hidden(ids, store_as_fp16));
  require_finite(reference, window, kReferenceName);
  std::vector<at::Tensor> hidden;
  for (const Pass& pass : passes_) {
    if (!go_on()) return false;
    hidden.push_back(scored_rows(pass.mode == "decode" ? pass.cache->hidden_decode(decoder_, ids)
                                                       : pass.cache->hidden_worst(decoder_, ids)));
    require_finite(hidden.back(), window, pass.candidate->name);
  }
  compare(reference, hidden, ids.squeeze(0).narrow(0, range_.first + 1, range_.count), window,
          state);
  return true;
}

/// [1, tokens, hidden] -> [scored, hidden], without keeping the rest alive.
at::Tensor WindowScorer::scored_rows(const at::Tensor& hidden) const {
  return hidden.squeeze(0).narrow(0, range_.first, range_.count).clone();
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
    require_finite(found[i].kl + found[i].nll, window, passes_[i].candidate->name);
  append(state.reference_nll, reference_nll);
  for (std::size_t i = 0; i < found.size(); ++i) {
    append(state.passes[i].kl, found[i].kl);
    append(state.passes[i].nll, found[i].nll);
    append(state.passes[i].same_top1, found[i].same_top1);
  }
}

}  // namespace kvplan::calib
