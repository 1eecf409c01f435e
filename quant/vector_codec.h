#pragma once
// Codecs whose heads are coded vector by vector, each by one or more vector codes over its
// channels. The plain reference beside transform_codec.h, for all that it cannot express. Private
// to quant.

#include <memory>
#include <optional>
#include <vector>

#include "quant/codec_checks.h"
#include "quant/rotary_mean.h"
#include "quant/vector_code.h"

namespace kvplan::quant {

/// Part of a head: `code` over `channels`, ascending.
struct CodedChannels {
  std::vector<int> channels;
  std::shared_ptr<const VectorCode> code;  // of channels.size() values
};

/// Bytes in the order of the parts, then those of the sketch.
struct VectorHead {
  std::vector<CodedChannels> parts;          // disjoint; channels in none read 0
  std::shared_ptr<const VectorCode> sketch;  // of what the parts leave of the vector; may be null
};

struct VectorCodecSpec {
  HeadGeometry geometry;
  std::vector<VectorHead> heads;
  std::optional<RotaryMean> mean;  // subtracted before, added after
};

std::unique_ptr<Codec> make_vector_codec(VectorCodecSpec spec);

}  // namespace kvplan::quant
