// gguf, safetensors, tokenizer_json: containers of models and what is read from them.

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "models/file_model.h"
#include "schemas/error.h"
#include "schemas/gguf.h"
#include "schemas/safetensors.h"
#include "tests/fuzz/input_folder.h"
#include "tests/fuzz/targets.h"
#include "tokenizers/text_tokenizer.h"

namespace kvplan::fuzz {
namespace {

// Letters with and without marks, digits, spaces, an emoji, and texts that added tokens like.
constexpr std::string_view kText =
    "Hello, w\xc3\xb6rld!  1234 x\ti\xcc\x87 \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x98\x80 <s></s>"
    "<|im_end|>\r\n\n'll don't    e";

const InputFolder& folder() {
  static const InputFolder kFolder;
  return kFolder;
}

/// Every byte of the span, so that a sanitizer sees one outside the file.
void touch(std::span<const std::byte> bytes) {
  volatile unsigned sum = 0;
  for (const auto b : bytes) sum = sum + static_cast<unsigned>(b);
}

/// The tokens of a text decode to something, and every id is one of the vocabulary.
void use(const tokenizers::TokenizerParts& parts, const tokenizers::Tokenizer& tokenizer) {
  for (const bool special : {false, true}) {
    std::vector<std::int32_t> ids;
    try {
      ids = tokenizer.encode(kText, special);
    } catch (const InputError&) {
      continue;  // a pattern that gives up, a character without a token
    }
    for (const auto id : ids) {
      if (id < 0 || static_cast<std::size_t>(id) >= parts.texts.size())
        throw std::logic_error("a token id outside the vocabulary");
    }
    tokenizer.decode(ids);
  }
}

bool use_tokenizer(tokenizers::TokenizerParts (*read)(const std::filesystem::path&),
                   const std::filesystem::path& file) {
  try {
    tokenizers::TokenizerParts parts = read(file);
    // encode() names the file of its parts only; the texts are all that use() needs of them.
    tokenizers::TokenizerParts copy;
    copy.texts = parts.texts;
    use(copy, tokenizers::TextTokenizer(std::move(parts)));
    return true;
  } catch (const InputError&) {
    return false;
  }
}

}  // namespace

bool gguf(std::span<const char> input) {
  const auto file = folder().write("input.gguf", input);
  try {
    const GgufFile container(file);
    for (const auto& [name, tensor] : container.tensors()) touch(tensor.data);
  } catch (const InputError&) {
    return false;
  }
  try {
    models::read_gguf_model(file);
  } catch (const InputError&) {
  }
  use_tokenizer(tokenizers::read_gguf_tokenizer, file);
  return true;
}

bool safetensors(std::span<const char> input) {
  const auto file = folder().write("input.safetensors", input);
  try {
    const SafetensorsFile container(file);
    for (const auto& [name, entry] : container.entries()) {
      touch(entry.data);
      const std::int64_t elements = std::accumulate(entry.shape.begin(), entry.shape.end(),
                                                    std::int64_t{1}, std::multiplies<>());
      if (entry.dtype == "F64" &&
          container.f64(name).data.size() != static_cast<std::size_t>(elements))
        throw std::logic_error("a tensor without the elements of its shape");
    }
    return true;
  } catch (const InputError&) {
    return false;
  }
}

bool tokenizer_json(std::span<const char> input) {
  return use_tokenizer(tokenizers::read_tokenizer_json, folder().write("tokenizer.json", input));
}

}  // namespace kvplan::fuzz
