#include "cli/report/report.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "cli/report/assets.h"

namespace kvplan::cli {
namespace {

void replace(std::string& html, std::string_view mark, std::string_view text) { html.replace(html.find(mark), mark.size(), text); }

nlohmann::json parse_or_null(const std::string& text) { return text.empty() ? nlohmann::json() : nlohmann::json::parse(text); }

}  // namespace

std::string report_html(const std::string& profile_json, const std::vector<ReportPlan>& plans) {
  nlohmann::json data = {{"profile", parse_or_null(profile_json)}, {"plans", nlohmann::json::array()}};
  for (const auto& p : plans) {
    data["plans"].push_back(
        {{"name", p.name}, {"plan", parse_or_null(p.plan_json)}, {"validation", parse_or_null(p.validation_json)}});
  }
  std::string json = data.dump();
  // "</script>" inside a file name must not end the script element.
  for (std::size_t at = 0; (at = json.find("</", at)) != std::string::npos; at += 3) json.replace(at, 2, "<\\/");
  std::string html(assets::kHtml);
  replace(html, "/*@style@*/", assets::kCss);
  replace(html, "/*@chart_library@*/", assets::kChartLibrary);
  replace(html, "/*@data@*/", json);
  replace(html, "/*@script@*/", assets::kScript);
  return html;
}

}  // namespace kvplan::cli
