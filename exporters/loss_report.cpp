#include "exporters/loss_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace kvplan::exporters {
namespace {

std::string decimal(double value, const char* format) {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

nlohmann::json number_or_null(const std::optional<double>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json(nullptr);
}

std::string predicted(const std::optional<double>& kl) {
  return kl ? decimal(*kl, "%.3g") : "unknown";
}

}  // namespace

const char* loss_class_name(LossClass loss) {
  switch (loss) {
    case LossClass::kLost:
      return "lost";
    case LossClass::kRaised:
      return "raised";
    case LossClass::kLowered:
      return "lowered";
    case LossClass::kForced:
      return "forced";
    case LossClass::kNote:
      break;
  }
  return "note";
}

bool LossReport::lossless() const { return std::ranges::none_of(items, &LossItem::counted); }

void LossReport::note(std::string code, std::string exported, std::vector<int> layers) {
  items.push_back({.code = std::move(code),
                   .loss = LossClass::kNote,
                   .layers = std::move(layers),
                   .exported = std::move(exported)});
}

std::string layer_ranges(const std::vector<int>& layers) {
  if (layers.empty()) return "all";
  std::string text;
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t end = i + 1;
    while (end < layers.size() && layers[end] == layers[end - 1] + 1) ++end;
    if (!text.empty()) text += ',';
    text += std::to_string(layers[i]);
    if (end > i + 1) text += '-' + std::to_string(layers[end - 1]);
    i = end;
  }
  return text;
}

std::string loss_report_json(const LossReport& report) {
  nlohmann::ordered_json items = nlohmann::ordered_json::array();
  for (const LossItem& item : report.items)
    items.push_back({{"code", item.code},
                     {"class", loss_class_name(item.loss)},
                     {"layers", layer_ranges(item.layers)},
                     {"plan", item.plan},
                     {"export", item.exported}});
  nlohmann::ordered_json out = {{"target", report.target}};
  if (!report.dialect.empty()) out["dialect"] = report.dialect;
  out["target_version"] = report.target_version;
  out["plan_bits"] = report.plan_bits;
  out["export_bits"] = report.export_bits;
  out["plan_predicted_kl"] = number_or_null(report.plan_predicted_kl);
  out["export_predicted_kl"] = number_or_null(report.export_predicted_kl);
  out["bytes_per_token"] = report.bytes_per_token;
  out["items"] = items;
  return out.dump(1) + "\n";
}

std::string loss_report_text(const LossReport& report) {
  std::string text = "target    " + report.target;
  if (!report.dialect.empty()) text += " (" + report.dialect + ")";
  text += " " + report.target_version + "\n";
  text += "size      " + decimal(report.plan_bits, "%.4g") + " effective bits planned, " +
          decimal(report.export_bits, "%.4g") + " exported, " +
          std::to_string(report.bytes_per_token) + " bytes per token\n";
  text += "quality   predicted KL " + predicted(report.plan_predicted_kl) + " planned, " +
          predicted(report.export_predicted_kl) + " exported (estimate), nats per token\n";
  if (report.items.empty()) return text + "losses    none\n";

  std::vector<std::vector<std::string>> rows = {{"code", "class", "layers", "plan", "export"}};
  for (const LossItem& item : report.items)
    rows.push_back({item.code, loss_class_name(item.loss), layer_ranges(item.layers), item.plan,
                    item.exported});
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  text += '\n';
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c) {
      line += row[c];
      if (c + 1 < row.size()) line.append(widths[c] - row[c].size() + 2, ' ');
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

}  // namespace kvplan::exporters
