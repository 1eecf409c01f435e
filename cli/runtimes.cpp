#include "cli/runtimes.h"

#include "schemas/error.h"
#ifdef KVPLAN_CUDA
#include "kernels/cuda_cache.h"
#endif

namespace kvplan::cli {

forward::CacheRuntime cuda_runtime() {
#ifdef KVPLAN_CUDA
  return {"cuda", [](const PlanBundle& bundle, const quant::CacheGeometry& geometry) {
            return kernels::make_cuda_cache(bundle, geometry);
          }};
#else
  throw EnvironmentError("cuda",
                         "this kvplan was built without CUDA; build it with -DKVPLAN_CUDA=ON, or "
                         "take --runtime cpu");
#endif
}

}  // namespace kvplan::cli
