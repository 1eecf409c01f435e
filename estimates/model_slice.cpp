#include "estimates/model_slice.h"

#include <algorithm>
#include <charconv>
#include <utility>

namespace kvplan::estimates {
namespace {

constexpr std::string_view kLayerPrefix = "blk.";

/// A row for every token.
bool is_of_tokens(std::string_view name) {
  return name == "token_embd.weight" || name == "output.weight" || name == "output.bias";
}

std::vector<int> chosen(const std::vector<int>& of_all, const std::vector<int>& layers) {
  std::vector<int> out;
  if (!of_all.empty())
    for (const int layer : layers) out.push_back(of_all.at(static_cast<std::size_t>(layer)));
  return out;
}

}  // namespace

ModelSlice::ModelSlice(const models::ModelReader& whole, std::vector<int> layers, int vocabulary)
    : whole_(whole), layers_(std::move(layers)), config_(whole.config()), spec_(whole.spec()) {
  config_.num_layers = spec_.num_layers = static_cast<int>(layers_.size());
  config_.windows = chosen(config_.windows, layers_);
  spec_.windows = chosen(spec_.windows, layers_);
  if (vocabulary > 0) config_.vocab_size = std::min(vocabulary, config_.vocab_size);
}

std::vector<std::int64_t> ModelSlice::shape(std::string_view name) const {
  auto found = whole_.shape(stored_name(name));
  if (is_of_tokens(name)) found.front() = config_.vocab_size;
  return found;
}

void ModelSlice::read(std::string_view name, std::span<float> out) const {
  if (!is_of_tokens(name) || config_.vocab_size == whole_.config().vocab_size)
    return whole_.read(stored_name(name), out);
  const auto tokens = static_cast<std::size_t>(whole_.config().vocab_size);
  std::vector<float> all(out.size() / static_cast<std::size_t>(config_.vocab_size) * tokens);
  whole_.read(name, all);
  std::copy_n(all.begin(), out.size(), out.begin());
}

std::string ModelSlice::stored_name(std::string_view name) const {
  if (!name.starts_with(kLayerPrefix)) return std::string(name);
  std::size_t layer = 0;
  const char* const digits = name.data() + kLayerPrefix.size();
  const char* const end = name.data() + name.size();
  const char* const rest = std::from_chars(digits, end, layer).ptr;
  return std::string(kLayerPrefix) + std::to_string(layers_.at(layer)) + std::string(rest, end);
}

PlanBundle slice_plan(const PlanBundle& whole, const std::vector<int>& layers) {
  PlanBundle part = whole;
  Plan& plan = part.plan;
  plan.model.num_layers = static_cast<int>(layers.size());
  plan.model.windows = chosen(plan.model.windows, layers);
  plan.layers.clear();
  part.tensors.layers.clear();
  for (const int layer : layers) {
    const auto l = static_cast<std::size_t>(layer);
    plan.layers.push_back(whole.plan.layers.at(l));
    plan.layers.back().index = static_cast<int>(plan.layers.size()) - 1;
    if (!whole.tensors.layers.empty()) part.tensors.layers.push_back(whole.tensors.layers.at(l));
  }
  return part;
}

}  // namespace kvplan::estimates
