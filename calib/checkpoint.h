#pragma once
// State of an unfinished profile on disk, in `checkpoint`:
// - state.json: key of the run, windows done; written last, so that it only names whole files
// - sums-{done}.safetensors: nodes of the WindowTree, node.{i}.sums F64, node.{i}.absmax F32, index
//   I64
// - coherent-{index}.safetensors: cross and phase of one window, written once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "calib/window_statistics.h"

namespace kvplan::calib {

/// What a run is determined by: name of an option or input -> its value as text.
using RunKey = std::map<std::string, std::string>;

class ProfileCheckpoint {
 public:
  ProfileCheckpoint(std::filesystem::path folder, RunKey key)
      : folder_(std::move(folder)), key_(std::move(key)) {}

  /// Restores `tree` and the finished coherent rows of `profile` (sized by the caller); `zero` has
  /// the shapes of a window's sums. Returns the number of windows done, 0 without a checkpoint.
  /// InputError: state of another run (names the first option that differs) or damaged files.
  std::size_t load(const WindowSums& zero, WindowTree& tree, Profile& profile);
  /// Saves the first `done` windows. At every moment the folder holds the old state or the new one.
  void save(std::size_t done, const WindowTree& tree, const Profile& profile);
  void remove() const;

 private:
  std::filesystem::path folder_;
  RunKey key_;
  std::size_t coherent_saved_ = 0;
};

/// What one part of a run found, for another process: the nodes of its tree, and the first
/// `coherent_rows` rows of cross and phase of its profile.
std::vector<std::byte> pack_part(const WindowTree& tree, const Profile& profile,
                                 std::size_t coherent_rows);
/// Adds pack_part's nodes to `tree` and writes its rows into `profile` from `first_row` on. `zero`
/// has the shapes of a window's sums. InternalError when the sizes do not agree.
void unpack_part(std::span<const std::byte> bytes, const WindowSums& zero, std::size_t first_row,
                 WindowTree& tree, Profile& profile);

}  // namespace kvplan::calib
