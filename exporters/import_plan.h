#pragma once
// What the importers share: an empty plan of another tool, and its sizes. Private to exporters.

#include <cstdint>
#include <string_view>
#include <vector>

#include "exporters/import.h"
#include "exporters/stack.h"

namespace kvplan::exporters {

/// Layers without sides, codec "fp16", everything that no file says at its neutral value.
PlanBundle empty_import(std::string_view format, std::string_view tool, std::string_view text,
                        const ImportOptions& options);

/// One format per KV head. Returns the bytes of a token; the side's codec is that of the first.
std::int64_t fill_side(const std::vector<Format>& heads, SidePlan& side, int head_dim);

void set_sizes(std::int64_t bytes_per_token, Plan& plan);

}  // namespace kvplan::exporters
