#include "evaluation/evaluation_state.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"

namespace kvplan::evaluation {
namespace {

constexpr const char* kKeyTensor = "key";

Array<std::int64_t> key_tensor(const std::string& key) {
  constexpr std::size_t kDigits = 16;  // of a 64-bit word
  Array<std::int64_t> words({4});
  for (std::size_t i = 0; i < words.data.size(); ++i)
    words.data[i] = std::bit_cast<std::int64_t>(
        std::uint64_t{std::stoull(key.substr(kDigits * i, kDigits), nullptr, 16)});
  return words;
}

/// Every score table with its tensor name.
template <class State, class Visit>
void for_each_table(State& state, Visit visit) {
  visit("reference_nll", state.reference_nll);
  for (std::size_t i = 0; i < state.passes.size(); ++i) {
    const std::string prefix = "passes." + std::to_string(i) + ".";
    visit(prefix + "kl", state.passes[i].kl);
    visit(prefix + "nll", state.passes[i].nll);
    visit(prefix + "same_top1", state.passes[i].same_top1);
  }
}

}  // namespace

EvaluationState::EvaluationState(std::size_t pass_count, std::int64_t scored) : passes(pass_count) {
  for_each_table(*this, [&](const std::string&, TokenScores& table) { table.scored = scored; });
}

void append_state(EvaluationState& state, const EvaluationState& more) {
  unpack_state(pack_state(more), state);
}

std::vector<std::byte> pack_state(const EvaluationState& state) {
  std::vector<std::byte> bytes;
  for_each_table(state, [&](const std::string&, const TokenScores& table) {
    const auto values = std::as_bytes(std::span(table.values));
    bytes.insert(bytes.end(), values.begin(), values.end());
  });
  return bytes;
}

void unpack_state(std::span<const std::byte> bytes, EvaluationState& state) {
  const std::size_t tables = 1 + 3 * state.passes.size();
  const auto scored = static_cast<std::size_t>(state.reference_nll.scored);
  const std::size_t window_bytes = tables * scored * sizeof(double);
  if (bytes.size() % window_bytes != 0)
    throw InternalError("scores of other windows: " + std::to_string(bytes.size()) +
                        " bytes are no whole windows of " + std::to_string(window_bytes));
  const std::size_t windows = bytes.size() / window_bytes;
  for_each_table(state, [&](const std::string&, TokenScores& table) {
    const std::size_t old = table.values.size();
    table.values.resize(old + windows * scored);
    const auto out = std::as_writable_bytes(std::span(table.values).subspan(old));
    std::copy_n(bytes.begin(), out.size(), out.begin());
    bytes = bytes.subspan(out.size());
    table.windows += static_cast<std::int64_t>(windows);
  });
}

void append_window(TokenScores& scores, std::span<const double> window) {
  scores.values.insert(scores.values.end(), window.begin(), window.end());
  ++scores.windows;
}

void save_state(const EvaluationState& state, const std::string& key,
                const std::filesystem::path& file) {
  SafetensorsWriter writer;
  writer.add(kKeyTensor, key_tensor(key));
  for_each_table(state, [&](const std::string& name, const TokenScores& table) {
    Array<double> values;
    values.shape = {table.windows, table.scored};
    values.data = table.values;
    writer.add(name, values);
  });
  write_file_atomically(file, writer.bytes());
}

void resume_state(EvaluationState& state, const std::string& key,
                  const std::filesystem::path& file) {
  if (!std::filesystem::exists(file)) return;
  const SafetensorsFile stored(file);
  if (stored.i64(kKeyTensor, std::array<std::int64_t, 1>{4}) != key_tensor(key)) return;
  const Array<double> reference = stored.f64("reference_nll");
  const std::int64_t windows = reference.shape.empty() ? 0 : reference.shape[0];
  for_each_table(state, [&](const std::string& name, TokenScores& table) {
    table.values = stored.f64(name, std::array{windows, table.scored}).data;
    table.windows = windows;
  });
}

}  // namespace kvplan::evaluation
