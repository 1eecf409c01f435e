#pragma once
// E1, E2 and E4: norms and outlier channels of a model's keys and values, and bits by their ratio.

#include <vector>

#include "studies/study.h"

namespace kvplan::studies {

std::vector<Study> model_norm_studies();

}  // namespace kvplan::studies
