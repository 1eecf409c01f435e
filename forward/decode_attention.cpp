#include "forward/decode_attention.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

namespace kvplan::forward {

// Queries t_p - 1 .. t_p + page_tokens - 2 all read packed vectors below t_p and exact ones from
// there on, so one page of queries is one call. The cache is copied once and turns from exact to
// packed page by page, in the order of the queries.
at::Tensor decode_attention(const at::Tensor& q, const CachedKv& exact, const CachedKv& packed,
                            int sink_tokens, int page_tokens, const AttentionRule& rule) {
  constexpr std::int64_t kTokenDim = 2;
  const std::int64_t tokens = q.size(kTokenDim);
  CachedKv cache{exact.k.clone(), exact.v.clone()};
  at::Tensor out = at::empty_like(q);
  std::int64_t page_begin = sink_tokens;  // everything below is packed (or a sink)
  for (std::int64_t begin = 0, end = 0; begin < tokens; begin = end) {
    end = std::min(tokens, page_begin + page_tokens - 1);
    if (end > begin) {
      const std::int64_t queries = end - begin;
      const at::Tensor attended =
          causal_attention(q.narrow(kTokenDim, begin, queries), cache.k.narrow(kTokenDim, 0, end),
                           cache.v.narrow(kTokenDim, 0, end), rule, begin);
      out.narrow(kTokenDim, begin, queries).copy_(attended);
    }
    if (end == tokens) break;
    cache.k.narrow(kTokenDim, page_begin, page_tokens)
        .copy_(packed.k.narrow(kTokenDim, page_begin, page_tokens));
    cache.v.narrow(kTokenDim, page_begin, page_tokens)
        .copy_(packed.v.narrow(kTokenDim, page_begin, page_tokens));
    page_begin += page_tokens;
  }
  return out;
}

}  // namespace kvplan::forward
