#include "studies/sensitivity.h"

#include <cstddef>
#include <string>
#include <utility>

#include "schemas/error.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

const std::vector<LayerSummary>& summary(const Profile& profile) {
  if (profile.summary.empty() || profile.summary.size() != profile.layers.size())
    throw InputError("profile", "/layers",
                     "has " + std::to_string(profile.summary.size()) + " layer summaries for " +
                         std::to_string(profile.layers.size()) +
                         " layers; expected one each (quant::summarise makes them)");
  return profile.summary;
}

void require_same_layers(const std::vector<calib::LayerCapture>& capture,
                         const std::vector<StoredLayer>& stored) {
  if (capture.size() != stored.size())
    throw ArgumentError("sensitivity of " + std::to_string(capture.size()) +
                        " captured layers needs as many stored ones, found " +
                        std::to_string(stored.size()));
}

}  // namespace

std::vector<double> weight_mse_sensitivity(const Profile& profile) {
  std::vector<double> values;
  for (const LayerSummary& layer : summary(profile)) values.push_back(layer.weight_mse);
  return values;
}

std::vector<double> activation_mse_sensitivity(const std::vector<calib::LayerCapture>& capture,
                                               const std::vector<StoredLayer>& stored) {
  require_same_layers(capture, stored);
  std::vector<double> values;
  for (std::size_t l = 0; l < capture.size(); ++l) {
    const double error = squared_distance(capture[l].k.data, stored[l].k.data) +
                         squared_distance(capture[l].v.data, stored[l].v.data);
    values.push_back(error / static_cast<double>(capture[l].k.shape[1]));
  }
  return values;
}

std::vector<double> output_error_sensitivity(const std::vector<calib::LayerCapture>& capture,
                                             const std::vector<StoredLayer>& stored,
                                             std::int64_t first_query, std::int64_t query_step) {
  require_same_layers(capture, stored);
  std::vector<double> values;
  for (std::size_t l = 0; l < capture.size(); ++l)
    values.push_back(attention_errors(capture[l], stored[l], first_query, query_step).output_error);
  return values;
}

std::vector<double> fisher_sensitivity(const Profile& profile, double distortion) {
  std::vector<double> values;
  for (const LayerSummary& layer : summary(profile))
    values.push_back((layer.sensitivity_k + layer.sensitivity_v) * distortion);
  return values;
}

std::vector<double> kl_sensitivity(ModelLab& lab, const PlanBundle& bundle,
                                   const Measure& measure) {
  ModelLab::NamedBundles alone;
  for (const LayerPlan& layer : bundle.plan.layers)
    alone.emplace_back(
        "layer " + std::to_string(layer.index) + " alone",
        ModelLab::only(bundle, [kept = layer.index](int index, Side) { return index == kept; }));
  lab.prepare(alone, measure);
  std::vector<double> values;
  for (const auto& [name, plan] : alone) values.push_back(lab.scores(name, plan, measure).kl.mean);
  return values;
}

}  // namespace kvplan::studies
