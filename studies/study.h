#pragma once
// What a study is: one published claim, the experiment that settles it, and a verdict computed from
// its checks (docs/studies.md).

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "schemas/run_control.h"

namespace kvplan::studies {

class ModelLab;

enum class Verdict { kConfirmed, kExplained, kRefuted, kNotRun };
/// "C", "E", "R", "-".
const char* verdict_letter(Verdict verdict);

/// Which question a check answers.
enum class Role {
  kClaim,        // is it as published?
  kExplanation,  // does our other reason or count give what was published?
  kReference,    // do we measure what we expect (theory, an earlier measurement)? no part of the
                 // verdict, but a miss is a finding
};

/// One figure against an interval.
struct Check {
  Role role = Role::kReference;
  std::string name;  // "D at 3 bits, d=128"
  double measured = 0;
  double low = 0, high = 0;        // passes inside; infinities for one-sided checks
  std::optional<double> expected;  // the figure the interval is around
  std::string unit;                // "", "nats", "bits", "%"
  bool passed() const { return measured >= low && measured <= high; }
};

struct StudyTable {
  std::string title;
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
};

struct StudyInfo {
  std::string id;           // "A7"
  std::string title;        // a short noun phrase
  std::string claim;        // what was published, in our words, with its figures
  std::string source;       // author, title, year or arXiv number
  std::string explanation;  // why the result differs from the publication, or what it means where
                            // it does not
  Verdict expected = Verdict::kConfirmed;  // claims.md; another outcome is reported as a finding
  bool needs_model = false;                // nothing can be measured without one
  bool uses_model = false;                 // has checks that only run with a model
};

/// Sizes of the random experiments: kFull as docs/studies.md states them, kSmall for tests, where
/// tolerances are widened by `tolerance_factor`.
enum class Scale { kSmall, kFull };

struct StudyContext {
  Scale scale = Scale::kFull;
  std::uint64_t seed = 0;
  ModelLab* lab = nullptr;  // null: no model was given
  /// `full` vectors (draws, seeds, ...) at full scale, `small` in tests.
  std::int64_t size(std::int64_t full, std::int64_t small) const {
    return scale == Scale::kFull ? full : small;
  }
  double tolerance_factor() const { return scale == Scale::kFull ? 1 : 6; }
};

class StudyResult {
 public:
  explicit StudyResult(double tolerance_factor = 1) : tolerance_factor_(tolerance_factor) {}

  /// |measured - expected| <= tolerance (times the factor of small scale).
  void near(Role role, std::string name, double measured, double expected, double tolerance,
            std::string unit = "");
  /// |measured - expected| <= fraction * |expected| (times the factor of small scale).
  void near_relative(Role role, std::string name, double measured, double expected, double fraction,
                     std::string unit = "");
  /// Equal to the last digit.
  void exact(Role role, std::string name, double measured, double expected, std::string unit = "");
  void between(Role role, std::string name, double measured, double low, double high,
               std::string unit = "");
  void at_most(Role role, std::string name, double measured, double high, std::string unit = "");
  void at_least(Role role, std::string name, double measured, double low, std::string unit = "");
  /// A yes-no outcome, 1 or 0; passes when true.
  void holds(Role role, std::string name, bool outcome);
  void table(StudyTable table) { tables_.push_back(std::move(table)); }
  void note(std::string text) { notes_.push_back(std::move(text)); }

  const std::vector<Check>& checks() const { return checks_; }
  const std::vector<StudyTable>& tables() const { return tables_; }
  const std::vector<std::string>& notes() const { return notes_; }
  /// C when every claim check passes; else E when there are explanation checks and all pass; else
  /// R. Not run without claim checks.
  Verdict verdict() const;
  /// Reference checks that failed.
  int missed_references() const;

 private:
  double tolerance_factor_;
  std::vector<Check> checks_;
  std::vector<StudyTable> tables_;
  std::vector<std::string> notes_;
};

struct Study {
  StudyInfo info;
  std::function<void(const StudyContext&, StudyResult&)> run;
};

/// Every study, in the order of docs/studies.md: T1-T4, A, B, C, D, E, F, M.
const std::vector<Study>& all_studies();

// The parts of all_studies, one function per file of experiments.
std::vector<Study> reference_table_studies();  // T1-T4
std::vector<Study> estimator_studies();        // A1-A11
std::vector<Study> rotation_studies();         // A12-A22
std::vector<Study> demonstration_studies();    // B1-B9
std::vector<Study> size_studies();             // C1-C8
std::vector<Study> allocation_studies();       // D1-D4
std::vector<Study> model_table_studies();      // E1-E12
std::vector<Study> structure_studies();        // F1-F5
std::vector<Study> extra_studies();            // M1-M4, our own questions

/// One finished study. `seconds` is a run fact and stays out of comparisons.
struct Outcome {
  const Study* study = nullptr;
  StudyResult result;
  Verdict verdict = Verdict::kNotRun;
  std::string not_run_reason;  // "needs --model"
  double seconds = 0;
};

/// Runs the given studies, those without a model on up to `threads` threads at once; results do not
/// depend on the number. A study that throws ends the run with its id in the message.
/// InterruptedError between studies when control.stopping().
std::vector<Outcome> run_studies(const std::vector<const Study*>& studies,
                                 const StudyContext& context, int threads,
                                 const RunControl& control);

}  // namespace kvplan::studies
