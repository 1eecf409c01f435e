#pragma once
// Some layers of a model as a model of its own: what the work on them costs is measured for
// --dry-run. Internal to estimates; torch-free.

#include <vector>

#include "models/model.h"
#include "schemas/plan.h"

namespace kvplan::estimates {

/// The model with the given layers alone, in their order, and with the first `vocabulary` tokens,
/// or all (0). Borrows `whole`.
class ModelSlice : public models::ModelReader {
 public:
  ModelSlice(const models::ModelReader& whole, std::vector<int> layers, int vocabulary = 0);
  const models::ModelConfig& config() const override { return config_; }
  bool has(std::string_view name) const override { return whole_.has(stored_name(name)); }
  std::vector<std::int64_t> shape(std::string_view name) const override;
  void read(std::string_view name, std::span<float> out) const override;
  const ModelSpec& spec() const override { return spec_; }
  std::filesystem::path path() const override { return whole_.path(); }
  const std::vector<int>& layers() const { return layers_; }

 private:
  std::string stored_name(std::string_view name) const;
  const models::ModelReader& whole_;
  std::vector<int> layers_;
  models::ModelConfig config_;
  ModelSpec spec_;
};

/// A plan for these layers alone.
PlanBundle slice_plan(const PlanBundle& whole, const std::vector<int>& layers);

}  // namespace kvplan::estimates
