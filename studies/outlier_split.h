#pragma once
// A17 and A18: the bits of the split into outlier channels and others, and what it is worth.

#include <vector>

#include "studies/study.h"

namespace kvplan::studies {

std::vector<Study> outlier_split_studies();

}  // namespace kvplan::studies
