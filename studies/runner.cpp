#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "schemas/error.h"
#include "studies/study.h"

namespace kvplan::studies {
namespace {

Outcome run_one(const Study& study, const StudyContext& context) {
  Outcome outcome;
  outcome.study = &study;
  outcome.result = StudyResult(context.tolerance_factor());
  if (study.info.needs_model && !context.lab) {
    outcome.not_run_reason = "needs --model and --text";
    return outcome;
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    study.run(context, outcome.result);
  } catch (const ArgumentError& error) {
    throw InternalError("study " + study.info.id + ": " + error.what());
  }
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  outcome.verdict = outcome.result.verdict();
  if (outcome.verdict == Verdict::kNotRun) outcome.not_run_reason = "no check of the claim ran";
  return outcome;
}

}  // namespace

const std::vector<Study>& all_studies() {
  static const std::vector<Study> studies = [] {
    std::vector<Study> all;
    for (const auto part :
         {reference_table_studies, estimator_studies, rotation_studies, demonstration_studies,
          size_studies, allocation_studies, model_table_studies, structure_studies, extra_studies})
      std::ranges::move(part(), std::back_inserter(all));
    return all;
  }();
  return studies;
}

// Studies that use the model share its measurements and take the threads one after another; the
// others are independent of each other.
std::vector<Outcome> run_studies(const std::vector<const Study*>& studies,
                                 const StudyContext& context, int threads,
                                 const RunControl& control) {
  std::vector<Outcome> outcomes(studies.size());
  std::vector<std::exception_ptr> errors(studies.size());
  std::vector<std::size_t> parallel, serial;
  for (std::size_t i = 0; i < studies.size(); ++i) {
    const bool model = context.lab && (studies[i]->info.needs_model || studies[i]->info.uses_model);
    (model ? serial : parallel).push_back(i);
  }
  std::atomic<std::size_t> next = 0;
  std::atomic<int> signal = 0;
  std::mutex progress;
  std::int64_t done = 0;
  const auto run = [&](std::size_t i) {
    try {
      outcomes[i] = run_one(*studies[i], context);
    } catch (...) {
      errors[i] = std::current_exception();
    }
    const std::lock_guard lock(progress);
    control.report({"study", ++done, static_cast<std::int64_t>(studies.size()), "studies"});
    if (const int stop = control.stopping()) signal = stop;
  };
  const auto work = [&] {
    for (std::size_t i = next++; i < parallel.size() && signal == 0; i = next++) run(parallel[i]);
  };
  {
    const std::size_t wanted = threads > 0 ? static_cast<std::size_t>(threads)
                                           : std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::jthread> helpers;
    for (std::size_t t = 1; t < std::min(wanted, parallel.size()); ++t) helpers.emplace_back(work);
    work();
  }
  for (const std::size_t i : serial) {
    if (signal != 0) break;
    run(i);
  }
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
  if (signal != 0)
    throw InterruptedError(signal, "study stopped after " + std::to_string(done) + " of " +
                                       std::to_string(studies.size()) + " studies");
  return outcomes;
}

}  // namespace kvplan::studies
