// Layers with trellis codes.

#include "kernels/decode_kernel.cuh"
#include "kernels/packed_attention.cuh"
#include "kernels/trellis_kernels.h"

namespace kvplan::kernels {

DecodeKernel trellis_kernel(LayerCodes codes, int blocks) {
  if (codes == LayerCodes::kTrellis)
    return blocks == 1 ? decode_kernel<RunsPath<1, LayerCodes::kTrellis>>
                       : decode_kernel<RunsPath<2, LayerCodes::kTrellis>>;
  return blocks == 1 ? decode_kernel<RunsPath<1, LayerCodes::kAny>>
                     : decode_kernel<RunsPath<2, LayerCodes::kAny>>;
}

}  // namespace kvplan::kernels
