#pragma once
// How long work reports progress and learns that it should stop. Libraries never print and never
// catch signals.

#include <cstdint>
#include <functional>
#include <string_view>

namespace kvplan {

struct Progress {
  std::string_view stage;  // "profile", "validate"
  std::int64_t done = 0;   // in units
  std::int64_t total = 0;
  std::string_view unit;  // "windows", "tokens"
};

struct RunControl {
  std::function<void(const Progress&)> progress;  // may be empty
  std::function<int()> stop_signal;  // may be empty; 0 = go on, else the signal number received

  void report(const Progress& p) const {
    if (progress) progress(p);
  }
  int stopping() const { return stop_signal ? stop_signal() : 0; }
};

}  // namespace kvplan
