// Layers of one width of keys and one of values, segments of five to eight columns.

#include "kernels/decode_uniform.cuh"

namespace kvplan::kernels {

template DecodeKernel uniform_kernel<2>(int kind);

}  // namespace kvplan::kernels
