#include "forward/torch_build.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/headeronly/version.h>

namespace kvplan::forward {

TorchBuild torch_build() {
  TorchBuild build{TORCH_VERSION, at::hasCUDA(), 0};
  if (build.cuda) build.gpus = static_cast<int>(at::detail::getCUDAHooks().deviceCount());
  return build;
}

}  // namespace kvplan::forward
