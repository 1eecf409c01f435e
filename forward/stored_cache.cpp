#include "forward/stored_cache.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <exception>
#include <span>
#include <string>
#include <thread>

#include "forward/decode_attention.h"
#include "schemas/error.h"

namespace kvplan::forward {
namespace {

void require_equal(const char* what, int plan, int model) {
  if (plan != model)
    throw ArgumentError("the plan is for " + std::to_string(plan) + " " + what +
                        ", the model has " + std::to_string(model) +
                        "; give the model that the plan was made for");
}

/// round_trip of x [tokens, kv_heads, head_dim] on several threads.
void round_trip_parallel(const quant::Codec& codec, const quant::KvShape& shape,
                         std::int64_t first_position, std::span<const float> x,
                         std::span<float> x_hat, int threads) {
  const std::int64_t multiple = codec.token_multiple(),
                     groups = (shape.tokens + multiple - 1) / multiple;
  const std::int64_t chunk = (groups + threads - 1) / threads * multiple;
  const std::int64_t row = std::int64_t{shape.kv_heads} * shape.head_dim;
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(threads));
  const auto run = [&](int thread) {
    const std::int64_t begin = thread * chunk, end = std::min(shape.tokens, begin + chunk);
    if (begin >= end) return;
    const auto part = [&](auto span) {
      return span.subspan(static_cast<std::size_t>(begin * row),
                          static_cast<std::size_t>((end - begin) * row));
    };
    try {
      quant::round_trip(codec, {end - begin, shape.kv_heads, shape.head_dim},
                        first_position + begin, part(x), part(x_hat));
    } catch (...) {
      failures[static_cast<std::size_t>(thread)] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> workers;
    for (int thread = 1; thread < threads; ++thread) workers.emplace_back(run, thread);
    run(0);
  }
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace

at::Tensor round_to_fp16(const at::Tensor& x) { return x.to(at::kHalf).to(at::kFloat); }

void store_as_fp16(LayerKv& kv) {
  kv.k = round_to_fp16(kv.k);
  kv.v = round_to_fp16(kv.v);
}

void require_geometry(const ModelSpec& plan_model, const models::ModelConfig& config) {
  require_equal("layers", plan_model.num_layers, config.num_layers);
  require_equal("KV heads", plan_model.kv_heads, config.kv_heads);
  require_equal("channels per head", plan_model.head_dim, config.head_dim);
}

StoredCache::StoredCache(const PlanBundle& bundle, const models::ModelConfig& config, int threads)
    : sink_tokens_(bundle.plan.sink_tokens),
      page_tokens_(bundle.plan.page_tokens),
      threads_(threads) {
  require_geometry(bundle.plan.model, config);
  for (int l = 0; l < config.num_layers; ++l) {
    codecs_.push_back(
        {quant::make_codec(bundle, l, Side::kKey), quant::make_codec(bundle, l, Side::kValue)});
    for (const auto& codec : codecs_.back())
      if (page_tokens_ < 1 || page_tokens_ % codec->token_multiple() != 0)
        throw ArgumentError("pages of " + std::to_string(page_tokens_) +
                            " tokens do not hold whole groups of " +
                            std::to_string(codec->token_multiple()) +
                            " tokens, which the plan's codec shares scales over");
  }
}

at::Tensor StoredCache::read_back(int layer, Side side, const at::Tensor& x,
                                  std::int64_t first_position) const {
  // Codecs take [tokens, kv_heads, head_dim].
  const at::Tensor rows = round_to_fp16(x).squeeze(0).transpose(0, 1).to(at::kCPU).contiguous();
  const std::int64_t tokens = rows.size(0),
                     sinks = std::clamp<std::int64_t>(sink_tokens_ - first_position, 0, tokens);
  at::Tensor read = at::empty_like(rows);
  read.narrow(0, 0, sinks).copy_(rows.narrow(0, 0, sinks));
  const auto offset = static_cast<std::size_t>(sinks * rows.stride(0)),
             count = static_cast<std::size_t>(rows.numel());
  const std::span<const float> in(rows.const_data_ptr<float>(), count);
  const std::span<float> out(read.data_ptr<float>(), count);
  const auto& codec =
      *codecs_.at(static_cast<std::size_t>(layer)).at(static_cast<std::size_t>(side));
  round_trip_parallel(
      codec, {tokens - sinks, static_cast<int>(rows.size(1)), static_cast<int>(rows.size(2))},
      first_position + sinks, in.subspan(offset), out.subspan(offset), threads_);
  return read.transpose(0, 1).unsqueeze(0).to(x.device());
}

AttentionPath StoredCache::worst() const {
  return {.hook =
              [this](LayerKv& kv) {
                kv.k = read_back(kv.layer, Side::kKey, kv.k);
                kv.v = read_back(kv.layer, Side::kValue, kv.v);
              },
          .attention = {}};
}

AttentionPath StoredCache::decode(const models::ModelConfig& config) const {
  return {.hook = store_as_fp16,
          .attention = [this, &config](const at::Tensor& q, const LayerKv& kv) {
            const CachedKv packed{read_back(kv.layer, Side::kKey, kv.k),
                                  read_back(kv.layer, Side::kValue, kv.v)};
            return decode_attention(q, {kv.k, kv.v}, packed, sink_tokens_, page_tokens_,
                                    attention_rule(config, kv.layer));
          }};
}

at::Tensor StoredCache::hidden_worst(const Decoder& decoder, const at::Tensor& ids) const {
  return decoder.hidden(ids, worst().hook);
}

at::Tensor StoredCache::hidden_decode(const Decoder& decoder, const at::Tensor& ids) const {
  const AttentionPath path = decode(decoder.config());
  return decoder.hidden(ids, path.hook, path.attention);
}

}  // namespace kvplan::forward
