#pragma once
// What each fuzz target does with an input. The fuzzers (fuzz_main.cpp) and the test of the kept
// inputs (corpus_test.cpp) call the same functions.

#include <span>

namespace kvplan::fuzz {

/// Reads the input and uses what was read. True when it was accepted, false when it was refused
/// with a typed error; any other exception and any broken property ends the process.
bool gguf(std::span<const char> input);         // the container, then configuration and tokenizer
bool safetensors(std::span<const char> input);  // the container
bool tokenizer_json(std::span<const char> input);
/// Both: JSON document, a zero byte, safetensors. kSha256Mark in the document is replaced by the
/// SHA-256 of the tensors, which no mutation would find.
bool profile(std::span<const char> input);  // reader, writer, merge
bool plan(std::span<const char> input);     // reader, writer, codecs, memory plan, reference cache

inline constexpr char kSha256Mark[] =
    "0000000000000000000000000000000000000000000000000000000000000000";

}  // namespace kvplan::fuzz
