#include "generation/generate.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>

#include "forward/cache_attention.h"
#include "generation/generator.h"
#include "quant/page_layout.h"
#include "schemas/error.h"

namespace kvplan::generation {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

/// Bytes that the first `tokens` of a sequence take in a plan's cache.
std::int64_t cache_bytes(const PlanBundle& plan, std::int64_t tokens, std::int64_t fp16_per_token) {
  const std::int64_t pages =
      std::max<std::int64_t>(0, tokens - plan.plan.sink_tokens) / plan.plan.page_tokens;
  std::int64_t bytes = (tokens - pages * plan.plan.page_tokens) * fp16_per_token;
  for (const quant::LayerFormat& layer : quant::page_format(plan))
    bytes += pages * static_cast<std::int64_t>(layer.block_bytes);
  return bytes;
}

}  // namespace

Generation generate(const models::ModelReader& model, std::span<const std::int32_t> prompt,
                    const GenerateOptions& options,
                    const std::function<void(std::int32_t)>& on_token, const RunControl& control) {
  const auto room = static_cast<std::int64_t>(prompt.size()) + options.max_tokens;
  if (const std::int64_t context = model.config().max_context; context > 0 && room > context)
    throw ArgumentError("a prompt of " + std::to_string(prompt.size()) + " tokens and " +
                        std::to_string(options.max_tokens) +
                        " more exceed the model's context of " + std::to_string(context) +
                        "; shorten the prompt or --max-tokens");
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);
  std::optional<forward::CacheAttention> pages;  // before the weights: refusals come early
  if (options.plan) pages.emplace(options.runtime, *options.plan, model.config(), 1, room);
  const forward::Decoder decoder(model, options.weights, options.device);
  Generator generator(decoder, pages ? &*pages : nullptr, room);

  Generation result;
  const auto is_stop = [&](std::int32_t token) {
    return std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) !=
           options.stop_tokens.end();
  };
  const auto begin = Clock::now();
  auto first = begin, last = begin;
  const ContinuationHooks hooks = {
      .before_token =
          [&] {
            if (const int signal = control.stopping(); signal != 0)
              throw InterruptedError(signal, "generation stopped after " +
                                                 std::to_string(result.tokens.size()) + " tokens");
          },
      .after_token =
          [&](std::int32_t token) {
            last = Clock::now();
            if (result.decode_steps++ == 0) first = last;
            if (is_stop(token)) return;
            result.tokens.push_back(token);
            on_token(token);
          }};
  const auto all =
      continue_greedily(generator, prompt, options.max_tokens, options.stop_tokens, hooks);
  result.decode_steps = static_cast<std::int64_t>(all.size()) - 1;
  result.stopped = all.size() > result.tokens.size();
  result.prefill_seconds = seconds(first - begin);
  result.decode_seconds = seconds(last - first);

  const std::int64_t elements = elements_per_token(model.spec());
  result.cached_tokens = generator.position();
  result.fp16_bytes = 2 * elements * result.cached_tokens;
  result.cache_bytes = options.plan ? cache_bytes(*options.plan, result.cached_tokens, 2 * elements)
                                    : result.fp16_bytes;
  result.effective_bits = 8 * static_cast<double>(result.cache_bytes) /
                          static_cast<double>(elements * result.cached_tokens);
  return result;
}

}  // namespace kvplan::generation
