#include "cli/report/report.h"

#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "cli/report/assets.h"

namespace kvplan::cli {
namespace {

using nlohmann::json;

void fill(std::string& html, std::string_view mark, std::string_view text) {
  html.replace(html.find(mark), mark.size(), text);
}

json parse_or_null(const std::string& text) { return text.empty() ? json() : json::parse(text); }

/// JSON that is safe inside a script element: no "<" can end it or open a comment.
std::string script_literal(const json& data) {
  std::string literal;
  for (const char c : data.dump(-1, ' ', false, json::error_handler_t::replace)) {
    if (c == '<') {
      literal += "\\u003c";
    } else {
      literal += c;
    }
  }
  return literal;
}

std::string filled_page(std::string html, std::string_view script, const json& data) {
  fill(html, "/*@style@*/", assets::kCss);
  fill(html, "/*@script@*/", script);
  // Last: names in the data may look like a mark.
  fill(html, "/*@data@*/", script_literal(data));
  return html;
}

}  // namespace

std::string report_html(const std::string& profile_json, const std::vector<ReportPlan>& plans) {
  json data = {{"profile", parse_or_null(profile_json)}, {"plans", json::array()}};
  for (const auto& p : plans) {
    json plan = json::parse(p.plan_json);
    // As text: JavaScript's integers end at 2^53.
    for (json* holder : {&plan, &plan["rotation"]}) (*holder)["seed"] = (*holder)["seed"].dump();
    json maps = json::array();
    for (const auto& [point, widths] : p.front)
      maps.push_back({{"effective_bits", point.effective_bits},
                      {"predicted_kl", point.predicted_kl},
                      {"widths", widths}});
    data["plans"].push_back({{"name", p.name},
                             {"plan", std::move(plan)},
                             {"front_maps", std::move(maps)},
                             {"validation", parse_or_null(p.validation_json)}});
  }
  std::string html(assets::kHtml);
  fill(html, "/*@chart_library@*/", assets::kChartLibrary);
  fill(html, "/*@charts@*/", assets::kCharts);
  fill(html, "/*@controls@*/", assets::kControls);
  fill(html, "/*@explore@*/", assets::kExplore);
  return filled_page(std::move(html), assets::kScript, data);
}

std::string study_html(const std::string& study_json) {
  json data = json::parse(study_json);
  data["seed"] = data["seed"].dump();
  return filled_page(std::string(assets::kStudyHtml), assets::kStudyScript, data);
}

}  // namespace kvplan::cli
