#include "evaluation/window_scorer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "schemas/error.h"

namespace kvplan::evaluation {
namespace {

/// Logits held at a time: 16 MiB each of reference and candidate.
constexpr std::int64_t kLogitsPerChunk = std::int64_t{1} << 22;

/// [windows, tokens] int64.
at::Tensor token_ids(std::span<const tokenizers::TextWindow> windows) {
  std::vector<at::Tensor> rows;
  for (const tokenizers::TextWindow& window : windows)
    rows.push_back(forward::id_tensor(window.tokens));
  return at::cat(rows);
}

void append(TokenScores& scores, const at::Tensor& row) {
  append_window(scores, {row.const_data_ptr<double>(), static_cast<std::size_t>(row.numel())});
}

}  // namespace

ScoredRange scored_range(int window) { return {window / 4, window - 1 - window / 4}; }

std::int64_t logits_bytes() {
  constexpr std::int64_t kTables = 5;  // of reference and candidate, with their logarithms
  return kTables * kLogitsPerChunk * std::int64_t{sizeof(float)};
}

WindowScorer::WindowScorer(const models::ModelReader& model, const std::vector<Pass>& passes,
                           const EvaluateOptions& options, forward::Device device,
                           const forward::MemoryPlan& plan)
    : path_(model.path().string()),
      decoder_(model, options.weights, device,
               plan.stream ? forward::Residency::kStream : forward::Residency::kAll),
      passes_(passes),
      range_(scored_range(options.window)),
      chunk_rows_(
          std::clamp<std::int64_t>(kLogitsPerChunk / model.config().vocab_size, 1, range_.count)),
      stream_(plan.stream),
      activations_(plan.memory_bytes, options.spill_folder) {}

at::Tensor WindowScorer::take(Slot slot) {
  at::Tensor x = activations_.get(slot);
  activations_.drop(slot);
  return x;
}

/// The reference of all windows, then pass by pass.
std::vector<WindowScorer::Lane> WindowScorer::make_lanes(std::size_t windows) const {
  std::vector<Lane> lanes;
  for (std::size_t w = 0; w < windows; ++w)
    lanes.push_back({.window = w, .pass = nullptr, .path = {forward::store_as_fp16, {}}});
  for (const Pass& pass : passes_) {
    forward::AttentionPath path;
    if (!pass.paged)
      path = pass.what.mode == "decode" ? pass.simulated->decode(decoder_.config())
                                        : pass.simulated->worst();
    for (std::size_t w = 0; w < windows; ++w)
      lanes.push_back({.window = w, .pass = &pass, .path = path});
  }
  return lanes;
}

void WindowScorer::keep_rows(Lane& lane, const at::Tensor& hidden, std::int64_t sequence,
                             const tokenizers::TextWindow& window) {
  const at::Tensor rows = scored_rows(hidden, sequence);
  require_finite(rows, window, lane.pass ? lane.pass->what.candidate->name : kReferenceName);
  lane.slot = activations_.put(rows);
}

/// Each lane through all layers before the next one.
bool WindowScorer::run_in_turn(std::span<const tokenizers::TextWindow> windows,
                               const at::Tensor& ids, std::span<Lane> lanes,
                               const std::function<bool(std::int64_t)>& go_on) {
  at::Tensor together;  // of all windows through the pages of one pass
  for (Lane& lane : lanes) {
    const auto w = static_cast<std::int64_t>(lane.window);
    if (lane.pass && lane.pass->paged) {
      if (w == 0) together = lane.pass->paged->hidden(decoder_, ids);
      keep_rows(lane, together, w, windows[lane.window]);
    } else {
      keep_rows(lane, decoder_.hidden(ids.narrow(0, w, 1), lane.path.hook, lane.path.attention), 0,
                windows[lane.window]);
    }
    if (!go_on(1)) return false;
  }
  return true;
}

/// All lanes through each layer before the next one.
bool WindowScorer::run_by_layer(std::span<const tokenizers::TextWindow> windows,
                                const at::Tensor& ids, std::span<Lane> lanes,
                                const std::function<bool(std::int64_t)>& go_on) {
  decoder_.prefetch(0);
  for (Lane& lane : lanes)
    lane.slot =
        activations_.put(decoder_.embed(ids.narrow(0, static_cast<std::int64_t>(lane.window), 1)));
  for (int layer = 0; layer < decoder_.config().num_layers; ++layer) {
    decoder_.prefetch(layer + 1);
    for (Lane& lane : lanes) {
      lane.slot = activations_.put(
          decoder_.layer(layer, take(lane.slot), 0, lane.path.hook, lane.path.attention));
      if (!go_on(0)) return false;
    }
  }
  for (Lane& lane : lanes)
    keep_rows(lane, decoder_.final_norm(take(lane.slot)), 0, windows[lane.window]);
  return go_on(static_cast<std::int64_t>(lanes.size()));
}

bool WindowScorer::score(std::span<const tokenizers::TextWindow> windows, EvaluationState& state,
                         const std::function<bool(std::int64_t)>& go_on) {
  const at::Tensor ids = token_ids(windows);
  std::vector<Lane> lanes = make_lanes(windows.size());
  auto left = static_cast<std::int64_t>(lanes.size());
  const auto told = [&](std::int64_t done) {
    left -= done;
    return go_on(done) || left == 0;
  };
  if (!(stream_ ? run_by_layer(windows, ids, lanes, told) : run_in_turn(windows, ids, lanes, told)))
    return false;

  for (std::size_t w = 0; w < windows.size(); ++w) {
    std::vector<at::Tensor> rows;
    for (std::size_t lane = w; lane < lanes.size(); lane += windows.size())
      rows.push_back(take(lanes[lane].slot));
    const at::Tensor reference = rows.front();
    rows.erase(rows.begin());
    const at::Tensor labels =
        ids[static_cast<std::int64_t>(w)].narrow(0, range_.first + 1, range_.count);
    compare(reference, rows, labels.to(decoder_.device()), windows[w], state);
  }
  return true;
}

/// [sequences, tokens, hidden] -> [scored, hidden] of one, without keeping the rest alive.
at::Tensor WindowScorer::scored_rows(const at::Tensor& hidden, std::int64_t sequence) const {
  return hidden[sequence].narrow(0, range_.first, range_.count).clone();
}

void WindowScorer::require_finite(const at::Tensor& x, const tokenizers::TextWindow& window,
                                  const std::string& candidate) const {
  if (!x.isfinite().all().item<bool>())
    throw InputError(path_, "window " + std::to_string(window.index),
                     "expected finite logits, found NaN or Inf in the forward pass of " +
                         candidate + "; check the weights of the model");
}

// Logits exist for a few rows at a time, those of the reference once for all candidates.
void WindowScorer::compare(const at::Tensor& reference, const std::vector<at::Tensor>& hidden,
                           const at::Tensor& labels, const tokenizers::TextWindow& window,
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

}  // namespace kvplan::evaluation
