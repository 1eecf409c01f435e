#pragma once
// What the command line writes: results to stdout, progress and logs to stderr.

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/run_control.h"

namespace kvplan::cli {

enum class Verbosity { kQuiet, kNormal, kVerbose };

/// A table with right-aligned columns, first column left-aligned; printed as plain text or
/// Markdown.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header) : header_(std::move(header)) {}
  void add_row(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  std::string text() const;
  std::string markdown() const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

/// `digits` significant digits, without exponent where that is readable ("0.0281", "22.69",
/// "1.2e-05").
std::string significant(double x, int digits = 3);
std::string fixed(double x, int decimals);
/// "+2.8 %".
std::string percent(double fraction, int decimals = 1);
/// "9.1 MB".
std::string megabytes(std::int64_t bytes);
/// "2:05" or "1:02:05".
std::string duration(double seconds);

enum class Colour { kRed = 31, kGreen = 32, kYellow = 33 };
/// `text` in that colour if `descriptor` is a terminal that shows colours and NO_COLOR is not set
/// (https://no-color.org), else as it is.
std::string coloured(Colour colour, const std::string& text, int descriptor);

/// stderr: a bar with time left on a terminal, else a line every tenth of the work.
class ProgressPrinter {
 public:
  explicit ProgressPrinter(Verbosity verbosity);
  ~ProgressPrinter();
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;
  void operator()(const Progress& p);

 private:
  void finish_line();
  Verbosity verbosity_;
  bool terminal_;
  bool line_open_ = false;
  int last_tenth_ = -1;
  std::string stage_;
  std::int64_t first_done_ = 0;  // a resumed run starts above 0
  std::chrono::steady_clock::time_point start_;
};

/// One line on stderr, unless quiet.
void log(Verbosity verbosity, std::string_view message);

}  // namespace kvplan::cli
