#include "kernels/ptx.cuh"
#include "kernels/step.h"

namespace kvplan::kernels {
namespace {

constexpr int kThreads = 128;

// A block sends one sequence.
__global__ void __launch_bounds__(kThreads) send_step_kernel(StepTransfer transfer) {
  const int i = block();
  const StepEntry entry = transfer.entries[i];
  if (thread() == 0) {
    transfer.slot[i] = entry.slot;
    transfer.length_before[i] = entry.length_before;
    transfer.length[i] = entry.length;
    transfer.first_row[i] = entry.first_row;
  }
  std::int32_t* const pages =
      transfer.page_table + entry.slot * transfer.table_stride + entry.first_page;
  const std::int32_t* const blocks = transfer.blocks + entry.first_block;
  for (int page = thread(); page < entry.new_pages; page += threads()) pages[page] = blocks[page];
}

}  // namespace

cudaError_t send_step(const StepTransfer& transfer, cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = transfer.sequences;
  shape.threads = kThreads;
  shape.stream = stream;
  return launch(send_step_kernel, shape, transfer);
}

}  // namespace kvplan::kernels
