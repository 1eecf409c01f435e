#pragma once
// Sends the batch of a step to the device. Private to kernels.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/sequences.h"

namespace kvplan::kernels {

struct StepTransfer {
  // Pinned host memory, read by the kernel.
  const StepEntry* entries = nullptr;    // [sequences]
  const std::int32_t* blocks = nullptr;  // of the pages that fill, StepEntry::first_block on
  int sequences = 0;
  // Device memory, written.
  std::int32_t* slot = nullptr;  // [sequences] each
  std::int32_t* length_before = nullptr;
  std::int32_t* length = nullptr;
  std::int32_t* first_row = nullptr;
  std::int32_t* page_table = nullptr;  // [max_sequences][table_stride]
  std::int64_t table_stride = 0;
};

cudaError_t send_step(const StepTransfer& transfer, cudaStream_t stream);

}  // namespace kvplan::kernels
