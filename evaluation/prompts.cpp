#include "evaluation/prompts.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/sha256.h"
#include "tokenizers/unicode.h"

namespace kvplan::evaluation {
namespace {

/// A prompt as the file has it.
struct PromptText {
  std::size_t line = 0;
  std::string prompt, answer, category;
};

std::string line_name(std::size_t line) { return "line " + std::to_string(line); }

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

PromptText parse_json_line(std::string_view line, const std::string& file, std::size_t number) {
  const auto refuse = [&](const std::string& message) {
    throw InputError(file, line_name(number), message);
  };
  const auto document = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!document.is_object())
    refuse("expected a JSON object with a string \"prompt\"; give one prompt per line");
  const auto text_of = [&](const char* name) -> std::string {
    const auto field = document.find(name);
    if (field == document.end()) return "";
    if (!field->is_string())
      refuse("expected a string in \"" + std::string(name) + "\", found " + field->dump());
    return field->get<std::string>();
  };
  PromptText found{number, text_of("prompt"), text_of("answer"), text_of("category")};
  if (is_blank(found.prompt)) refuse("expected text in \"prompt\", found none");
  if (document.contains("answer") && is_blank(found.answer))
    refuse("expected text in \"answer\", found none; leave the field out");
  return found;
}

/// Calls visit(line, number) for every line, without its line break.
template <class Visit>
void for_each_line(std::string_view content, Visit visit) {
  for (std::size_t begin = 0, number = 1; begin < content.size(); ++number) {
    const std::size_t end = std::min(content.find('\n', begin), content.size());
    std::string_view line = content.substr(begin, end - begin);
    if (line.ends_with('\r')) line.remove_suffix(1);
    visit(line, number);
    begin = end + 1;
  }
}

std::vector<PromptText> parse_jsonl(std::string_view content, const std::string& file) {
  std::vector<PromptText> found;
  for_each_line(content, [&](std::string_view line, std::size_t number) {
    if (!is_blank(line)) found.push_back(parse_json_line(line, file, number));
  });
  return found;
}

/// Prompts apart by blank lines.
std::vector<PromptText> parse_blocks(std::string_view content) {
  std::vector<PromptText> found;
  bool in_block = false;
  for_each_line(content, [&](std::string_view line, std::size_t number) {
    if (is_blank(line)) {
      in_block = false;
      return;
    }
    if (in_block) {
      found.back().prompt += '\n';
    } else {
      found.push_back({number, "", "", ""});
    }
    found.back().prompt += line;
    in_block = true;
  });
  return found;
}

void require_plain_text(std::string_view content, const std::string& file) {
  if (const auto nul = content.find('\0'); nul != std::string_view::npos)
    throw InputError(file, "byte " + std::to_string(nul),
                     "expected text, found a NUL byte: the file is binary or UTF-16");
  if (const auto offset = tokenizers::find_invalid_utf8(content))
    throw InputError(file, "byte " + std::to_string(*offset),
                     "expected UTF-8, found an invalid sequence; convert the file to UTF-8");
}

/// Tokens of a prompt and of it with its answer, which may change how the prompt's end is cut.
Prompt tokenise(const PromptText& text, const tokenizers::Tokenizer& tokenizer) {
  constexpr bool kParseSpecial = true;
  Prompt prompt;
  prompt.where = line_name(text.line);
  prompt.category = text.category;
  prompt.tokens = tokenizer.encode(text.prompt, kParseSpecial);
  if (text.answer.empty()) return prompt;
  prompt.with_answer = tokenizer.encode(text.prompt + text.answer, kParseSpecial);
  const auto shared = std::mismatch(prompt.tokens.begin(), prompt.tokens.end(),
                                    prompt.with_answer.begin(), prompt.with_answer.end());
  prompt.answer_begin = static_cast<std::size_t>(shared.first - prompt.tokens.begin());
  return prompt;
}

void check_prompt(const Prompt& prompt, const models::ModelConfig& model, const std::string& file,
                  int max_tokens) {
  const auto refuse = [&](const std::string& message) {
    throw InputError(file, prompt.where, message);
  };
  const bool has_answer = !prompt.with_answer.empty();
  if (has_answer && (prompt.answer_begin == 0 || prompt.answer_begin == prompt.with_answer.size()))
    refuse(
        "the answer does not begin at a token of its own behind the prompt; put a space or a line "
        "break between them");
  const std::size_t longest = std::max(prompt.tokens.size() + static_cast<std::size_t>(max_tokens),
                                       prompt.with_answer.size());
  if (model.max_context > 0 && longest > static_cast<std::size_t>(model.max_context))
    refuse("the prompt has " + std::to_string(prompt.tokens.size()) + " tokens and takes " +
           std::to_string(longest) + " with its continuation or answer, the model's context is " +
           std::to_string(model.max_context) + "; shorten it, or lower --max-tokens");
  for (const auto& tokens : {prompt.tokens, prompt.with_answer})
    for (const std::int32_t id : tokens)
      if (id < 0 || id >= model.vocab_size)
        refuse("token id " + std::to_string(id) + " is outside the model's vocabulary of " +
               std::to_string(model.vocab_size) + "; the tokenizer belongs to another model");
}

std::int32_t stop_token(const tokenizers::Tokenizer& tokenizer, const std::string& stop) {
  const auto ids = tokenizer.encode(stop, /*parse_special=*/true);
  if (ids.size() != 1)
    throw ArgumentError("the stop text '" + stop + "' has " + std::to_string(ids.size()) +
                        " tokens; give the text of a single token, such as <|im_end|>");
  return ids.front();
}

}  // namespace

PromptSet load_prompts(const std::filesystem::path& file, const tokenizers::Tokenizer& tokenizer,
                       const models::ModelConfig& model, const PromptOptions& options) {
  if (options.max_tokens < 1)
    throw ArgumentError("continuations of " + std::to_string(options.max_tokens) +
                        " tokens; expected at least 1");
  PromptSet set;
  if (!options.stop.empty()) set.stop_token = stop_token(tokenizer, options.stop);
  const std::string content = read_text_file(file);
  require_plain_text(content, file.string());
  set.source = {file.filename().string(), sha256(content), options.max_tokens, options.stop};
  const auto texts =
      file.extension() == ".jsonl" ? parse_jsonl(content, file.string()) : parse_blocks(content);
  if (texts.empty())
    throw InputError(file.string(), "",
                     "expected prompts, found none; give a JSON object with a \"prompt\" per line "
                     "(.jsonl), or text with a blank line between prompts");
  for (const PromptText& text : texts) {
    set.prompts.push_back(tokenise(text, tokenizer));
    check_prompt(set.prompts.back(), model, file.string(), options.max_tokens);
  }
  return set;
}

}  // namespace kvplan::evaluation
