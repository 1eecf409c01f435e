#include "calib/checkpoint.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"

namespace kvplan::calib {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kVersion = 1;
constexpr const char* kStateFile = "state.json";
constexpr const char* kRemedy =
    "; repeat the run with the same inputs and options, or start anew with --force";

std::string sums_file(std::size_t done) { return "sums-" + std::to_string(done) + ".safetensors"; }
std::string coherent_file(std::int64_t index) {
  return "coherent-" + std::to_string(index) + ".safetensors";
}
std::string node_name(std::size_t i) { return "node." + std::to_string(i) + "."; }

/// All additive arrays of a node in one row, all maxima in another.
struct FlatSums {
  Array<double> sums;
  Array<float> absmax;
};

template <class T>
void append(Array<T>& flat, const Array<T>& part) {
  flat.data.insert(flat.data.end(), part.data.begin(), part.data.end());
  flat.shape = {static_cast<std::int64_t>(flat.data.size())};
}

FlatSums flatten(const WindowSums& layers) {
  FlatSums flat;
  for (const LayerProfile& layer : layers) {
    for_each_sum(
        layer, layer, [&](const auto& x, const auto&) { append(flat.sums, x); },
        [&](const auto& x, const auto&) { append(flat.absmax, x); });
  }
  return flat;
}

/// `layers` has the shapes; sizes were checked by the caller.
void unflatten(const FlatSums& flat, WindowSums& layers) {
  auto sums = flat.sums.data.begin();
  auto absmax = flat.absmax.data.begin();
  const auto take = [](auto& from, auto& array) {
    const auto end = from + static_cast<std::ptrdiff_t>(array.data.size());
    std::copy(from, end, array.data.begin());
    from = end;
  };
  for (LayerProfile& layer : layers) {
    for_each_sum(
        layer, layer, [&](auto& x, auto&) { take(sums, x); },
        [&](auto& x, auto&) { take(absmax, x); });
  }
}

/// Calls f(tensor name, per-window array) for the coherent tensors of all layers.
template <class P, class F>
void for_each_coherent(P& profile, const F& f) {
  for (std::size_t l = 0; l < profile.layers.size(); ++l) {
    for (const Side side : kSides) {
      auto& sums = profile.layers[l].side(side);
      const std::string prefix = "layers." + std::to_string(l) + "." + side_name(side);
      f(prefix + ".cross", sums.cross);
      f(prefix + ".phase", sums.phase);
    }
  }
}

std::vector<std::int64_t> row_shape(const Array<float>& rows) {
  return {rows.shape.begin() + 1, rows.shape.end()};
}

std::size_t coherent_rows(const Profile& profile) {
  return std::min(profile.windows.size(), static_cast<std::size_t>(profile.coherent_windows));
}

void write_coherent(const fs::path& file, const Profile& profile, std::size_t row) {
  SafetensorsWriter writer;
  for_each_coherent(profile, [&](const std::string& name, const Array<float>& rows) {
    const auto values = rows.row(row);
    Array<float> single;
    single.shape = row_shape(rows);
    single.data.assign(values.begin(), values.end());
    writer.add(name, single);
  });
  write_file_atomically(file, writer.bytes());
}

void read_coherent(const fs::path& path, Profile& profile, std::size_t row) {
  const SafetensorsFile file(path);
  for_each_coherent(profile, [&](const std::string& name, Array<float>& rows) {
    const Array<float> single = file.f32(name, row_shape(rows));
    std::copy(single.data.begin(), single.data.end(), rows.row(row).begin());
  });
}

void require_same_run(const RunKey& expected, const RunKey& found, const fs::path& file) {
  for (const auto& [option, value] : expected) {
    const auto other = found.find(option);
    const std::string theirs = other == found.end() ? "none" : other->second;
    if (theirs != value) {
      throw InputError(file.string(), "/key/" + option,
                       "the checkpoint was made with " + option + " " + theirs + ", this run has " +
                           value + kRemedy);
    }
  }
}

/// Values in the byte order of the machine, one behind the other.
class PartWriter {
 public:
  template <class T>
  void add(std::span<const T> values) {
    const auto bytes = std::as_bytes(values);
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

class PartReader {
 public:
  explicit PartReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <class T>
  void read(std::span<T> values) {
    const auto out = std::as_writable_bytes(values);
    if (out.size() > bytes_.size())
      throw InternalError("part of a profile: " + std::to_string(bytes_.size()) +
                          " bytes left where " + std::to_string(out.size()) + " are needed");
    std::copy_n(bytes_.begin(), out.size(), out.begin());
    bytes_ = bytes_.subspan(out.size());
  }
  std::int64_t integer() {
    std::int64_t value = 0;
    read(std::span(&value, 1));
    return value;
  }
  void require_end() const {
    if (!bytes_.empty())
      throw InternalError("part of a profile: " + std::to_string(bytes_.size()) +
                          " bytes too many");
  }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace

std::vector<std::byte> pack_part(const WindowTree& tree, const Profile& profile,
                                 std::size_t coherent_rows) {
  PartWriter part;
  const auto integer = [&](std::size_t value) {
    const auto wide = static_cast<std::int64_t>(value);
    part.add(std::span(&wide, 1));
  };
  integer(tree.nodes().size());
  for (const WindowTree::Node& node : tree.nodes()) {
    part.add(std::span(&node.index, 1));
    const FlatSums flat = flatten(node.sums);
    part.add<double>(flat.sums.data);
    part.add<float>(flat.absmax.data);
  }
  integer(coherent_rows);
  for (std::size_t row = 0; row < coherent_rows; ++row)
    for_each_coherent(profile, [&](const std::string&, const Array<float>& rows) {
      part.add<float>(rows.row(row));
    });
  return part.take();
}

void unpack_part(std::span<const std::byte> bytes, const WindowSums& zero, std::size_t first_row,
                 WindowTree& tree, Profile& profile) {
  PartReader part(bytes);
  FlatSums flat = flatten(zero);
  for (std::int64_t left = part.integer(); left > 0; --left) {
    const std::int64_t index = part.integer();
    part.read(std::span(flat.sums.data));
    part.read(std::span(flat.absmax.data));
    WindowSums sums = zero;
    unflatten(flat, sums);
    tree.add(index, std::move(sums));
  }
  const auto rows = static_cast<std::size_t>(part.integer());
  if (first_row + rows > coherent_rows(profile))
    throw InternalError("part of a profile: too many coherent windows");
  for (std::size_t row = first_row; row < first_row + rows; ++row)
    for_each_coherent(profile,
                      [&](const std::string&, Array<float>& all) { part.read(all.row(row)); });
  part.require_end();
}

std::size_t ProfileCheckpoint::load(const WindowSums& zero, WindowTree& tree, Profile& profile) {
  const fs::path state_file = folder_ / kStateFile;
  if (!fs::exists(state_file)) return 0;
  RunKey key;
  std::size_t done = 0;
  try {
    const Json state = Json::parse(read_text_file(state_file));
    if (const int version = state.at("version").get<int>(); version != kVersion) {
      throw InputError(
          state_file.string(), "/version",
          "expected " + std::to_string(kVersion) + ", found " + std::to_string(version) + kRemedy);
    }
    key = state.at("key").get<RunKey>();
    done = state.at("done").get<std::size_t>();
  } catch (const Json::exception& error) {
    throw InputError(state_file.string(), "",
                     std::string("damaged checkpoint: ") + error.what() + kRemedy);
  }
  require_same_run(key_, key, state_file);
  if (done == 0 || done > profile.windows.size()) {
    throw InputError(state_file.string(), "/done",
                     "expected 1 to " + std::to_string(profile.windows.size()) +
                         " windows, found " + std::to_string(done) + kRemedy);
  }

  const SafetensorsFile sums(folder_ / sums_file(done));
  const FlatSums shape = flatten(zero);
  std::vector<WindowTree::Node> nodes;
  for (const std::int64_t index : sums.i64("index").data) {
    const std::string name = node_name(nodes.size());
    const FlatSums flat{sums.f64(name + "sums", shape.sums.shape),
                        sums.f32(name + "absmax", shape.absmax.shape)};
    nodes.push_back({index, zero});
    unflatten(flat, nodes.back().sums);
  }
  tree.restore(std::move(nodes));
  coherent_saved_ = std::min(done, coherent_rows(profile));
  for (std::size_t row = 0; row < coherent_saved_; ++row) {
    read_coherent(folder_ / coherent_file(profile.windows[row].index), profile, row);
  }
  return done;
}

void ProfileCheckpoint::save(std::size_t done, const WindowTree& tree, const Profile& profile) {
  if (done == 0) return;
  std::error_code failed;
  fs::create_directories(folder_, failed);
  if (failed)
    throw EnvironmentError(folder_.string(),
                           "cannot make the checkpoint folder: " + failed.message());

  for (const std::size_t ready = std::min(done, coherent_rows(profile)); coherent_saved_ < ready;
       ++coherent_saved_) {
    write_coherent(folder_ / coherent_file(profile.windows[coherent_saved_].index), profile,
                   coherent_saved_);
  }
  SafetensorsWriter writer;
  Array<std::int64_t> index;
  for (const WindowTree::Node& node : tree.nodes()) {
    const FlatSums flat = flatten(node.sums);
    const std::string name = node_name(index.data.size());
    writer.add(name + "sums", flat.sums);
    writer.add(name + "absmax", flat.absmax);
    index.data.push_back(node.index);
  }
  index.shape = {static_cast<std::int64_t>(index.data.size())};
  writer.add("index", index);
  write_file_atomically(folder_ / sums_file(done), writer.bytes());

  const Json state = {{"version", kVersion}, {"key", key_}, {"done", done}};
  write_file_atomically(folder_ / kStateFile, state.dump(1) + "\n");
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("sums-") && name != sums_file(done)) fs::remove(entry.path(), failed);
  }
}

void ProfileCheckpoint::remove() const {
  std::error_code failed;
  fs::remove_all(folder_, failed);
  if (failed)
    throw EnvironmentError(folder_.string(),
                           "cannot remove the finished run's checkpoint: " + failed.message());
}

}  // namespace kvplan::calib
