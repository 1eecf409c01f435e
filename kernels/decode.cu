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
// Tiles whose levels are no bytes (tile_codes.cuh: tables off the grid, fp16, outliers) go through
// fp16 mma in kernels of their own. Measurements and what was tried: docs/performance.md.

#include "kernels/decode_kernel.cuh"
#include "kernels/mixed_attention.cuh"
#include "kernels/packed_attention.cuh"
#include "kernels/uniform_kernels.h"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

// Of layers that are neither uniform nor mixed: [not only bytes][five to eight columns].
constexpr DecodeKernel of_runs[2][2] = {
    {decode_kernel<RunsPath<1, true>>, decode_kernel<RunsPath<2, true>>},
    {decode_kernel<RunsPath<1, false>>, decode_kernel<RunsPath<2, false>>}};
constexpr DecodeKernel kernels[] = {of_runs[0][0], of_runs[0][1], of_runs[1][0], of_runs[1][1],
                                    decode_kernel<MixedPath>};

DecodeKernel kernel_of(const LayerView& layer, int columns) {
  const bool wide = columns > kColumns / 2;
  if (layer.uniform >= 0)
    return wide ? uniform_kernel<2>(layer.uniform) : uniform_kernel<1>(layer.uniform);
  if (layer.mixed) return decode_kernel<MixedPath>;
  return of_runs[layer.only_bytes ? 0 : 1][wide ? 1 : 0];
}

}  // namespace

cudaError_t configure_decode(std::size_t shared_bytes) {
  for (const DecodeKernel kernel : kernels) {
    const cudaError_t e = allow_shared(kernel, shared_bytes);
    if (e != cudaSuccess) return e;
  }
  for (int i = 0; i < kUniformKinds; ++i)
    for (const DecodeKernel kernel : {uniform_kernel<1>(i), uniform_kernel<2>(i)}) {
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
