#pragma once
// Mutations of inputs that begin with a JSON document: most keep it well-formed, so that they reach
// what lies behind the parser.

#include <cstddef>
#include <span>

namespace kvplan::fuzz {

/// Changes the first `size` bytes of `buffer` in place; returns the new size, at most
/// buffer.size(). An input is a JSON document, or one followed by a zero byte and anything, or one
/// after the 8 bytes of a safetensors header length (which is corrected), or no JSON at all: then
/// bytes are changed.
std::size_t mutate(std::span<char> buffer, std::size_t size, unsigned seed);

}  // namespace kvplan::fuzz
