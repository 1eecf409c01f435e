#pragma once
// Runtimes that hold a plan's cache in pages: what `generate` and `validate --runtime` run on.

#include <functional>
#include <memory>
#include <string>

#include "quant/kv_cache.h"
#include "schemas/plan.h"

namespace kvplan::forward {

struct CacheRuntime {
  std::string name;  // "cpu", "reference", "cuda"
  /// Fails as quant::make_reference_cache does, or with EnvironmentError where a device is missing.
  std::function<std::unique_ptr<quant::KvCache>(const PlanBundle&, const quant::CacheGeometry&)>
      make_cache;
};

/// Pages on the CPU (quant::make_reference_cache).
CacheRuntime reference_runtime(std::string name);

}  // namespace kvplan::forward
