#pragma once
// Decode kernels for layers of one width of keys and one of values. Private to kernels.

#include "kernels/views.h"

namespace kvplan::kernels {

/// Kernel of kUniformWidths[kind] for segments of so many blocks of four columns, 1 or 2.
template <int Blocks>
void (*uniform_kernel(int kind))(AttentionView);

}  // namespace kvplan::kernels
