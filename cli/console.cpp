#include "cli/console.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace kvplan::cli {
namespace {

/// Columns on a terminal: code points, as all our text is one column wide per code point.
std::size_t width_of(const std::string& s) {
  return static_cast<std::size_t>(
      std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

std::string padded(const std::string& s, std::size_t width, bool left) {
  std::string space(width - std::min(width, width_of(s)), ' ');
  return left ? s + space : space + s;
}

}  // namespace

std::string TextTable::text() const {
  std::vector<std::size_t> width(header_.size(), 0);
  for (std::size_t c = 0; c < header_.size(); ++c) {
    width[c] = width_of(header_[c]);
    for (const auto& row : rows_) width[c] = std::max(width[c], width_of(row[c]));
  }
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string row;
    for (std::size_t c = 0; c < cells.size(); ++c)
      row += (c ? "  " : "") + padded(cells[c], width[c], c == 0);
    out += row.substr(0, row.find_last_not_of(' ') + 1) + '\n';
  };
  line(header_);
  for (const auto& row : rows_) line(row);
  return out;
}

std::string TextTable::markdown() const {
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    out += '|';
    for (const auto& cell : cells) out += ' ' + cell + " |";
    out += '\n';
  };
  line(header_);
  out += '|';
  for (std::size_t c = 0; c < header_.size(); ++c) out += c == 0 ? "---|" : "---:|";
  out += '\n';
  for (const auto& row : rows_) line(row);
  return out;
}

std::string significant(double x, int digits) {
  if (x == 0 || !std::isfinite(x)) return x == 0 ? "0" : "n/a";
  const double magnitude = std::floor(std::log10(std::abs(x)));
  char buffer[64];
  if (magnitude < -5) {
    std::snprintf(buffer, sizeof buffer, "%.*e", digits - 1, x);
  } else {
    std::snprintf(buffer, sizeof buffer, "%.*f",
                  std::max(0, digits - 1 - static_cast<int>(magnitude)), x);
  }
  return buffer;
}

std::string fixed(double x, int decimals) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", decimals, x);
  return buffer;
}

std::string percent(double fraction, int decimals) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%+.*f %%", decimals, 100 * fraction);
  return buffer;
}

std::string megabytes(std::int64_t bytes) {
  return significant(static_cast<double>(bytes) / 1e6, 3) + " MB";
}

std::string duration(double seconds) {
  char buffer[32];
  const auto s = static_cast<long>(seconds + 0.5);
  if (s < 3600) {
    std::snprintf(buffer, sizeof buffer, "%ld:%02ld", s / 60, s % 60);
  } else {
    std::snprintf(buffer, sizeof buffer, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  }
  return buffer;
}

std::string coloured(Colour colour, const std::string& text, int descriptor) {
  const char* no_colour = std::getenv("NO_COLOR");
  const char* terminal = std::getenv("TERM");
  const bool plain = (no_colour && *no_colour) || !terminal || std::string_view(terminal) == "dumb";
  if (plain || !isatty(descriptor)) return text;
  return "\033[" + std::to_string(static_cast<int>(colour)) + "m" + text + "\033[0m";
}

ProgressPrinter::ProgressPrinter(Verbosity verbosity)
    : verbosity_(verbosity),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(std::chrono::steady_clock::now()) {}

ProgressPrinter::~ProgressPrinter() { finish_line(); }

void ProgressPrinter::finish_line() {
  if (line_open_) std::fputc('\n', stderr);
  line_open_ = false;
}

void ProgressPrinter::operator()(const Progress& p) {
  if (verbosity_ == Verbosity::kQuiet || p.total <= 0) return;
  if (stage_ != p.stage) {
    finish_line();
    stage_ = p.stage;
    first_done_ = p.done;
    last_tenth_ = -1;
    start_ = std::chrono::steady_clock::now();
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const std::int64_t fresh = p.done - first_done_;
  std::string text = stage_ + " " + std::to_string(p.done) + "/" + std::to_string(p.total) + " " +
                     std::string(p.unit) + ", " + duration(seconds);
  if (fresh > 0 && p.done < p.total) {
    text += ", " +
            duration(seconds / static_cast<double>(fresh) * static_cast<double>(p.total - p.done)) +
            " left";
  }
  if (terminal_) {
    const int filled = static_cast<int>(30 * p.done / p.total);
    std::fprintf(stderr, "\r[%s%s] %s\033[K", std::string(filled, '#').c_str(),
                 std::string(30 - filled, '.').c_str(), text.c_str());
    line_open_ = true;
    if (p.done == p.total) finish_line();
  } else if (const int tenth = static_cast<int>(10 * p.done / p.total); tenth != last_tenth_) {
    last_tenth_ = tenth;
    std::fprintf(stderr, "%s\n", text.c_str());
  }
  std::fflush(stderr);
}

void log(Verbosity verbosity, std::string_view message) {
  if (verbosity != Verbosity::kQuiet)
    std::fprintf(stderr, "%.*s\n", static_cast<int>(message.size()), message.data());
}

}  // namespace kvplan::cli
