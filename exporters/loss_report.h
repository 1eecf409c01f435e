#pragma once
// What an export keeps of a plan and what it loses: the items, their text and their JSON.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvplan::exporters {

/// kNote alone does not count for --strict.
enum class LossClass { kLost, kRaised, kLowered, kForced, kNote };
/// "lost", "raised", "lowered", "forced", "note".
const char* loss_class_name(LossClass loss);

struct LossItem {
  std::string code;  // BITS HEADS GROUPS OUTLIERS CENTRE ROTATION TRANSFORM CODEC SCALES SINKS
                     // WINDOW FORCED16 UNVERIFIED ESTIMATE
  LossClass loss = LossClass::kLost;
  std::vector<int> layers = {};          // ascending; empty: the whole export
  std::string plan = {}, exported = {};  // "K4V4", "K16V16"
  bool counted() const { return loss != LossClass::kNote; }
};

struct LossReport {
  std::string target, dialect, target_version;
  double plan_bits = 0, export_bits = 0;                         // effective: with scales
  std::optional<double> plan_predicted_kl, export_predicted_kl;  // nats per token
  std::int64_t bytes_per_token = 0;
  std::vector<LossItem> items;

  bool lossless() const;  // no counted item
  void note(std::string code, std::string exported, std::vector<int> layers = {});
};

/// "0-1,26-27"; "all" for none.
std::string layer_ranges(const std::vector<int>& layers);

/// loss-report.json.
std::string loss_report_json(const LossReport& report);
/// A table for people.
std::string loss_report_text(const LossReport& report);

}  // namespace kvplan::exporters
