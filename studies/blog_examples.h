#pragma once
// B4-B7: the worked examples of a blog about naive and rotated rounding.

#include <vector>

#include "studies/study.h"

namespace kvplan::studies {

std::vector<Study> blog_examples();

}  // namespace kvplan::studies
