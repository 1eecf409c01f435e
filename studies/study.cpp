#include "studies/study.h"

#include <cmath>
#include <limits>
#include <utility>

namespace kvplan::studies {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Check make_check(Role role, std::string name, double measured, std::string unit) {
  Check check;
  check.role = role;
  check.name = std::move(name);
  check.measured = measured;
  check.low = -kInfinity;
  check.high = kInfinity;
  check.unit = std::move(unit);
  return check;
}

}  // namespace

const char* verdict_letter(Verdict verdict) {
  switch (verdict) {
    case Verdict::kConfirmed:
      return "C";
    case Verdict::kExplained:
      return "E";
    case Verdict::kRefuted:
      return "R";
    case Verdict::kNotRun:
      break;
  }
  return "-";
}

void StudyResult::near(Role role, std::string name, double measured, double expected,
                       double tolerance, std::string unit) {
  Check check = make_check(role, std::move(name), measured, std::move(unit));
  check.expected = expected;
  check.low = expected - tolerance * tolerance_factor_;
  check.high = expected + tolerance * tolerance_factor_;
  checks_.push_back(std::move(check));
}

void StudyResult::near_relative(Role role, std::string name, double measured, double expected,
                                double fraction, std::string unit) {
  near(role, std::move(name), measured, expected, fraction * std::abs(expected), std::move(unit));
}

void StudyResult::exact(Role role, std::string name, double measured, double expected,
                        std::string unit) {
  Check check = make_check(role, std::move(name), measured, std::move(unit));
  check.expected = check.low = check.high = expected;
  checks_.push_back(std::move(check));
}

void StudyResult::between(Role role, std::string name, double measured, double low, double high,
                          std::string unit) {
  Check check = make_check(role, std::move(name), measured, std::move(unit));
  check.low = low;
  check.high = high;
  checks_.push_back(std::move(check));
}

void StudyResult::at_most(Role role, std::string name, double measured, double high,
                          std::string unit) {
  between(role, std::move(name), measured, -kInfinity, high, std::move(unit));
}

void StudyResult::at_least(Role role, std::string name, double measured, double low,
                           std::string unit) {
  between(role, std::move(name), measured, low, kInfinity, std::move(unit));
}

void StudyResult::holds(Role role, std::string name, bool outcome) {
  exact(role, std::move(name), outcome ? 1 : 0, 1);
}

Verdict StudyResult::verdict() const {
  int claims = 0, failed_claims = 0, explanations = 0, failed_explanations = 0;
  for (const Check& check : checks_) {
    if (check.role == Role::kClaim) {
      ++claims;
      failed_claims += check.passed() ? 0 : 1;
    } else if (check.role == Role::kExplanation) {
      ++explanations;
      failed_explanations += check.passed() ? 0 : 1;
    }
  }
  if (claims == 0) return Verdict::kNotRun;
  if (failed_claims == 0) return Verdict::kConfirmed;
  return explanations > 0 && failed_explanations == 0 ? Verdict::kExplained : Verdict::kRefuted;
}

int StudyResult::missed_references() const {
  int missed = 0;
  for (const Check& check : checks_)
    if (check.role == Role::kReference && !check.passed()) ++missed;
  return missed;
}

}  // namespace kvplan::studies
