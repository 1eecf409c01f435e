#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "cli/commands.h"
#include "cli/stack_plans.h"
#include "models/model.h"
#include "quant/baselines.h"
#include "quant/cache_size.h"
#include "quant/page_layout.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct SizeFlags {
  std::filesystem::path model, plan;
  std::string arch, codec;
  std::int64_t context = 4096;
  int batch = 1, query_tokens = 1, multiprocessors = quant::DecodeGrid{}.blocks, sink_tokens = 4;
  double gib = 0;
  bool stacks = false;
};

struct Architecture {
  const char* name;
  int layers, query_heads, kv_heads, head_dim;
};
constexpr Architecture kArchitectures[] = {
    {"llama-3.1-8b", 32, 32, 8, 128}, {"llama-3.1-70b", 80, 64, 8, 128},
    {"llama-3.2-1b", 16, 32, 8, 64},  {"llama-3.2-3b", 28, 24, 8, 128},
    {"mistral-7b", 32, 32, 8, 128},   {"qwen2.5-0.5b", 24, 14, 2, 64},
    {"qwen2.5-7b", 28, 28, 4, 128},   {"qwen2.5-32b", 64, 40, 8, 128},
    {"qwen2.5-72b", 80, 64, 8, 128},  {"smollm2-135m", 30, 9, 3, 64},
    {"smollm2-1.7b", 24, 32, 32, 64},
};
constexpr int kMaxLayers = 4096, kMaxHeads = 4096, kMaxHeadDim = 4096;

/// A name of kArchitectures, or LAYERSxQUERY_HEADSxKV_HEADSxHEAD_DIM.
ModelSpec parse_architecture(const std::string& text) {
  ModelSpec spec;
  const auto known = std::ranges::find(kArchitectures, text, &Architecture::name);
  if (known != std::end(kArchitectures)) {
    spec.num_layers = known->layers;
    spec.query_heads = known->query_heads;
    spec.kv_heads = known->kv_heads;
    spec.head_dim = known->head_dim;
  } else {
    std::istringstream in(text);
    char x[3] = {};
    in >> spec.num_layers >> x[0] >> spec.query_heads >> x[1] >> spec.kv_heads >> x[2] >>
        spec.head_dim;
    const auto in_range = [](int value, int most) { return value >= 1 && value <= most; };
    if (in.fail() || !in.eof() || x[0] != 'x' || x[1] != 'x' || x[2] != 'x' ||
        !in_range(spec.num_layers, kMaxLayers) || !in_range(spec.query_heads, kMaxHeads) ||
        !in_range(spec.kv_heads, kMaxHeads) || !in_range(spec.head_dim, kMaxHeadDim)) {
      std::string names;
      for (const Architecture& a : kArchitectures)
        names += (names.empty() ? "" : ", ") + std::string(a.name);
      throw ArgumentError(
          "--arch: expected LAYERSxQUERY_HEADSxKV_HEADSxHEAD_DIM such as "
          "32x32x8x128, or one of " +
          names + "; found '" + text + "'");
    }
  }
  spec.architecture = "llama";
  spec.rotary_dim = spec.head_dim / 2 * 2;
  return spec;
}

/// The plan whose cache is sized: of a folder, or a published codec for a model.
PlanBundle find_plan(const SizeFlags& flags, const GlobalOptions& global) {
  if (!flags.plan.empty()) return read_plan(flags.plan);
  ModelSpec spec;
  models::ModelConfig config;
  if (flags.model.empty()) {
    spec = parse_architecture(flags.arch);
    config.head_dim = spec.head_dim;
    config.rotary_dim = spec.rotary_dim;
  } else {
    const auto model = models::open_model(flags.model);
    spec = model->spec();
    config = model->config();
  }
  return quant::baseline_plan(flags.codec, spec, flags.sink_tokens, flags.context, global.seed,
                              models::rotary_frequencies(config));
}

/// The cache of one plan at any context and batch.
class Sizes {
 public:
  Sizes(const PlanBundle& bundle, const SizeFlags& flags) : bundle_(bundle), flags_(flags) {}

  quant::CacheSize of(std::int64_t context, std::int64_t batch) const {
    quant::CacheGeometry geometry;
    geometry.query_heads = bundle_.plan.model.query_heads;
    geometry.max_sequences = static_cast<int>(batch);
    geometry.max_tokens = context;
    geometry.max_query_tokens = flags_.query_tokens;
    return quant::cache_size(bundle_, geometry, {.blocks = flags_.multiprocessors});
  }
  /// What the same tokens take in fp16.
  std::int64_t fp16(std::int64_t context, std::int64_t batch) const {
    return 2 * elements_per_token(bundle_.plan.model) * context * batch;
  }

 private:
  const PlanBundle& bundle_;
  const SizeFlags& flags_;
};

/// The largest n in 1..most for which fits(n), which holds up to it; 0 when none does.
template <class Fits>
std::int64_t largest(std::int64_t most, const Fits& fits) {
  std::int64_t low = 0, high = 1;
  while (high <= most && fits(high)) {
    low = high;
    high *= 2;
  }
  high = std::min(high, most + 1);
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

/// What a budget holds, of a plan and of fp16.
struct Capacity {
  std::int64_t batch = 0, context = 0, fp16_batch = 0, fp16_context = 0;
};

constexpr std::int64_t kMostSequences = 1 << 16, kMostTokens = 1 << 27;

Capacity capacity(const Sizes& sizes, const SizeFlags& flags) {
  const double bytes = flags.gib * 1024 * 1024 * 1024;
  const auto plan_fits = [&](std::int64_t context, std::int64_t batch) {
    return static_cast<double>(sizes.of(context, batch).total()) <= bytes;
  };
  const auto fp16_fits = [&](std::int64_t context, std::int64_t batch) {
    return static_cast<double>(sizes.fp16(context, batch)) <= bytes;
  };
  const auto at_context = [&](const auto& fits) {
    return largest(kMostSequences, [&](std::int64_t n) { return fits(flags.context, n); });
  };
  const auto at_batch = [&](const auto& fits) {
    return largest(kMostTokens, [&](std::int64_t n) { return fits(n, flags.batch); });
  };
  return {at_context(plan_fits), at_batch(plan_fits), at_context(fp16_fits), at_batch(fp16_fits)};
}

double ratio(std::int64_t fp16, std::size_t bytes) {
  return static_cast<double>(fp16) / static_cast<double>(bytes);
}

ModelSpec find_model(const SizeFlags& flags) {
  if (!flags.plan.empty()) return read_plan(flags.plan).plan.model;
  return flags.model.empty() ? parse_architecture(flags.arch)
                             : models::open_model(flags.model)->spec();
}

/// Every stack and format in one table: tokens alone, without what a server keeps beside its cache.
int run_stacks(const SizeFlags& flags, const GlobalOptions& global) {
  const ModelSpec model = find_model(flags);
  const std::int64_t tokens = flags.context * flags.batch,
                     fp16_per_token = 2 * elements_per_token(model);
  const auto sequences = [&](std::int64_t per_token) {
    return static_cast<std::int64_t>(
        flags.gib * 1024 * 1024 * 1024 /
        (static_cast<double>(per_token) * static_cast<double>(flags.context)));
  };
  auto sizes = stack_sizes(model);
  sizes.insert(sizes.begin(),
               {.stack = "any", .format = "fp16", .bytes_per_token = fp16_per_token});
  nlohmann::json rows = nlohmann::json::array();
  std::vector<std::string> header = {"stack", "K, V", "bytes per token", "bits", "MB", "x smaller"};
  if (flags.gib > 0) header.push_back("sequences");
  TextTable table(header);
  for (const StackSize& size : sizes) {
    const double bits = 8.0 * static_cast<double>(size.bytes_per_token) /
                        static_cast<double>(elements_per_token(model));
    nlohmann::json row = {{"stack", size.stack},
                          {"format", size.format},
                          {"bytes_per_token", size.bytes_per_token},
                          {"bits", bits},
                          {"bytes", size.bytes_per_token * tokens}};
    std::vector<std::string> line = {
        size.stack,
        size.format,
        std::to_string(size.bytes_per_token),
        fixed(bits, 3),
        megabytes(size.bytes_per_token * tokens),
        fixed(ratio(fp16_per_token, static_cast<std::size_t>(size.bytes_per_token)), 2)};
    if (flags.gib > 0) {
      row["sequences"] = sequences(size.bytes_per_token);
      line.push_back(std::to_string(sequences(size.bytes_per_token)));
    }
    rows.push_back(std::move(row));
    table.add_row(std::move(line));
  }
  if (global.json) {
    nlohmann::json j = {{"format", "kvplan.stack_sizes"},
                        {"version", 1},
                        {"context", flags.context},
                        {"batch", flags.batch},
                        {"rows", rows}};
    if (flags.gib > 0) j["gib"] = flags.gib;
    std::cout << j.dump(2) << '\n';
    return 0;
  }
  std::cout << flags.batch << (flags.batch == 1 ? " sequence of " : " sequences of ")
            << flags.context << " tokens"
            << (flags.gib > 0
                    ? ", and how many such sequences " + significant(flags.gib) + " GiB hold"
                    : "")
            << "\n\n"
            << table.text();
  return 0;
}

int run(const SizeFlags& flags, const GlobalOptions& global) {
  if (flags.stacks) return run_stacks(flags, global);
  const PlanBundle bundle = find_plan(flags, global);
  const Sizes sizes(bundle, flags);
  const quant::CacheSize size = sizes.of(flags.context, flags.batch);
  const std::int64_t fp16 = sizes.fp16(flags.context, flags.batch);
  const double per_token = static_cast<double>(size.total()) /
                           (static_cast<double>(flags.context) * static_cast<double>(flags.batch));
  const std::int64_t fp16_per_token = sizes.fp16(1, 1);
  std::int64_t block_bytes = 0;
  for (const quant::LayerFormat& layer : quant::page_format(bundle))
    block_bytes += layer.block_bytes;
  const double packed_per_token =
      static_cast<double>(block_bytes) / static_cast<double>(bundle.plan.page_tokens);
  std::optional<Capacity> fits;
  if (flags.gib > 0) fits = capacity(sizes, flags);

  const std::pair<const char*, std::size_t> parts[] = {
      {"pages", size.pages},     {"open", size.open},           {"tables", size.tables},
      {"statics", size.statics}, {"workspace", size.workspace}, {"total", size.total()}};
  if (global.json) {
    nlohmann::json j = {{"format", "kvplan.size"},
                        {"version", 1},
                        {"context", flags.context},
                        {"batch", flags.batch},
                        {"query_tokens", flags.query_tokens},
                        {"multiprocessors", flags.multiprocessors},
                        {"fp16_bytes", fp16},
                        {"ratio", ratio(fp16, size.total())},
                        {"bytes_per_token", per_token},
                        {"packed_bytes_per_token", packed_per_token},
                        {"fp16_bytes_per_token", fp16_per_token}};
    for (const auto& [name, bytes] : parts) j["bytes"][name] = bytes;
    if (fits) {
      j["fits"] = {{"gib", flags.gib},
                   {"batch", fits->batch},
                   {"context", fits->context},
                   {"fp16_batch", fits->fp16_batch},
                   {"fp16_context", fits->fp16_context}};
    }
    std::cout << j.dump(2) << '\n';
    return 0;
  }
  std::cout << flags.batch << (flags.batch == 1 ? " sequence of " : " sequences of ")
            << flags.context << " tokens, " << flags.query_tokens
            << " query tokens a step at most, " << flags.multiprocessors << " multiprocessors\n\n";
  TextTable table({"part", "bytes", "MB"});
  for (const auto& [name, bytes] : parts)
    table.add_row({name, std::to_string(bytes), megabytes(static_cast<std::int64_t>(bytes))});
  table.add_row({"fp16", std::to_string(fp16), megabytes(fp16)});
  std::cout << table.text() << '\n'
            << fixed(ratio(fp16, size.total()), 2) << "x smaller than fp16; " << fixed(per_token, 1)
            << " bytes per token of the whole, " << fixed(packed_per_token, 1)
            << " of a packed token, " << fp16_per_token << " in fp16\n";
  if (fits) {
    std::cout << significant(flags.gib) << " GiB hold " << fits->batch << " sequences of "
              << flags.context << " tokens (fp16 " << fits->fp16_batch << "), or " << flags.batch
              << " of " << fits->context << " tokens (fp16 " << fits->fp16_context << ")\n";
  }
  return 0;
}

}  // namespace

void add_size(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "size", "Device memory of the CUDA runtime for a plan, to the byte, beside fp16");
  auto f = std::make_shared<SizeFlags>();
  auto* plan = command->add_option("--plan,-p", f->plan, "Plan folder");
  auto* codec = command
                    ->add_option("--for", f->codec,
                                 "A published codec instead of a plan, such as turboquant:4 "
                                 "(docs/baselines.md); the model by --model or --arch")
                    ->excludes(plan);
  command
      ->add_flag("--stacks", f->stacks,
                 "The cache in every format of every serving stack instead, by --plan's model, "
                 "--model or --arch")
      ->excludes(codec);
  auto* model =
      command
          ->add_option("--model,-m", f->model, "GGUF file, or Hugging Face folder with config.json")
          ->excludes(plan);
  command
      ->add_option("--arch", f->arch,
                   "LAYERSxQUERY_HEADSxKV_HEADSxHEAD_DIM, or a name such as llama-3.1-8b")
      ->excludes(plan)
      ->excludes(model);
  command->add_option("--context", f->context, "Tokens of a sequence")
      ->check(CLI::Range(std::int64_t{1}, kMostTokens))
      ->capture_default_str();
  command->add_option("--batch", f->batch, "Sequences")
      ->check(CLI::Range(std::int64_t{1}, kMostSequences))
      ->capture_default_str();
  command
      ->add_option("--queries", f->query_tokens,
                   "Tokens of a sequence that attend in one step (speculative decoding)")
      ->check(CLI::Range(1, 4))
      ->capture_default_str();
  command
      ->add_option("--multiprocessors", f->multiprocessors,
                   "Of the GPU; the workspace depends on it (H100, H200: 132)")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--sinks", f->sink_tokens, "Sink tokens, for --for")
      ->check(CLI::Range(0, 1 << 16))
      ->needs(codec)
      ->capture_default_str();
  command->add_option("--gib", f->gib, "Say what fits into so many GiB")->check(positive_number());
  add_global_options(*command, global);
  command->callback([f, &global, &action] {
    if (f->plan.empty() &&
        ((f->codec.empty() && !f->stacks) || (f->model.empty() && f->arch.empty())))
      throw CLI::RequiredError("--plan, or --for or --stacks with --model or --arch,");
    action = [f, &global] { return run(*f, global); };
  });
}

}  // namespace kvplan::cli
