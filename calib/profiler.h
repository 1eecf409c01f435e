#pragma once
// Profiling: one pass over calibration windows that gathers moments and Fisher matrices, with
// checkpoints.

#include <filesystem>
#include <string>
#include <vector>

#include "forward/device.h"
#include "forward/peers.h"
#include "models/model.h"
#include "schemas/profile.h"
#include "schemas/run_control.h"
#include "tokenizers/text.h"

namespace kvplan::calib {

struct ProfileOptions {
  int window = 1024;
  int sink_tokens = 4;
  int coherent_windows = 64;
  int batch = 1;           // windows at once
  std::uint64_t seed = 0;  // of the sampled labels
  int threads = 0;         // 0: all cores
  forward::WeightType weights = forward::WeightType::kFloat32;
  std::vector<forward::Device> devices = {forward::Device::kCpu};  // several share the windows
  std::int64_t memory_bytes = 0;    // of the process, or of each GPU; 0: no limit
  forward::Peers* peers = nullptr;  // the other processes of this run; null: none
  int checkpoint_seconds = 30;
  std::string program;  // kvplan version, written into the profile
};

/// Profiles `windows` and writes the finished profile into `folder`; partial state lives in
/// folder/checkpoint and a run with the same inputs and options continues from it (same bytes as an
/// uninterrupted run). `sources` describes the texts. With a limit of memory, weights that do not
/// fit are read from the file again and again, each time for as many windows as fit: same bytes.
/// With peers each process takes part of the windows, and rank 0 alone writes and returns the
/// profile: the bytes of one process with the same batch and threads, as with several devices.
/// InterruptedError after saving when control.stopping(); EnvironmentError: folder locked by
/// another run or not writable, a peer lost (state saved); MemoryError: names the smallest limit
/// that works; InputError: checkpoint of other inputs (says which option differs), NaN or Inf in
/// activations (layer, side, position).
Profile run_profile(const models::ModelReader& model,
                    const std::vector<tokenizers::TextWindow>& windows,
                    const std::vector<ProfileSource>& sources, const ProfileOptions& options,
                    const std::filesystem::path& folder, const RunControl& control);

}  // namespace kvplan::calib
