#pragma once
// The report and the page of studies: each one HTML file without network access, data and chart library inlined.

#include <string>
#include <vector>

#include "cli/report/front_maps.h"

namespace kvplan::cli {

/// JSON documents to show; an empty validation_json is left out.
struct ReportPlan {
  std::string name;
  std::string plan_json;
  std::string validation_json;
  std::vector<FrontMap> front;  // empty: the front has no maps
};

/// An empty profile_json is left out.
std::string report_html(const std::string& profile_json, const std::vector<ReportPlan>& plans);

/// The page of a study.json document.
std::string study_html(const std::string& study_json);

}  // namespace kvplan::cli
