// Speed of the forward pass (logits of every position) and of a whole profile on the same tokens.
//   forward_bench MODEL TEXT [--windows N] [--window T] [--batch B] [--threads N] [--gpu I]
//                 [--dtype fp32|bf16|fp16] [--profile] [--rounds R]
// Prints one JSON object: tokens, seconds per round of each, tokens per second (median), perplexity
// over all positions.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <span>

#include "calib/profiler.h"
#include "forward/decoder.h"
#include "forward/device.h"

namespace {

using namespace kvplan;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Sum of -log p(next token) over a batch of windows, logits of every position computed.
double batch_nll(const forward::Decoder& decoder, std::span<const tokenizers::TextWindow> batch) {
  const c10::InferenceMode guard;
  std::vector<std::int64_t> ids;
  for (const auto& window : batch)
    ids.insert(ids.end(), window.tokens.begin(), window.tokens.end());
  const auto count = static_cast<std::int64_t>(batch.front().tokens.size());
  const auto input = at::tensor(ids, at::kLong).view({-1, count}).to(decoder.device());
  const auto hidden = decoder.hidden(input);
  constexpr std::int64_t kRows = 256;
  auto nll = at::zeros({}, at::TensorOptions(at::kDouble).device(decoder.device()));
  for (std::int64_t begin = 0; begin < count; begin += kRows) {
    const auto end = std::min(begin + kRows, count);
    const auto log_p = at::log_softmax(decoder.head(hidden.slice(1, begin, end)), -1);
    const auto targets = input.slice(1, begin + 1, std::min(end + 1, count));
    nll -= log_p.slice(1, 0, targets.size(1)).gather(2, targets.unsqueeze(2)).sum(at::kDouble);
  }
  return nll.item<double>();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Speed of the forward pass and of a profile", "forward_bench"};
  std::string model_path, text_path;
  int windows = 6, window = 1024, batch = 1, threads = 2, rounds = 3;
  forward::Device device = forward::Device::kCpu;
  std::string dtype = "fp32";
  bool profile = false;
  app.add_option("model", model_path)->required();
  app.add_option("text", text_path)->required();
  app.add_option("--windows", windows);
  app.add_option("--window", window);
  app.add_option("--batch", batch)->check(CLI::PositiveNumber);
  app.add_option("--gpu", device.gpu, "CUDA device; without it the CPU");
  app.add_option("--dtype", dtype)->check(CLI::IsMember({"fp32", "bf16", "fp16"}));
  app.add_option("--threads", threads);
  app.add_option("--rounds", rounds);
  app.add_flag("--profile", profile, "Also time a profile of the same tokens");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(threads);

  const auto weights = dtype == "bf16"   ? forward::WeightType::kBFloat16
                       : dtype == "fp16" ? forward::WeightType::kFloat16
                                         : forward::WeightType::kFloat32;
  const auto reader = models::open_model(model_path);
  const auto tokenizer = tokenizers::open_tokenizer(model_path);
  const std::vector<tokenizers::TokenSource> sources = {
      tokenizers::load_text(text_path, *tokenizer, 0, 1)};
  const auto texts = tokenizers::make_windows(sources, window, windows);
  const auto tokens = static_cast<double>(texts.size()) * window;

  double nll = 0;
  std::vector<double> forward;
  {
    const forward::Decoder decoder(*reader, weights, device);
    const auto batches = [&](const auto& visit) {
      const auto step = static_cast<std::size_t>(batch);
      for (std::size_t begin = 0; begin < texts.size(); begin += step)
        visit(std::span(texts).subspan(begin, std::min(step, texts.size() - begin)));
    };
    batch_nll(decoder,
              std::span(texts).first(std::min<std::size_t>(batch, texts.size())));  // warm-up
    for (int r = 0; r < rounds; ++r) {
      nll = 0;
      forward.push_back(seconds_of([&] {
        batches([&](std::span<const tokenizers::TextWindow> b) { nll += batch_nll(decoder, b); });
      }));
    }
  }
  std::vector<double> profiling;
  if (profile) {
    const auto folder =
        std::filesystem::temp_directory_path() / ("kvplan-bench-" + std::to_string(getpid()));
    calib::ProfileOptions options;
    options.window = window;
    options.batch = batch;
    options.weights = weights;
    options.devices = {device};
    options.threads = threads;
    for (int r = 0; r < rounds; ++r) {
      std::filesystem::remove_all(folder);
      profiling.push_back(seconds_of(
          [&] { calib::run_profile(*reader, texts, {sources[0].info}, options, folder, {}); }));
    }
    std::filesystem::remove_all(folder);
  }
  std::printf(
      "{\"tokens\":%.0f,\"perplexity\":%.4f,\"forward_seconds\":%.3f,\"forward_tokens_per_second\":"
      "%.1f",
      tokens, std::exp(nll / (static_cast<double>(texts.size()) * (window - 1))), median(forward),
      tokens / median(forward));
  if (profile) {
    std::printf(",\"profile_seconds\":%.3f,\"profile_over_forward\":%.3f", median(profiling),
                median(profiling) / median(forward));
  }
  std::printf("}\n");
}
