// The decode kernels of kUniformWidths.

#include <array>
#include <utility>

#include "kernels/decode_kernel.cuh"
#include "kernels/uniform_attention.cuh"
#include "kernels/uniform_kernels.h"

namespace kvplan::kernels {
namespace {

template <std::size_t... Kind>
constexpr std::array<DecodeKernel, sizeof...(Kind)> kernels_of(std::index_sequence<Kind...>) {
  return {decode_kernel<UniformPath<kUniformWidths[Kind].keys, kUniformWidths[Kind].values,
                                    kUniformWidths[Kind].tiles>>...};
}

}  // namespace

DecodeKernel uniform_kernel(int kind) {
  static constexpr auto kernels = kernels_of(std::make_index_sequence<kUniformKinds>{});
  return kernels[static_cast<std::size_t>(kind)];
}

}  // namespace kvplan::kernels
