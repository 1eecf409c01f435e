#pragma once
// What a common offset of the keys does to rotated codes, and what the norm of a vector does not:
// F2 and the part of E4 that needs no model.

#include "studies/study.h"

namespace kvplan::studies {

/// F2.
Study offset_study();

/// Adds the checks of E4 that need no model: its table against its rule, values of other norm, keys
/// with a common offset.
void run_norm_scaling(const StudyContext& context, StudyResult& result);

}  // namespace kvplan::studies
