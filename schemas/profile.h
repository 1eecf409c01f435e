#pragma once
// The profile: additive statistics of a model's keys and values over a calibration set
// (docs/formats/profile.md).

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "schemas/types.h"

namespace kvplan {

/// Raw sums over the non-sink tokens of one side of one layer. Hk kv_heads, d head_dim, S coherent
/// windows (first 64 by index).
struct SideSums {
  Array<double> sum;       // [Hk,d]   sum of x (k: before rotary)
  Array<double> outer;     // [Hk,d,d] sum of x xT, uncentred (k: before rotary)
  Array<double> norm_sum;  // [Hk]     sum of |x|
  Array<double> fisher;    // [Hk,d,d] sum of h hT; k: R_t^T h hT R_t, the pre-rotary frame
  Array<float> absmax;     // [Hk,d]   max |x| after rotary, sinks included
  Array<float> cross;      // [S,Hk,d,d] sum_t h_t x_tT of each window, both after rotary
  Array<float> phase;  // [S,Hk,d,P] sum_t h_t phi_tT; k: P = rotary_dim+1, phi = (cos.., sin.., 1);
                       // v: P = 1, phi = (1)
  bool operator==(const SideSums&) const = default;
};

struct LayerProfile {
  int kv_heads = 0, head_dim = 0, rotary_dim = 0;
  SideSums k, v;
  Array<double> k_rotated_sum;    // [Hk,d] tensor layers.{l}.k.sum, after rotary
  Array<double> k_rotated_sumsq;  // [Hk,d] tensor layers.{l}.k.sumsq
  Array<double> norm_ratio_sum;   // [Hk]   sum of |k|/|v|
  std::vector<double> inv_freq;   // [rotary_dim/2], scaling applied
  double weight_mse =
      0;  // mean squared error of k_proj at 3 bits, tensor absmax (a property of the weights)

  SideSums& side(Side s) { return s == Side::kKey ? k : v; }
  const SideSums& side(Side s) const { return s == Side::kKey ? k : v; }
  bool operator==(const LayerProfile&) const = default;
};

/// One calibration window that went in. `index` is global over the calibration set, so that shards
/// can be told apart.
struct ProfileWindow {
  std::int64_t index = 0, tokens = 0, source = 0;  // tokens include the sinks
  bool operator==(const ProfileWindow&) const = default;
};

/// Derived figures of one layer for people, over all its KV heads; computed by quant::summarise.
struct LayerSummary {
  double key_norm = 0, value_norm = 0;        // E|k|, E|v|
  double norm_ratio = 0;                      // E|k| / E|v|
  double mean_share_k = 0, mean_share_v = 0;  // |mu|^2 / E|x|^2, k before rotary
  std::vector<int> outlier_channels_k,
      outlier_channels_v;  // head*head_dim + channel; RMS > 3 x layer median
  double sensitivity_k = 0,
         sensitivity_v = 0;  // 1/2 sum_heads tr(F C): nats per token at relative error 1
  double weight_mse = 0;
};

struct Profile {
  ModelSpec model;
  std::int64_t tokens = 0;         // non-sink tokens in pass A
  std::int64_t fisher_tokens = 0;  // non-sink tokens in pass B
  int window = 0;
  int sink_tokens = 0;
  int coherent_windows = 64;  // S at most
  std::uint64_t seed = 0;
  std::vector<ProfileSource> sources;
  std::string program;                 // kvplan version
  std::vector<ProfileWindow> windows;  // ascending index, all windows
  std::vector<LayerProfile> layers;
  std::vector<LayerSummary> summary;  // one per layer; may be empty until summarised
};

/// Writes profile.json and profile.safetensors into `folder` (made if absent), each under a
/// temporary name and renamed, profile.json last. Throws EnvironmentError when it cannot write.
void write_profile(const Profile& profile, const std::filesystem::path& folder);

/// Reads and checks a profile folder (shapes, finite values, companion SHA-256). Throws
/// InputError{file, field}.
Profile read_profile(const std::filesystem::path& folder);

/// profile.json without its `tensors` field: everything but the arrays and their SHA-256.
std::string profile_json(const Profile& profile);

/// SHA-256 of profile.json (which names the SHA-256 of profile.safetensors).
std::string profile_sha256(const std::filesystem::path& folder);

/// Sum of shards. Parts are taken in ascending order of their first window whatever order they come
/// in, so any argument order gives the same bytes; they are added pairwise, so that aligned
/// power-of-two shards give the bytes of one run. A window is known by its index and its source
/// (SHA-256, part, name). weights[i] scales the sums and counts of part i (empty: all 1), not
/// absmax nor the per-window rows. The summary is left empty (quant::summarise). Throws InputError
/// when two parts differ in model, window, sinks or seed or share a window; ArgumentError for no
/// parts or a weight that is not positive. `names` label the parts in errors.
Profile merge_profiles(std::span<const Profile> parts, std::span<const double> weights,
                       std::span<const std::string> names);

}  // namespace kvplan
