#pragma once
// Typed errors of every kvplan library. The CLI maps each type to one exit code
// (docs/architecture.md).

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvplan {

/// Base of all errors that kvplan throws on purpose; what() is a complete sentence for the user.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller passed something impossible (size mismatch, unknown option value). Exit code 2.
class ArgumentError : public Error {
 public:
  using Error::Error;
};

/// A file is missing, malformed, corrupted or refused. Exit code 3.
/// `field` names the tensor, JSON pointer or line; empty when the whole file is meant.
class InputError : public Error {
 public:
  InputError(std::string file, std::string field, const std::string& message)
      : Error(file + (field.empty() ? "" : " [" + field + "]") + ": " + message),
        file_(std::move(file)),
        field_(std::move(field)) {}
  const std::string& file() const { return file_; }
  const std::string& field() const { return field_; }

 private:
  std::string file_, field_;
};

/// No choice of widths meets the budget. Exit code 4.
class InfeasibleError : public Error {
 public:
  InfeasibleError(double requested, double minimum, const std::string& message)
      : Error(message), requested_(requested), minimum_(minimum) {}
  double requested() const { return requested_; }
  double minimum() const { return minimum_; }

 private:
  double requested_, minimum_;
};

/// Not enough memory for the work asked. Exit code 5.
class MemoryError : public Error {
 public:
  MemoryError(std::int64_t needed_bytes, std::int64_t available_bytes, const std::string& message)
      : Error(message), needed_bytes_(needed_bytes), available_bytes_(available_bytes) {}
  std::int64_t needed_bytes() const { return needed_bytes_; }
  std::int64_t available_bytes() const { return available_bytes_; }

 private:
  std::int64_t needed_bytes_, available_bytes_;
};

/// The machine refused: cannot write, disk full, lock held, device or driver missing. Exit code 7.
class EnvironmentError : public Error {
 public:
  EnvironmentError(std::string resource, const std::string& message)
      : Error(resource + ": " + message), resource_(std::move(resource)) {}
  const std::string& resource() const { return resource_; }

 private:
  std::string resource_;
};

/// Work stopped by a signal after its state was saved. Exit code 128 + signal.
class InterruptedError : public Error {
 public:
  InterruptedError(int signal, const std::string& message) : Error(message), signal_(signal) {}
  int signal() const { return signal_; }

 private:
  int signal_;
};

/// A broken invariant of our own. Exit code 1.
class InternalError : public Error {
 public:
  using Error::Error;
};

}  // namespace kvplan
