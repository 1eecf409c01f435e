// Trains the tables of the trellis code on N(0,1) by generalised Lloyd iterations and writes
// tables.cpp: train_trellis OUTPUT. About three minutes on one core; equal bytes on every machine.
//
// One iteration encodes fresh vectors and moves each table entry to the mean of the values that
// took it (Linde, Buzo, Gray 1980; for trellises Stewart, Gray, Linde 1982), plus Gaussian noise
// that fades out. Measured at 2 bits, with an encoder 1 % worse than today's: .087 from one set of
// 512 vectors, .081 from fresh vectors, .077 with the noise; starts differ by less than 1 %.

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "quant/packing.h"
#include "quant/portable_math.h"
#include "quant/random.h"
#include "quant/trellis.h"

namespace kvplan::quant {
namespace {

constexpr std::uint64_t kSeed = 1;
constexpr int kStarts = 3;  // with permutations of their own; the best is kept
constexpr int kLength = 128;
constexpr int kIterations = 900, kTrainingVectors = 512;
constexpr double kNoiseDecay = 0.99;  // per iteration
/// From here on sums reach back over the iterations, which averages the samples of about 20.
constexpr int kFirstAveraging = 600;
constexpr double kMemory = 0.95;
constexpr int kSelectionVectors = 4096, kMeasuredVectors = 32768;

using Values = std::array<float, kTrellisStates>;

/// Draws of one kind; `use` and `index` keep them apart.
enum class Use : std::uint32_t { kPermutation, kTraining, kNoise, kSelection, kMeasurement };
RandomStream stream(Use use, std::uint32_t start = 0, std::uint32_t index = 0) {
  return {kSeed, StreamPurpose::kSimulation, static_cast<std::uint32_t>(use), start, index};
}

/// Entry s: the Gaussian quantile of ((s mod 2^b) 2^(8-b) + perm(s >> b) + 1/2) / 256, so that the
/// 2^b codes that may follow a state span the range evenly.
Values initial_values(int width, int start) {
  const int codes = 1 << width, joins = kTrellisStates / codes;
  std::vector<int> permutation(static_cast<std::size_t>(joins));
  std::iota(permutation.begin(), permutation.end(), 0);
  RandomStream random = stream(Use::kPermutation, static_cast<std::uint32_t>(start),
                               static_cast<std::uint32_t>(width));
  for (std::size_t i = permutation.size(); i > 1; --i)
    std::swap(permutation[i - 1], permutation[random.next_below(static_cast<std::uint32_t>(i))]);
  Values values;
  for (int s = 0; s < kTrellisStates; ++s) {
    const int rank = s % codes * joins + permutation[static_cast<std::size_t>(s / codes)];
    values[static_cast<std::size_t>(s)] =
        static_cast<float>(normal_quantile((rank + 0.5) / kTrellisStates));
  }
  return values;
}

struct CellSums {
  std::array<double, kTrellisStates> sum{}, count{};
};

struct Distortion {
  double mean = 0, error = 0;  // and its standard error
};

/// Encodes `vectors` fresh vectors of `length` coordinates; adds them to their cells if asked.
Distortion encode_fresh(const Values& values, int width, int length, int vectors,
                        RandomStream random, CellSums* cells = nullptr) {
  const auto n = static_cast<std::size_t>(length);
  const Trellis trellis(std::vector<TrellisStep>(n, {width, values.data(), 1}));
  std::vector<float> x(n);
  std::vector<std::uint8_t> states(n);
  double sum = 0, sum_squares = 0;
  for (int v = 0; v < vectors; ++v) {
    for (float& value : x) value = static_cast<float>(random.next_normal());
    trellis.encode(x, states);
    double squares = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double error = double{x[i]} - double{values[states[i]]};
      squares += error * error;
      if (!cells) continue;
      cells->sum[states[i]] += double{x[i]};
      cells->count[states[i]] += 1;
    }
    sum += squares / length;
    sum_squares += squares / length * (squares / length);
  }
  const double mean = sum / vectors;
  return {mean, std::sqrt((sum_squares / vectors - mean * mean) / vectors)};
}

Values trained_values(int width, int start) {
  Values values = initial_values(width, start);
  double noise = std::ldexp(1.0, 1 - width);
  CellSums cells;
  for (int iteration = 0; iteration < kIterations; ++iteration, noise *= kNoiseDecay) {
    const double memory = iteration < kFirstAveraging ? 0 : kMemory;
    for (double& sum : cells.sum) sum *= memory;
    for (double& count : cells.count) count *= memory;
    const auto a = static_cast<std::uint32_t>(start * 8 + width);
    const auto b = static_cast<std::uint32_t>(iteration);
    encode_fresh(values, width, kLength, kTrainingVectors, stream(Use::kTraining, a, b), &cells);
    RandomStream random = stream(Use::kNoise, a, b);
    for (std::size_t s = 0; s < values.size(); ++s) {
      const double shift = iteration < kFirstAveraging ? noise * random.next_normal() : 0;
      if (cells.count[s] > 0) values[s] = static_cast<float>(cells.sum[s] / cells.count[s] + shift);
    }
  }
  for (float& value : values) value = round_to_half(value);
  return values;
}

std::string shortest(auto value) {
  std::array<char, 32> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

/// Six decimal places.
std::string rounded(double value) { return shortest(std::round(value * 1e6) / 1e6); }

TrellisTable trained_table(int width) {
  TrellisTable best;
  double least = 2;
  for (int start = 0; start < kStarts; ++start) {
    const Values values = trained_values(width, start);
    const double distortion =
        encode_fresh(values, width, kLength, kSelectionVectors, stream(Use::kSelection)).mean;
    std::cerr << width << " bits, start " << start << ": " << rounded(distortion) << "\n";
    if (distortion >= least) continue;
    least = distortion;
    best = {.width = width, .values = values};
  }
  for (const int length : {32, 64, kLength}) {
    const Distortion d =
        encode_fresh(best.values, width, length, kMeasuredVectors, stream(Use::kMeasurement));
    std::cout << width << " bits, " << length << " coordinates: " << rounded(d.mean) << " +- "
              << rounded(d.error) << "\n";
    best.distortion = d.mean;
    best.distortion_error = d.error;
  }
  return best;
}

std::string table_text(const TrellisTable& table) {
  std::string text = "    {.width = " + std::to_string(table.width) +
                     ",\n     .distortion = " + rounded(table.distortion) +
                     ",\n     .distortion_error = " + rounded(table.distortion_error) +
                     ",\n     .values = {";
  constexpr std::size_t kPerLine = 4;
  for (std::size_t s = 0; s < table.values.size(); ++s) {
    if (s % kPerLine == 0) text += "\n         ";
    text += shortest(double{table.values[s]});
    if (s + 1 < table.values.size()) text += s % kPerLine + 1 == kPerLine ? "," : ", ";
  }
  return text + "}},\n";
}

int run(const char* output) {
  std::string text =
      "// Written by train_trellis.cpp.\n#include \"data/trellis/tables.h\"\n\n"
      "namespace kvplan::quant {\n\n// clang-format off\n"
      "const std::array<TrellisTable, kMaxTrellisWidth> kTrellisTables = {{\n";
  for (int width = 1; width <= kMaxTrellisWidth; ++width) text += table_text(trained_table(width));
  text += "}};\n// clang-format on\n\n}  // namespace kvplan::quant\n";
  std::ofstream file(output, std::ios::binary);
  file << text << std::flush;
  if (file) return 0;
  std::cerr << output << ": cannot be written\n";
  return 1;
}

}  // namespace
}  // namespace kvplan::quant

int main(int argc, char** argv) {
  if (argc == 2) return kvplan::quant::run(argv[1]);
  std::cerr << "usage: train_trellis OUTPUT\n";
  return 2;
}
