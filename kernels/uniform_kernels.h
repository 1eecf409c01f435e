#pragma once
// Decode kernels for layers of one width of keys and one of values. Private to kernels.

#include "kernels/views.h"

namespace kvplan::kernels {

/// Kernel of kUniformWidths[kind].
void (*uniform_kernel(int kind))(AttentionView);

}  // namespace kvplan::kernels
