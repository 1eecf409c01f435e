// Writes the plans that bench/decode.py times, of one layer each: rotated codes of one width, fp16,
// and mixed plans that the planner allocates from synthetic moments, with scalar and with trellis
// codes. Prints what they store.

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "planner/allocator.h"
#include "planner/budget.h"
#include "quant/baselines.h"
#include "quant/codebook.h"
#include "quant/fit.h"
#include "quant/page_layout.h"
#include "quant/random.h"
#include "quant/rotation.h"
#include "schemas/error.h"

namespace {

using namespace kvplan;
using Matrix = std::vector<double>;  // d x d, row-major

constexpr int kSinkTokens = 4;
constexpr std::int64_t kContext = 8192;
constexpr std::uint64_t kSeed = 1;
constexpr double kMixedBits = 3.1;
constexpr double kRotaryBase = 500000;
constexpr const char* kProgram = "kvplan decode_plans";

struct Options {
  std::filesystem::path out;
  int kv_heads = 0, head_dim = 0, queries_per_kv = 4;
};

// Synthetic moments: spectra of keys, values and their Fisher matrices fall by powers of the index
// in unrelated bases, those of keys fastest. A third of the key energy is the mean. Heads differ in
// weight by two decades, so that the one layer mixes widths as the layers of a model do between
// them.
constexpr int kTokens = 4096;
constexpr double kSpectrumK = 1.2, kSpectrumV = 0.6, kSpectrumFisher = 1.0;
constexpr double kHeadDecades = 2;
constexpr double kFisherTrace = 1e-3;    // of the heaviest head
constexpr double kMeanToVariance = 0.5;  // |mean|^2 / tr(C) of keys: a third of E|k|^2
constexpr double kCoherence = 2;         // E of the summed error squared over that of independent
                                         // tokens

/// index^-power, scaled to the sum `total`.
std::vector<double> falling_spectrum(int d, double power, double total) {
  std::vector<double> values;
  double sum = 0;
  for (int i = 1; i <= d; ++i) sum += values.emplace_back(std::pow(i, -power));
  for (double& value : values) value *= total / sum;
  return values;
}

/// a diag(weights) b^T.
Matrix sandwich(const Matrix& a, const std::vector<double>& weights, const Matrix& b) {
  const std::size_t d = weights.size();
  Matrix out(d * d);
  for (std::size_t i = 0; i < d; ++i)
    for (std::size_t j = 0; j < d; ++j) {
      double sum = 0;
      for (std::size_t k = 0; k < d; ++k) sum += a[i * d + k] * weights[k] * b[j * d + k];
      out[i * d + j] = sum;
    }
  return out;
}

std::vector<double> roots(std::vector<double> values) {
  for (double& value : values) value = std::sqrt(value);
  return values;
}

std::vector<double> normals(std::size_t count, double scale, quant::RandomStream& random) {
  std::vector<double> out(count);
  for (double& value : out) value = scale * random.next_normal();
  return out;
}

/// The sums of `kTokens` tokens of one head. The one coherent window sums h x^T of centred x, so
/// the sums that would take the mean out of it stay 0.
void fill_head(LayerProfile& layer, Side side, int head) {
  quant::RandomStream random(kSeed, quant::StreamPurpose::kStudy, quant::head_side_key(head, side));
  const int head_dim = layer.head_dim;
  const auto d = static_cast<std::size_t>(head_dim);
  const auto row = static_cast<std::size_t>(head);
  const bool key = side == Side::kKey;
  const double weight = std::pow(10, -kHeadDecades * random.next_uniform());
  const auto variance = falling_spectrum(head_dim, key ? kSpectrumK : kSpectrumV, head_dim);
  const auto fisher = falling_spectrum(head_dim, kSpectrumFisher, kFisherTrace * weight);
  const Matrix basis = quant::haar_matrix(head_dim, random);
  const Matrix fisher_basis = quant::haar_matrix(head_dim, random);
  const auto mean = normals(d, key ? std::sqrt(kMeanToVariance) : 0, random);

  SideSums& sums = layer.side(side);
  const Matrix second = sandwich(basis, variance, basis);
  const Matrix outer_h = sandwich(fisher_basis, fisher, fisher_basis);
  for (std::size_t i = 0; i < d; ++i) {
    sums.sum.row(row)[i] = kTokens * mean[i];
    sums.absmax.row(row)[i] =
        static_cast<float>(5 * std::sqrt(second[i * d + i] + mean[i] * mean[i]));
    for (std::size_t j = 0; j < d; ++j) {
      sums.outer.row(row)[i * d + j] = kTokens * (second[i * d + j] + mean[i] * mean[j]);
      sums.fisher.row(row)[i * d + j] = kTokens * outer_h[i * d + j];
    }
  }
  sums.norm_sum.data[row] = kTokens * std::sqrt(head_dim * (1 + (key ? kMeanToVariance : 0)));

  const Matrix noise = normals(d * d, std::sqrt(kTokens * kCoherence), random);
  const Matrix right = sandwich(noise, roots(variance), basis);
  Matrix right_transposed(d * d);
  for (std::size_t i = 0; i < d; ++i)
    for (std::size_t j = 0; j < d; ++j) right_transposed[j * d + i] = right[i * d + j];
  const Matrix cross = sandwich(fisher_basis, roots(fisher), right_transposed);
  for (std::size_t i = 0; i < d * d; ++i)
    sums.cross.row(0)[row * d * d + i] = static_cast<float>(cross[i]);
}

Profile synthetic_profile(const ModelSpec& model, const std::vector<double>& inv_freq) {
  const std::int64_t heads = model.kv_heads, d = model.head_dim;
  Profile profile;
  profile.model = model;
  profile.tokens = profile.fisher_tokens = kTokens;
  profile.sink_tokens = kSinkTokens;
  profile.window = kTokens + kSinkTokens;
  profile.windows = {{0, profile.window, 0}};
  profile.seed = kSeed;
  LayerProfile& layer = profile.layers.emplace_back();
  layer.kv_heads = model.kv_heads;
  layer.head_dim = model.head_dim;
  layer.rotary_dim = model.rotary_dim;
  layer.inv_freq = inv_freq;
  layer.k_rotated_sum = layer.k_rotated_sumsq = Array<double>({heads, d});
  layer.norm_ratio_sum = Array<double>({heads}, kTokens);
  for (const Side side : kSides) {
    SideSums& sums = layer.side(side);
    sums.sum = Array<double>({heads, d});
    sums.outer = sums.fisher = Array<double>({heads, d, d});
    sums.norm_sum = Array<double>({heads});
    sums.absmax = Array<float>({heads, d});
    sums.cross = Array<float>({1, heads, d, d});
    sums.phase = Array<float>({1, heads, d, side == Side::kKey ? model.rotary_dim + 1 : 1});
  }
  std::vector<std::future<void>> parts;
  for (const Side side : kSides)
    for (int head = 0; head < model.kv_heads; ++head)
      parts.push_back(
          std::async(std::launch::async, [&, side, head] { fill_head(layer, side, head); }));
  for (auto& part : parts) part.get();
  return profile;
}

PlanBundle mixed_plan(const Profile& profile, int group_size, const std::string& code = "scalar") {
  quant::FitOptions options;
  options.code = code;
  options.context = kContext;
  options.group_size = group_size;
  options.threads = 0;
  const quant::Fit fit(profile, options);
  quant::PlanHeader header;
  header.budget = {"bits", kMixedBits};
  header.program = kProgram;
  planner::CacheGeometry geometry;
  geometry.elements = fit.costs().elements;
  geometry.context = kContext;
  geometry.sink_tokens = kSinkTokens;
  PlanBundle bundle = fit.assemble(
      planner::allocate(fit.costs(), planner::budget_bits(header.budget, geometry)), header);
  bundle.plan.effective_bits_at_context =
      planner::effective_bits_at_context(bundle.plan.effective_bits, geometry);
  return bundle;
}

/// TurboQuant with a Hadamard rotation, or a Haar one where head_dim is no power of two. Codebooks
/// are those of calibrated plans.
PlanBundle rotated_plan(const ModelSpec& model, const std::string& widths,
                        const std::vector<double>& inv_freq) {
  PlanBundle bundle = quant::baseline_plan("turboquant:" + widths + "+hadamard+nc+gauss", model,
                                           kSinkTokens, kContext, kSeed, inv_freq);
  for (auto& [width, name] : bundle.plan.codebooks) {
    name = width == 2 || width == 8 ? "uniform" : "lloyd_max_byte";
    bundle.tensors.levels[width] = quant::codebook(name, width).levels;
  }
  return bundle;
}

/// "6x2 4x5 0x1": coordinates in groups by width, as the planner gave them to one head.
std::string width_counts(const HeadPlan& head) {
  std::map<int, int, std::greater<>> counts;
  for (const int width : head.widths) ++counts[width];
  std::string out;
  for (const auto& [width, count] : counts)
    out += (out.empty() ? "" : " ") + std::to_string(width) + "x" + std::to_string(count);
  return out;
}

void write(const PlanBundle& bundle, const Options& options, const std::string& name) {
  write_plan(bundle, options.out / name, true);
  const auto formats = quant::page_format(read_plan(options.out / name));
  const double stored = static_cast<double>(formats.front().block_bytes) / quant::kPageTokens;
  const double elements = static_cast<double>(elements_per_token(bundle.plan.model));
  std::printf("%-10s %9.2f bytes per token of pages, %7.4f bits per element, plan %7.4f\n",
              name.c_str(), stored, 8 * stored / elements, bundle.plan.effective_bits);
  if (bundle.plan.codec != "calibrated") return;
  for (const Side side : kSides)
    for (std::size_t head = 0; head < bundle.plan.layers.front().side(side).heads.size(); ++head)
      std::printf("           %s head %zu, width x groups of %d: %s\n", side_name(side), head,
                  bundle.plan.group_size,
                  width_counts(bundle.plan.layers.front().side(side).heads[head]).c_str());
}

void write_plans(const Options& options) {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 1;
  model.kv_heads = options.kv_heads;
  model.query_heads = options.kv_heads * options.queries_per_kv;
  model.head_dim = model.rotary_dim = options.head_dim;
  model.rope.base = kRotaryBase;
  model.container = "hf";
  model.kv_weights_sha256 = std::string(64, '0');
  std::vector<double> inv_freq;
  for (int i = 0; i < model.rotary_dim / 2; ++i)
    inv_freq.push_back(std::pow(kRotaryBase, -2.0 * i / model.rotary_dim));

  std::filesystem::create_directories(options.out);
  const std::pair<const char*, const char*> rotated[] = {{"bits2", "2"},  {"bits3", "3"},
                                                         {"bits4", "4"},  {"bits8", "8"},
                                                         {"k4v2", "4/2"}, {"k3v2", "3/2"}};
  for (const auto& [name, widths] : rotated)
    write(rotated_plan(model, widths, inv_freq), options, name);
  write(quant::baseline_plan("fp16", model, kSinkTokens, kContext, kSeed, inv_freq), options,
        "fp16");
  const Profile profile = synthetic_profile(model, inv_freq);
  write(mixed_plan(profile, 8), options, "mixed8");
  write(mixed_plan(profile, 16), options, "mixed16");
  write(mixed_plan(profile, 8, "tcq"), options, "trellis8");
}

int parse_count(std::string_view name, std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1)
    throw ArgumentError(std::string(name) + ": expected a positive integer, found '" +
                        std::string(text) + "'");
  return value;
}

Options parse(const std::vector<std::string_view>& arguments) {
  Options options;
  for (std::size_t i = 0; i + 1 < arguments.size(); i += 2) {
    const std::string_view name = arguments[i], value = arguments[i + 1];
    if (name == "--out") {
      options.out = value;
    } else if (name == "--kv-heads") {
      options.kv_heads = parse_count(name, value);
    } else if (name == "--head-dim") {
      options.head_dim = parse_count(name, value);
    } else if (name == "--queries-per-kv") {
      options.queries_per_kv = parse_count(name, value);
    } else {
      throw ArgumentError("unknown option " + std::string(name));
    }
  }
  if (arguments.size() % 2 != 0 || options.out.empty() || options.kv_heads == 0 ||
      options.head_dim == 0)
    throw ArgumentError(
        "usage: decode_plans --out DIR --kv-heads H --head-dim D [--queries-per-kv G]");
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    write_plans(parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decode_plans: %s\n", error.what());
    return 1;
  }
}
