#pragma once
// What of a plan a projection does not keep. Private to exporters.

#include "exporters/projection.h"

namespace kvplan::exporters {

/// Fills projection.report.
void report_losses(const PlanBundle& bundle, const ProjectionOptions& options,
                   Projection& projection);

}  // namespace kvplan::exporters
