#pragma once
// Gates: conditions on a plan's measured figures, for continuous integration
// ("kl<=.05,ppl_rise<=.03").

#include <string>
#include <string_view>
#include <vector>

#include "schemas/validation.h"

namespace kvplan::evaluation {

struct Gate {
  std::string expression;  // as given
  std::string metric;      // kl kl_p95 kl_p99 kl_max kl_cvar95 ppl ppl_rise same_top1 bits
  bool at_most = true;     // <= or >=
  double bound = 0;
};

/// Parses a comma-separated list. ArgumentError names the metrics and operators that exist.
std::vector<Gate> parse_gates(std::string_view text);

/// One result per gate and mode of candidate `name`; the worst mode counts.
std::vector<GateResult> apply_gates(const std::vector<Gate>& gates, const Validation& validation,
                                    const std::string& name);

}  // namespace kvplan::evaluation
