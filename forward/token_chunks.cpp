#include "forward/token_chunks.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <vector>

namespace kvplan::forward {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// The function as autograd keeps it between the two passes.
struct KeptFunction final : torch::CustomClassHolder {
  explicit KeptFunction(TokenFunction f) : f(std::move(f)) {}
  TokenFunction f;
};

/// Row blocks of x [rows, channels].
std::vector<at::Tensor> chunks(const at::Tensor& x) { return x.split(kTokensAtOnce); }

struct Chunked : torch::autograd::Function<Chunked> {
  static Variable forward(AutogradContext* context, const Variable& x, TokenFunction f) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& chunk : chunks(x)) parts.push_back(f(chunk));
    context->save_for_backward({x});
    context->saved_data["f"] =
        at::IValue::make_capsule(c10::make_intrusive<KeptFunction>(std::move(f)));
    return at::cat(parts);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const at::Tensor x = context->get_saved_variables()[0];
    const auto capsule = context->saved_data["f"].toCapsule();
    const auto& f = static_cast<const KeptFunction&>(*capsule).f;
    const std::vector<at::Tensor> inputs = chunks(x), outputs = chunks(gradients[0]);
    std::vector<at::Tensor> parts;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const at::AutoGradMode with_grad(true);
      const at::Tensor leaf = inputs[i].detach().requires_grad_();
      parts.push_back(torch::autograd::grad({f(leaf)}, {leaf}, {outputs[i]})[0]);
    }
    return {at::cat(parts), Variable()};
  }
};

}  // namespace

at::Tensor by_token_chunks(const at::Tensor& x, const TokenFunction& f) {
  const at::Tensor rows = x.flatten(0, 1);
  const at::Tensor y = rows.size(0) <= kTokensAtOnce ? f(rows) : Chunked::apply(rows, f);
  return y.view({x.size(0), x.size(1), -1});
}

}  // namespace kvplan::forward
