#pragma once
// Models, profiles, plans and validations as text for people.

#include <string>

#include "models/model.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/validation.h"

namespace kvplan::cli {

std::string describe(const models::ModelReader& model);
std::string describe(const Profile& profile);
std::string describe(const PlanBundle& bundle);
std::string describe(const Validation& validation, bool markdown = false);
/// One line: which context a plan was validated for, beside the one it is planned for.
std::string validated_context(const Plan& plan, const Validation& validation);

}  // namespace kvplan::cli
