#pragma once
// Stored weights to float32: ggml block formats and plain floats.

#include <cstddef>
#include <span>

#include "schemas/gguf.h"

namespace kvplan::models {

/// Converts whole blocks: data.size() = out.size() / elements x bytes of ggml_block(type).
/// Bit-equal to gguf.quants.dequantize of the `gguf` Python package. ArgumentError on a size
/// mismatch.
void dequantize(GgmlType type, std::span<const std::byte> data, std::span<float> out);

/// Index of the first NaN or Inf; values.size() if there is none.
std::size_t first_non_finite(std::span<const float> values);

}  // namespace kvplan::models
