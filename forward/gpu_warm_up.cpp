#include "forward/gpu_warm_up.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <exception>

namespace kvplan::forward {

GpuWarmUp::GpuWarmUp(const std::vector<Device>& devices) {
  if (std::all_of(devices.begin(), devices.end(), [](Device d) { return d.is_cpu(); })) return;
  thread_ = std::jthread([devices] {
    try {
      const at::NoGradGuard no_grad;
      for (const Device device : devices) {
        if (device.is_cpu() || !at::hasCUDA()) continue;
        const at::Tensor x =
            at::zeros({16, 16}, at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device.gpu)));
        at::matmul(x, x).to(at::kCPU);
      }
    } catch (const std::exception&) {
      return;
    }
  });
}

}  // namespace kvplan::forward
