#pragma once
// The trained tables of the trellis code. tables.cpp is written by train_trellis.cpp.

#include <array>

#include "quant/trellis.h"

namespace kvplan::quant {

/// Of widths 1..4, in this order.
extern const std::array<TrellisTable, kMaxTrellisWidth> kTrellisTables;

}  // namespace kvplan::quant
