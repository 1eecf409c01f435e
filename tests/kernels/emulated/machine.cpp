#include "tests/kernels/emulated/machine.h"

#include <setjmp.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/emulated/cuda_host.h"

namespace kvplan::kernels::emulated {
namespace {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 128 * 1024;

struct Barrier {
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Fiber {
  std::unique_ptr<std::byte[]> stack;
  ucontext_t start;
  jmp_buf state;
  void* sanitizer = nullptr;  // what AddressSanitizer keeps of it
  bool started = false, finished = false;
};

struct Warp {
  Barrier barrier;
  int alive = 0;
  alignas(64) std::byte slots[kLanes][kSlotBytes];
};

struct PendingCopy {
  std::uint32_t to;
  const std::byte* from;
  std::uint32_t bytes;
};

struct Machine {
  std::map<std::uint32_t, std::vector<PendingCopy>> copies;  // by barrier
  BlockShape shape;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block_barrier;
  int alive = 0;
  std::vector<std::byte> shared;
  std::size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  int current = 0;
  std::uint64_t events = 0;  // barriers passed and threads finished
  std::exception_ptr error;
  jmp_buf scheduler;
  const void* scheduler_stack = nullptr;  // as AddressSanitizer tells it
  std::size_t scheduler_stack_bytes = 0;
};

Machine machine;

#ifdef __SANITIZE_ADDRESS__
// AddressSanitizer must know which stack is in use; nothing else depends on these.
void leave_for(void** own, const void* stack, std::size_t bytes) {
  __sanitizer_start_switch_fiber(own, stack, bytes);
}
void arrive(void* own, const void** from, std::size_t* bytes) {
  __sanitizer_finish_switch_fiber(own, from, bytes);
}
#else
void leave_for(void**, const void*, std::size_t) {}
void arrive(void*, const void**, std::size_t*) {}
#endif

void leave_for_scheduler(void** own) {
  leave_for(own, machine.scheduler_stack, machine.scheduler_stack_bytes);
  _longjmp(machine.scheduler, 1);
}

void pass(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  ++machine.events;
}

// Back to the scheduler; returns when the fiber is scheduled again.
void yield() {
  Fiber& fiber = machine.fibers[static_cast<std::size_t>(machine.current)];
  if (_setjmp(fiber.state) == 0) leave_for_scheduler(&fiber.sanitizer);
  arrive(fiber.sanitizer, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
}

void wait(Barrier& barrier, const int& members) {
  if (++barrier.arrived == members) return pass(barrier);
  const std::uint64_t generation = barrier.generation;
  while (barrier.generation == generation) yield();
}

void fiber_main() {
  arrive(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  try {
    (*machine.body)();
  } catch (...) {
    if (!machine.error) machine.error = std::current_exception();
  }
  Fiber& fiber = machine.fibers[static_cast<std::size_t>(machine.current)];
  Warp& warp = machine.warps[static_cast<std::size_t>(machine.current / kLanes)];
  fiber.finished = true;
  ++machine.events;
  // Those who wait for threads that are gone go on.
  if (--warp.alive > 0 && warp.barrier.arrived == warp.alive) pass(warp.barrier);
  if (--machine.alive > 0 && machine.block_barrier.arrived == machine.alive)
    pass(machine.block_barrier);
  leave_for_scheduler(nullptr);  // for good
}

void resume(int index) {
  machine.current = index;
  Fiber& fiber = machine.fibers[static_cast<std::size_t>(index)];
  void* volatile own = nullptr;
  if (_setjmp(machine.scheduler) != 0) return arrive(own, nullptr, nullptr);
  leave_for(const_cast<void**>(&own), fiber.stack.get(), kStackBytes);
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void run_block(int threads) {
  const auto count = static_cast<std::size_t>(threads);
  if (machine.fibers.size() < count) machine.fibers.resize(count);
  machine.warps.assign((count + kLanes - 1) / kLanes, {});
  machine.block_barrier = {};
  machine.alive = threads;
  std::memset(machine.shared.data(), 0xff, machine.shared.size());
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<std::byte[]>(kStackBytes);
    fiber.started = fiber.finished = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    ++machine.warps[i / kLanes].alive;
  }
  while (machine.alive > 0 && !machine.error) {
    const std::uint64_t before = machine.events;
    for (int i = 0; i < threads; ++i)
      if (!machine.fibers[static_cast<std::size_t>(i)].finished) resume(i);
    if (machine.events == before) throw std::logic_error("threads of a block wait for ever");
  }
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
}

}  // namespace

int thread() { return machine.current; }
const BlockShape& block_shape() { return machine.shape; }
std::byte* shared_memory() {
  auto at = reinterpret_cast<std::uintptr_t>(machine.shared.data());
  return machine.shared.data() + (1024 - at % 1024) % 1024;
}
std::byte* shared_at(std::uint32_t address, std::size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > machine.shared_bytes)
    throw std::out_of_range("shared address " + std::to_string(address) + " of " +
                            std::to_string(machine.shared_bytes) + " bytes");
  return shared_memory() + (address - kSharedBase);
}
namespace {

// What a barrier in shared memory counts.
struct BatchCounts {
  std::uint32_t ended, finished;
};
BatchCounts counts_at(std::uint32_t barrier) {
  BatchCounts counts;
  std::memcpy(&counts, shared_at(barrier, sizeof counts), sizeof counts);
  return counts;
}
void set_counts(std::uint32_t barrier, BatchCounts counts) {
  std::memcpy(shared_at(barrier, sizeof counts), &counts, sizeof counts);
}

}  // namespace

void init_barrier(std::uint32_t barrier) {
  set_counts(barrier, {0, 0});
  machine.copies[barrier].clear();
}

void begin_copy(std::uint32_t to, const std::byte* from, std::uint32_t bytes,
                std::uint32_t barrier) {
  if (to % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    throw std::logic_error("a copy that is not aligned to 16 bytes");
  const BatchCounts counts = counts_at(barrier);
  if (counts.ended != counts.finished)
    throw std::logic_error("a copy began on a barrier whose batch nobody awaited");
  std::memset(shared_at(to, bytes), 0xff, bytes);
  machine.copies[barrier].push_back({to, from, bytes});
}

void end_batch(std::uint32_t barrier, std::uint32_t bytes) {
  BatchCounts counts = counts_at(barrier);
  if (counts.ended != counts.finished)
    throw std::logic_error("a batch ended on a barrier whose batch nobody awaited");
  std::uint32_t sum = 0;
  for (const PendingCopy& copy : machine.copies[barrier]) sum += copy.bytes;
  if (sum != bytes) throw std::logic_error("a batch of other size than its copies");
  ++counts.ended;
  set_counts(barrier, counts);
}

void finish_copy(std::uint32_t barrier, std::uint32_t parity) {
  BatchCounts counts = counts_at(barrier);
  if (counts.finished % 2 != parity) return;
  if (counts.ended == counts.finished)
    throw std::logic_error("a wait for copies that nobody began");
  for (const auto& [to, from, bytes] : machine.copies[barrier])
    std::memcpy(shared_at(to, bytes), from, bytes);
  machine.copies[barrier].clear();
  ++counts.finished;
  set_counts(barrier, counts);
}
std::byte* slot(int lane) {
  return machine.warps[static_cast<std::size_t>(machine.current / kLanes)].slots[lane];
}
void sync_warp() {
  Warp& warp = machine.warps[static_cast<std::size_t>(machine.current / kLanes)];
  wait(warp.barrier, warp.alive);
}
void sync_block() { wait(machine.block_barrier, machine.alive); }

cudaError_t run_grid(int blocks, int blocks_y, int blocks_z, int threads, std::size_t shared_bytes,
                     const std::function<void()>& body) {
  if (shared_bytes > kMaxSharedBytes || threads < 1 || threads > 1024 || blocks < 1)
    return cudaErrorInvalidValue;
  machine.shared.assign(shared_bytes + 2048, {});
  machine.shared_bytes = shared_bytes;
  machine.body = &body;
  for (int z = 0; z < blocks_z; ++z)
    for (int y = 0; y < blocks_y; ++y)
      for (int x = 0; x < blocks; ++x) {
        const bool backwards = host().last_block_first;
        machine.shape = {backwards ? blocks - 1 - x : x, y, z, blocks, threads};
        run_block(threads);
      }
  return cudaSuccess;
}

}  // namespace kvplan::kernels::emulated
