#include "calib/evaluation_state.h"

#include <array>
#include <bit>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/safetensors.h"

namespace kvplan::calib {
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

}  // namespace kvplan::calib
