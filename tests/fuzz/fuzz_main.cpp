// Entry points of libFuzzer. KVPLAN_FUZZ_TARGET is one of the functions of targets.h.

#include <cstddef>
#include <cstdint>

#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvplan::fuzz::KVPLAN_FUZZ_TARGET({reinterpret_cast<const char*>(data), size});
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned int seed) {
  return kvplan::fuzz::mutate({reinterpret_cast<char*>(data), max_size}, size, seed);
}
