#include "tokenizers/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <new>

#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {
namespace {

// A match of real pre-tokenizers backtracks a few times per character of one word.
constexpr std::uint32_t kMatchLimit = 10'000'000;
constexpr std::uint32_t kDepthLimit = 10'000;
constexpr std::uint32_t kHeapLimitKib = 64 * 1024;
constexpr std::size_t kJitStackStart = 32 * 1024;
constexpr std::size_t kJitStackLimit = 8 * 1024 * 1024;
constexpr std::uint32_t kMaxNestedParentheses = 100;

template <auto Release>
struct Releaser {
  template <class T>
  void operator()(T* object) const {
    Release(object);
  }
};
template <class T, auto Release>
using Handle = std::unique_ptr<T, Releaser<Release>>;

using CompiledCode = Handle<pcre2_code, pcre2_code_free>;
using CompileContext = Handle<pcre2_compile_context, pcre2_compile_context_free>;
using MatchContext = Handle<pcre2_match_context, pcre2_match_context_free>;
using MatchData = Handle<pcre2_match_data, pcre2_match_data_free>;
using JitStack = Handle<pcre2_jit_stack, pcre2_jit_stack_free>;

template <class T>
T* require_memory(T* object) {
  if (object == nullptr) throw std::bad_alloc();
  return object;
}

std::string describe(int error) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(error, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

/// What matching needs beside the code: made once a thread, since a match happens for every few
/// words.
struct Workspace {
  MatchContext context{require_memory(pcre2_match_context_create(nullptr))};
  JitStack stack{require_memory(pcre2_jit_stack_create(kJitStackStart, kJitStackLimit, nullptr))};
  MatchData match{
      require_memory(pcre2_match_data_create(1, nullptr))};  // only the whole match is asked for

  Workspace() {
    pcre2_set_match_limit(context.get(), kMatchLimit);
    pcre2_set_depth_limit(context.get(), kDepthLimit);
    pcre2_set_heap_limit(context.get(), kHeapLimitKib);
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
  }
};

}  // namespace

struct Regex::Code {
  CompiledCode compiled;
};

Regex::Regex(std::string_view pattern) : Regex(pattern, PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C) {}

Regex Regex::literal(std::string_view text) { return Regex(text, PCRE2_LITERAL); }

Regex::Regex(std::string_view pattern, unsigned options) {
  if (pattern.size() > kMaxPatternBytes) {
    throw RegexError("the pattern has " + std::to_string(pattern.size()) + " bytes; at most " +
                     std::to_string(kMaxPatternBytes) + " are accepted");
  }
  const CompileContext context(require_memory(pcre2_compile_context_create(nullptr)));
  pcre2_set_parens_nest_limit(context.get(), kMaxNestedParentheses);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_shared<Code>();
  code->compiled.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                     PCRE2_UTF | options, &error, &offset, context.get()));
  if (!code->compiled) {
    throw RegexError("the pattern is refused at byte " + std::to_string(offset) + ": " +
                     describe(error));
  }
  // Without JIT (a platform that lacks it) matching is slower and gives the same result.
  pcre2_jit_compile(code->compiled.get(), PCRE2_JIT_COMPLETE);
  code_ = std::move(code);
}

void Regex::for_each_match(std::string_view text,
                           const std::function<void(std::size_t, std::size_t)>& found) const {
  thread_local const Workspace workspace;
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(workspace.match.get());
  std::size_t at = 0;
  while (at <= text.size()) {
    const int result =
        pcre2_match(code_->compiled.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK,
                    workspace.match.get(), workspace.context.get());
    if (result == PCRE2_ERROR_NOMATCH) return;
    if (result < 0) throw RegexError("matching the pattern was given up: " + describe(result));
    const std::size_t begin = bounds[0], end = bounds[1];
    found(begin, end);
    if (end > begin) {
      at = end;
    } else {
      at = end + (end < text.size() ? utf8_length(text[end]) : 1);
    }
  }
}

}  // namespace kvplan::tokenizers
