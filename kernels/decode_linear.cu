#include <cuda_fp16.h>

#include "kernels/decode_linear.h"

namespace kvplan::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kNormBytes = 2;

/// One thread per coordinate. Reads bits/8 + 2/head_dim bytes and writes 4 per element; codes never
/// straddle more than two bytes as bits <= 8. At most 1 KB of shared memory holds the levels.
template <int Bits>
__global__ void decode_linear_kernel(LinearRows in, std::int64_t row_bytes, float* __restrict__ y) {
  __shared__ float levels[1 << Bits];
  for (int i = threadIdx.x; i < (1 << Bits); i += kThreads) levels[i] = in.levels[i];
  __syncthreads();
  const std::int64_t total = in.rows * in.head_dim;
  for (std::int64_t e = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; e < total;
       e += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t row = e / in.head_dim;
    const int bit = static_cast<int>(e - row * in.head_dim) * Bits;
    const auto* p = reinterpret_cast<const unsigned char*>(in.codes) + row * row_bytes;
    const __half norm = __ushort_as_half(static_cast<unsigned short>(p[0] | p[1] << 8));
    const auto* c = p + kNormBytes + bit / 8;
    unsigned window = c[0];
    if (bit % 8 + Bits > 8) window |= unsigned{c[1]} << 8;
    y[e] = levels[(window >> (bit % 8)) & ((1u << Bits) - 1)] * __half2float(norm);
  }
}

template <int Bits>
void launch(const LinearRows& in, float* y, cudaStream_t stream) {
  const std::int64_t row_bytes = kNormBytes + (std::int64_t{in.head_dim} * Bits + 7) / 8;
  const std::int64_t blocks = (in.rows * in.head_dim + kThreads - 1) / kThreads;
  constexpr std::int64_t kMaxBlocks = 1 << 16;
  decode_linear_kernel<Bits>
      <<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(
          in, row_bytes, y);
}

}  // namespace

cudaError_t decode_linear(const LinearRows& in, float* y, cudaStream_t stream) {
  if (!in.codes || !in.levels || !y || in.rows < 1 || in.head_dim < 1) return cudaErrorInvalidValue;
  switch (in.bits) {
    case 1:
      launch<1>(in, y, stream);
      break;
    case 2:
      launch<2>(in, y, stream);
      break;
    case 3:
      launch<3>(in, y, stream);
      break;
    case 4:
      launch<4>(in, y, stream);
      break;
    case 5:
      launch<5>(in, y, stream);
      break;
    case 6:
      launch<6>(in, y, stream);
      break;
    case 7:
      launch<7>(in, y, stream);
      break;
    case 8:
      launch<8>(in, y, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace kvplan::kernels
