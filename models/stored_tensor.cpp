// Values of tensors as their files store them: transposed, interleaved, fused, offset.

#include <map>
#include <utility>

#include "models/dequantize.h"
#include "models/families.h"
#include "models/file_model.h"
#include "schemas/error.h"

namespace kvplan::models {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const auto n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

/// Where a stored row goes: inside a head, rotary pair j is stored as rows 2j, 2j+1 and read as
/// rows j, j + head_dim/2.
std::size_t half_split_row(std::size_t row, std::size_t head_dim) {
  const std::size_t head = row / head_dim, within = row % head_dim;
  return head * head_dim + within % 2 * (head_dim / 2) + within / 2;
}

void require_finite(const StoredTensor& tensor, std::span<const float> row, std::size_t first) {
  const auto bad = first_non_finite(row);
  if (bad == row.size()) return;
  throw InputError(tensor.file->path().string(), tensor.stored_name,
                   "expected finite weights, found " + std::to_string(row[bad]) + " at element " +
                       std::to_string(first + bad) + " of " + shape_text(tensor.shape));
}

void read_rows(const StoredTensor& tensor, std::span<float> out) {
  // Vectors are one row, except where rows move: then each element is a row.
  const bool one_row = tensor.shape.size() == 1 && tensor.interleaved_heads == 0;
  const auto rows = one_row ? 1 : static_cast<std::size_t>(tensor.shape.front());
  const std::size_t columns = out.size() / rows, row_bytes = tensor.data.size() / rows;
  const std::size_t head_dim =
      tensor.interleaved_heads ? rows / static_cast<std::size_t>(tensor.interleaved_heads) : 0;
  for (std::size_t row = 0; row < rows; ++row) {
    const auto to =
        out.subspan((head_dim ? half_split_row(row, head_dim) : row) * columns, columns);
    dequantize(tensor.type, tensor.data.subspan(row * row_bytes, row_bytes), to);
    require_finite(tensor, to, row * columns);
  }
}

/// shape [out, in] from stored [in, stored_columns].
void read_transposed(const StoredTensor& tensor, std::span<float> out) {
  const auto outputs = static_cast<std::size_t>(tensor.shape[0]),
             inputs = static_cast<std::size_t>(tensor.shape[1]),
             first = static_cast<std::size_t>(tensor.first_column);
  const std::size_t row_bytes = tensor.data.size() / inputs;
  std::vector<float> row(static_cast<std::size_t>(tensor.stored_columns));
  for (std::size_t i = 0; i < inputs; ++i) {
    dequantize(tensor.type, tensor.data.subspan(i * row_bytes, row_bytes), row);
    require_finite(tensor, row, i * row.size());
    for (std::size_t o = 0; o < outputs; ++o) out[o * inputs + i] = row[first + o];
  }
}

/// Rows first .. first + rows - 1 as a tensor of its own.
StoredTensor row_slice(const StoredTensor& fused, std::int64_t first, std::int64_t rows) {
  StoredTensor part = fused;
  const std::int64_t all = fused.shape.front();
  part.shape.front() = rows;
  if (fused.stored_columns != 0) {
    part.first_column = first;
  } else {
    const std::size_t row_bytes = fused.data.size() / static_cast<std::size_t>(all);
    part.data = fused.data.subspan(static_cast<std::size_t>(first) * row_bytes,
                                   static_cast<std::size_t>(rows) * row_bytes);
  }
  return part;
}

}  // namespace

void read_values(const StoredTensor& tensor, std::span<float> out) {
  if (tensor.stored_columns != 0) {
    read_transposed(tensor, out);
  } else {
    read_rows(tensor, out);
  }
  if (tensor.offset != 0)
    for (float& value : out) value += tensor.offset;
}

void split_fused_tensors(StoredModel& model) {
  std::map<std::string, std::int64_t> rows_of;  // of all tensors that the forward pass reads
  for (const auto& [name, shape] : expected_tensors(model.config)) rows_of[name] = shape.front();
  for (int layer = 0; layer < model.config.num_layers; ++layer)
    for (const auto& [fused_name, parts] : fused_tensors())
      for (const std::string kind : {".weight", ".bias"}) {
        const std::string prefix = "blk." + std::to_string(layer) + ".";
        const auto found = model.tensors.extract(prefix + fused_name + kind);
        if (!found) continue;
        const StoredTensor& fused = found.mapped();
        std::int64_t total = 0;
        for (const char* part : parts) {
          const auto rows = rows_of.find(prefix + part + kind);
          if (rows == rows_of.end()) refuse_tensor(*fused.file, fused.stored_name, model.config);
          total += rows->second;
        }
        if (fused.shape.front() != total)
          throw InputError(fused.file->path().string(), fused.stored_name,
                           "expected " + std::to_string(total) + " rows, found the shape " +
                               shape_text(fused.shape));
        const bool in_blocks = ggml_block(static_cast<std::uint32_t>(fused.type))->elements > 1;
        if (in_blocks && fused.shape.size() == 1)
          throw InputError(fused.file->path().string(), fused.stored_name,
                           "expected a bias in F32, F16 or BF16, found a block format");
        std::int64_t first = 0;
        for (const char* part : parts) {
          const std::int64_t rows = rows_of.at(prefix + part + kind);
          if (!model.tensors.try_emplace(prefix + part + kind, row_slice(fused, first, rows))
                   .second)
            throw InputError(fused.file->path().string(), fused.stored_name,
                             std::string("the file also holds its part ") + part);
          first += rows;
        }
      }
}

}  // namespace kvplan::models
