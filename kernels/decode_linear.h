#pragma once
// De-quantises vectors of one width from the linear packed form (docs/formats/packing.md) on the
// GPU.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvplan::kernels {

/// Rows of fp16 norm (2 bytes) followed by head_dim codes of `bits` bits, lowest bit first, padded
/// to whole bytes.
struct LinearRows {
  const std::byte* codes = nullptr;  // device, [rows, 2 + ceil(head_dim * bits / 8)]
  std::int64_t rows = 0;             // tokens x kv_heads
  int head_dim = 0;
  int bits = 0;                   // 1..8
  const float* levels = nullptr;  // device, [2^bits]
};

/// y[row, i] = levels[code] * norm, [rows, head_dim] float on the device: what
/// quant::Codec::decode_transformed gives, bit for bit. Neither synchronises nor allocates.
/// cudaErrorInvalidValue for a null pointer, bits outside 1..8 or a size below 1.
cudaError_t decode_linear(const LinearRows& in, float* y, cudaStream_t stream);

}  // namespace kvplan::kernels
