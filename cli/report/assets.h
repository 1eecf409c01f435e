#pragma once
// Files embedded at build time (cmake/EmbedFiles.cmake).

#include <string_view>

namespace kvplan::cli::assets {

extern const std::string_view kHtml, kCss, kCharts, kControls, kExplore, kScript, kChartLibrary,
    kStudyHtml, kStudyScript;

}  // namespace kvplan::cli::assets
