#pragma once
// Which LibTorch runs, and what it can use on this machine.

#include <string>

namespace kvplan::forward {

struct TorchBuild {
  std::string version;  // "2.13.0"
  bool cuda = false;    // with CUDA, and a GPU with a driver is there
  int gpus = 0;         // that LibTorch sees
};
TorchBuild torch_build();

}  // namespace kvplan::forward
