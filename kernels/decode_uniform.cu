// Layers of one width of keys and one of values, segments of up to four columns.

#include "kernels/decode_uniform.cuh"

namespace kvplan::kernels {

template DecodeKernel uniform_kernel<1>(int kind);

}  // namespace kvplan::kernels
