#pragma once
// How much of the model's time a study takes, for --dry-run.

#include <optional>
#include <string_view>

namespace kvplan::studies {

/// The caches that a study scores on all held-out windows, beside the fp16 one and a profile.
/// Nothing for studies whose work on the model is of another kind (captures, passkeys, parts of the
/// windows) and for those without a model.
std::optional<int> scored_caches(std::string_view study_id);

}  // namespace kvplan::studies
