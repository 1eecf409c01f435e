#include "calib/capture.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <optional>

#include "forward/causal_attention.h"
#include "forward/decoder.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

/// x [1, heads, tokens, head_dim] without its batch dimension.
Array<float> copied(const at::Tensor& x, const std::string& file, int layer, const char* what) {
  if (!at::isfinite(x).all().item<bool>())
    throw InputError(file, "layers." + std::to_string(layer) + "." + what,
                     "expected finite activations, found NaN or Inf; the weights are damaged or "
                     "overflow float32");
  const at::Tensor dense = x[0].contiguous();
  Array<float> out;
  out.shape = dense.sizes().vec();
  const float* data = dense.const_data_ptr<float>();
  out.data.assign(data, data + dense.numel());
  return out;
}

}  // namespace

std::vector<LayerCapture> capture_window(const models::ModelReader& model,
                                         const tokenizers::TextWindow& window, int threads) {
  if (window.tokens.empty()) throw ArgumentError("a window to capture needs tokens");
  const at::NoGradGuard no_grad;
  if (threads > 0) at::set_num_threads(threads);
  const forward::Decoder decoder(model);
  const std::string file = model.path().string();
  std::vector<LayerCapture> layers;
  const at::Tensor ids =
      at::from_blob(const_cast<std::int32_t*>(window.tokens.data()),
                    {1, static_cast<std::int64_t>(window.tokens.size())}, at::kInt)
          .to(at::kLong);
  decoder.hidden(ids, {}, [&](const at::Tensor& q, const forward::LayerKv& kv) {
    layers.push_back({copied(q, file, kv.layer, "q"), copied(kv.k_pre, file, kv.layer, "k_pre"),
                      copied(kv.k, file, kv.layer, "k"), copied(kv.v, file, kv.layer, "v")});
    return forward::causal_attention(q, kv.k, kv.v,
                                     forward::attention_rule(decoder.config(), kv.layer));
  });
  return layers;
}

}  // namespace kvplan::calib
