#pragma once
// Plans as serving stacks run them: what `validate --as`, `plan --for` and `size --stacks` share.

#include <cstdint>
#include <string>
#include <vector>

#include "schemas/plan.h"
#include "schemas/profile.h"

namespace kvplan::cli {

/// What `stack` would do with the export of a plan: its formats, transforms and skipped layers, no
/// sinks. Beside the names of exporters::parse_stack it takes llama.cpp's types of K and V
/// outright, "llamacpp:q8_0,q4_0" and "llamacpp:q8_0,q4_0,unrotated" (LLAMA_ATTN_ROT_DISABLE=1),
/// then for all layers whatever the plan says. Errors as exporters::project, and InputError naming
/// a format that kvplan has no codec for.
PlanBundle plan_on_stack(const PlanBundle& bundle, const std::string& stack);

struct StackPlanOptions {
  std::string stack;  // as exporters::parse_stack
  BudgetSpec budget;
  std::int64_t context = 4096, batch = 1;
  std::uint64_t seed = 0;
  int threads = 0;
  std::string profile_sha256, program;
};

/// The plan of least predicted KL among all that `stack` can be told, within the budget: costs are
/// simulated from the profile with the stack's own codecs. InfeasibleError in the budget's unit.
PlanBundle plan_for_stack(const Profile& profile, const StackPlanOptions& options);

/// The cache of one model in one format of one stack.
struct StackSize {
  std::string stack, format;
  std::int64_t bytes_per_token = 0;
};

/// Every stack that can hold the model, with each choice that it offers for all layers alike.
/// Layers that a stack keeps at 16 bits are counted so.
std::vector<StackSize> stack_sizes(const ModelSpec& model);

}  // namespace kvplan::cli
