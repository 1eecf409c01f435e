#pragma once
// The decode kernels of kUniformWidths for so many blocks of four columns; instantiated by
// decode_uniform.cu and decode_uniform_wide.cu, which take their time to compile.

#include <array>
#include <utility>

#include "kernels/decode_kernel.cuh"
#include "kernels/uniform_attention.cuh"
#include "kernels/uniform_kernels.h"

namespace kvplan::kernels {

template <int Blocks, std::size_t... Kind>
constexpr std::array<DecodeKernel, sizeof...(Kind)> uniform_kernels(std::index_sequence<Kind...>) {
  return {decode_kernel<UniformPath<kUniformWidths[Kind].keys, kUniformWidths[Kind].values,
                                    kUniformWidths[Kind].tiles, Blocks>>...};
}

template <int Blocks>
DecodeKernel uniform_kernel(int kind) {
  static constexpr auto kernels =
      uniform_kernels<Blocks>(std::make_index_sequence<kUniformKinds>{});
  return kernels[static_cast<std::size_t>(kind)];
}

}  // namespace kvplan::kernels
