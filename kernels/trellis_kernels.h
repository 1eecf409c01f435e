#pragma once
// Decode kernels for layers with trellis codes. Private to kernels.

#include "kernels/views.h"

namespace kvplan::kernels {

/// Kernel for kTrellis or kAny and segments of so many blocks of four columns, 1 or 2.
void (*trellis_kernel(LayerCodes codes, int blocks))(AttentionView);

}  // namespace kvplan::kernels
