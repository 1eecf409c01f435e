#pragma once
// Queries, keys and values of one window of text, for studies of a model's cache. Torch-free.

#include <vector>

#include "models/model.h"
#include "schemas/types.h"
#include "tokenizers/text.h"

namespace kvplan::calib {

/// What attention of one layer sees, float32, row-major. Layers of `capture_window` are in order.
struct LayerCapture {
  Array<float> q;      // [query_heads, tokens, head_dim] after rotary
  Array<float> k_pre;  // [kv_heads, tokens, head_dim] before rotary
  Array<float> k, v;   // [kv_heads, tokens, head_dim] k after rotary
};

/// One forward pass without quantisation. Memory: layers x tokens x (query_heads + 3 kv_heads) x
/// head_dim floats. InputError on NaN or Inf.
std::vector<LayerCapture> capture_window(const models::ModelReader& model,
                                         const tokenizers::TextWindow& window, int threads = 0);

}  // namespace kvplan::calib
