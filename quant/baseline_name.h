#pragma once
// The names of published codecs, such as "q4_0", "int:4+g32" or "turboquant:3+rht2+nc+gauss"
// (docs/baselines.md). Private to quant.

#include <string>
#include <string_view>

#include "schemas/plan.h"

namespace kvplan::quant {

/// What a name says, for heads of one dimension.
struct BaselineSpec {
  std::string codec, code = "scalar";
  int k_bits = 0, v_bits = 0;
  int group_size = 0;    // coordinates per scale; head_dim unless the name says
  std::string codebook;  // empty: the codec has none
  std::string scale_rule = "one", norm = "fp16";
  bool centre = false;    // needs a profile
  int outliers = 0;       // channels per head that a profile picks
  RotationSpec rotation;  // seed 0
  RotatedVariant variant;
  // What serving stacks do; a side says it by its own name (SidePlan::codec).
  bool stack = false;           // a plan cannot say it otherwise
  int wht = 0;                  // coordinates that an unsigned Hadamard transform mixes first
  std::string scales = "head";  // static scales of small floats: head | tensor | unit
  bool channel_keys = true;     // kvtuner: keys by channel over tokens; else as values
  bool ggml() const { return codec.starts_with("q") || codec == "iq4_nl"; }
  int bits(Side side) const { return side == Side::kKey ? k_bits : v_bits; }
};

/// ArgumentError quotes the part that is wrong and lists the accepted forms.
BaselineSpec parse_baseline(std::string_view name, int head_dim);

}  // namespace kvplan::quant
