#pragma once
// Where a forward pass runs, and how it holds the weights.

namespace kvplan::forward {

/// How the matrices of the layers are held in memory. The half types halve the memory and round
/// weights that need more bits (a bf16 checkpoint does not). On the CPU arithmetic is float32 in
/// any case, at the price of a conversion at each use; a GPU multiplies half matrices in their
/// type, sums in float32, and does all else in float32.
enum class WeightType { kFloat32, kBFloat16, kFloat16 };

/// "fp32", "bf16" or "fp16", as on the command line.
constexpr const char* weight_type_name(WeightType type) {
  return type == WeightType::kFloat32 ? "fp32" : type == WeightType::kBFloat16 ? "bf16" : "fp16";
}

/// Where the forward pass runs.
struct Device {
  int gpu = -1;  // CUDA ordinal; -1: the CPU
  bool is_cpu() const { return gpu < 0; }
  friend bool operator==(const Device&, const Device&) = default;
  static const Device kCpu, kCuda;  // kCuda: the first GPU
};
inline constexpr Device Device::kCpu{-1};
inline constexpr Device Device::kCuda{0};

}  // namespace kvplan::forward
