#pragma once
// Attention as at decode time: full pages are read packed, the open page in fp16.

#include <ATen/core/Tensor.h>

#include "forward/causal_attention.h"

namespace kvplan::forward {

/// K and V of one layer, [1, kv_heads, tokens, head_dim].
struct CachedKv {
  at::Tensor k, v;
};

/// Causal attention of q [1, query_heads, tokens, head_dim] in which page p holds positions t_p ..
/// t_p + page_tokens - 1, t_p = sink_tokens + p page_tokens, and the query at position t reads page
/// p from `packed` once it is full (t >= t_p + page_tokens - 1), all else from `exact`.
at::Tensor decode_attention(const at::Tensor& q, const CachedKv& exact, const CachedKv& packed,
                            int sink_tokens, int page_tokens, const AttentionRule& rule);

}  // namespace kvplan::forward
