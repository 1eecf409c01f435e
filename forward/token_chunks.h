#pragma once
// Functions of single tokens over long sequences, in bounded memory.

#include <ATen/core/Tensor.h>

#include <functional>

namespace kvplan::forward {

/// Treats every row of x [rows, channels] by itself.
using TokenFunction = std::function<at::Tensor(const at::Tensor& x)>;

/// f over the tokens of x [batch, tokens, channels]. More than kTokensAtOnce are cut into chunks,
/// and what is inside `f` exists for one chunk at a time: a backward pass calls `f` once more
/// instead of keeping it. Gradients flow to x alone, not to what f captures.
at::Tensor by_token_chunks(const at::Tensor& x, const TokenFunction& f);

inline constexpr std::int64_t kTokensAtOnce = 4096;

}  // namespace kvplan::forward
