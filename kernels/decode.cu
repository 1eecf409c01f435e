// Decode attention straight from packed pages.
//
// A persistent grid, one block per multiprocessor. A block takes its stretch of the work in rounds
// (round.cuh): it brings the queries of a round into the transformed domain (queries.cuh), its
// warps attend, and their results are put together (results.cuh); the last block to arrive at a
// segment finishes it. A warp works alone: the copy engine brings halves of pages to its shared
// memory (page_feed.cuh), it turns codes into bytes in registers (tile_bytes.cuh) and multiplies
// them in integer matrix units: queries and weights are numbers of 16 bits, as high and low bytes
// in two columns of the matrix, so that four columns of a segment fill an mma. Scores, masses and
// norms are float.
//
// Tiles whose levels are no bytes (tile_codes.cuh: tables off the grid, fp16, outliers) and trellis
// codes (trellis_codes.cuh) go through fp16 mma in kernels of their own. Measurements and what was
// tried: docs/performance.md.

#include <vector>

#include "kernels/decode_kernel.cuh"
#include "kernels/mixed_attention.cuh"
#include "kernels/packed_attention.cuh"
#include "kernels/trellis_kernels.h"
#include "kernels/uniform_kernels.h"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

// Of layers that are neither uniform nor mixed and have no trellis: [kOther][five to eight
// columns].
constexpr DecodeKernel of_runs[2][2] = {{decode_kernel<RunsPath<1, LayerCodes::kBytes>>,
                                         decode_kernel<RunsPath<2, LayerCodes::kBytes>>},
                                        {decode_kernel<RunsPath<1, LayerCodes::kOther>>,
                                         decode_kernel<RunsPath<2, LayerCodes::kOther>>}};

DecodeKernel kernel_of(const LayerView& layer, int columns) {
  const int blocks = columns > kColumns / 2 ? 2 : 1;
  if (layer.uniform >= 0)
    return blocks == 2 ? uniform_kernel<2>(layer.uniform) : uniform_kernel<1>(layer.uniform);
  if (layer.mixed) return decode_kernel<MixedPath>;
  if (has_trellis(layer.codes)) return trellis_kernel(layer.codes, blocks);
  return of_runs[layer.codes == LayerCodes::kOther ? 1 : 0][blocks - 1];
}

}  // namespace

cudaError_t configure_decode(std::size_t shared_bytes) {
  std::vector<DecodeKernel> kernels = {decode_kernel<MixedPath>};
  for (const int blocks : {1, 2}) {
    for (const auto& of_codes : of_runs) kernels.push_back(of_codes[blocks - 1]);
    for (const LayerCodes codes : {LayerCodes::kTrellis, LayerCodes::kAny})
      kernels.push_back(trellis_kernel(codes, blocks));
    for (int kind = 0; kind < kUniformKinds; ++kind)
      kernels.push_back(blocks == 2 ? uniform_kernel<2>(kind) : uniform_kernel<1>(kind));
  }
  for (const DecodeKernel kernel : kernels) {
    const cudaError_t e = allow_shared(kernel, shared_bytes);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t attend(const AttentionView& view, cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = view.decode_blocks;
  shape.threads = view.block_warps * kLanes;
  shape.shared_bytes = view.layer.shared_bytes;
  shape.stream = stream;
  shape.overlap = true;
  return launch(kernel_of(view.layer, columns_in_use(view)), shape, view);
}

}  // namespace kvplan::kernels
