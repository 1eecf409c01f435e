#pragma once
// A model as its container describes it, before any weight is converted.

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/model.h"
#include "schemas/gguf.h"
#include "schemas/mapped_file.h"

namespace kvplan::models {

struct StoredTensor {
  std::string stored_name;                 // in the file, for messages
  std::shared_ptr<const MappedFile> file;  // owns `data`
  GgmlType type = GgmlType::kF32;          // plain floats of safetensors too
  std::vector<std::int64_t> shape;         // row-major
  std::span<const std::byte> data;
  std::span<const std::byte> whole = data;  // of the fused tensor that this is a part of
  int interleaved_heads =
      0;  // rows of so many heads hold rotary pairs as neighbours; 0: half-split or not rotary
  std::int64_t stored_columns = 0;  // the transpose is stored, [in, stored_columns]; 0: it is not
  std::int64_t first_column = 0;    // of the transpose: where the rows of `shape` begin
  float offset = 0;                 // what the file leaves out of each value
};
using StoredTensors = std::map<std::string, StoredTensor, std::less<>>;  // by GGUF name

struct StoredModel {
  std::filesystem::path path;
  ModelConfig config;
  StoredTensors tensors;  // every tensor of the files that takes part in the forward pass
  // What the files call a tensor that is missing, by GGUF name; absent: the same.
  std::map<std::string, std::string, std::less<>> stored_names = {};
};

// Upper ends of what the readers believe; they keep products inside 64 bits and hostile files
// small.
inline constexpr std::int64_t kMaxLayers = 4096;
inline constexpr std::int64_t kMaxWidth = 1 << 20;    // of a layer, a head, a vocabulary
inline constexpr std::int64_t kMaxContext = 1 << 30;  // tokens

/// Throws InputError for a tensor that is none of expected_tensors: ignoring it would change the
/// forward pass.
[[noreturn]] void refuse_tensor(const MappedFile& file, const std::string& stored_name,
                                const ModelConfig& config);

/// De-quantised to row-major float. InputError{file, tensor} on NaN or Inf.
void read_values(const StoredTensor& tensor, std::span<float> out);

/// Puts the parts of fused tensors (models/families.h) in their place. InputError when the rows of
/// one are not those of its parts together.
void split_fused_tensors(StoredModel& model);

StoredModel read_gguf_model(const std::filesystem::path& file);
StoredModel read_hf_model(const std::filesystem::path& folder);

}  // namespace kvplan::models
