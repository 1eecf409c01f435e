#pragma once
// F5: errors of query heads that share one KV head.

#include "studies/study.h"

namespace kvplan::studies {

Study grouped_query_study();

}  // namespace kvplan::studies
