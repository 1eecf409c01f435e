#include "tokenizers/normalizer.h"

namespace kvplan::tokenizers {
namespace {

struct Apply {
  std::string text;

  std::string operator()(const ToNormalForm& step) const { return normal_form(text, step.form); }
  std::string operator()(const ToLowerCase&) const { return lower_case(text); }
  std::string operator()(const WithoutMarks&) const { return strip_marks(text); }
  std::string operator()(const Trim& step) const {
    std::size_t begin = text.size(), end = 0;  // of what is not white space
    for (std::size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
      if (is_space(decode_utf8(text, at))) continue;
      if (begin > at) begin = at;
      end = at + utf8_length(text[at]);
    }
    if (end == 0) return step.left || step.right ? std::string() : text;
    if (!step.left) begin = 0;
    if (!step.right) end = text.size();
    return text.substr(begin, end - begin);
  }
  std::string operator()(const Prepend& step) const {
    return text.empty() ? std::string() : step.text + text;
  }
  std::string operator()(const Replace& step) const {
    std::string replaced;
    std::size_t done = 0;
    step.pattern.for_each_match(text, [&](std::size_t begin, std::size_t end) {
      replaced.append(text, done, begin - done);
      replaced += step.with;
      done = end;
    });
    return replaced.append(text, done);
  }
};

}  // namespace

std::string Normalizer::operator()(std::string_view text) const {
  std::string normalized(text);
  for (const auto& step : steps) normalized = std::visit(Apply{std::move(normalized)}, step);
  return normalized;
}

}  // namespace kvplan::tokenizers
