#pragma once
// How much each layer suffers from quantisation: five estimators, from the weights alone to the
// model's own loss. One value per layer, keys and values together; only their order compares across
// estimators.

#include <cstdint>
#include <vector>

#include "calib/capture.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "studies/captures.h"
#include "studies/model_lab.h"

namespace kvplan::studies {

/// Published heuristic: mean squared error of the key projection at 3 bits with one absmax per
/// tensor. Reads weights only. InputError for a profile without a summary.
std::vector<double> weight_mse_sensitivity(const Profile& profile);

/// E|k - k_hat|^2 + E|v - v_hat|^2 per token. `stored` as stored_layers makes it.
std::vector<double> activation_mse_sensitivity(const std::vector<calib::LayerCapture>& capture,
                                               const std::vector<StoredLayer>& stored);

/// E|o - o_hat|^2 / E|o|^2 of the attention output, before its projection; positions from
/// `first_query` on in steps of `query_step`.
std::vector<double> output_error_sensitivity(const std::vector<calib::LayerCapture>& capture,
                                             const std::vector<StoredLayer>& stored,
                                             std::int64_t first_query, std::int64_t query_step);

/// 1/2 tr(F C) times the relative error of the code: nats per token by the second order of the
/// loss. InputError as above.
std::vector<double> fisher_sensitivity(const Profile& profile, double distortion);

/// KL in nats per token when one layer alone is stored by the plan: measured, one evaluation per
/// layer.
std::vector<double> kl_sensitivity(ModelLab& lab, const PlanBundle& bundle, const Measure& measure);

}  // namespace kvplan::studies
