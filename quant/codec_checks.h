#pragma once
// Checks that every codec makes on its arguments. Private to quant.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "quant/codec.h"

namespace kvplan::quant {

/// ArgumentError for other heads or head_dim, or a token count or position outside 0..2^30.
void require_shape(const HeadGeometry& geometry, const KvShape& shape,
                   std::int64_t first_position = 0);

/// The above, and buffers of shape.elements() values and `packed_bytes` bytes.
void require_buffers(const HeadGeometry& geometry, const KvShape& shape,
                     std::int64_t first_position, std::size_t values, std::size_t bytes,
                     std::size_t packed_bytes);

/// x rounded to fp16. ArgumentError names token, head and channel of a value that is not finite in
/// fp16.
std::vector<float> rounded_to_half(const KvShape& shape, std::span<const float> x);

void store_half(std::byte* to, float value);
float load_half(const std::byte* from);

/// InputError about plan.json unless the plan has this layer and one HeadPlan per KV head.
const SidePlan& side_plan(const PlanBundle& bundle, int layer, Side side);

/// "/layers/3/k", the JSON pointer for messages.
std::string side_pointer(int layer, Side side);

/// "layers.3.k.mean", a tensor name for messages.
std::string tensor_name(int layer, Side side, const char* name);

// Factories of the codec families; `make_codec` picks one.
std::unique_ptr<Codec> make_calibrated_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_rotated_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_block_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_int_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_float_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_kivi_codec(const PlanBundle& bundle, int layer, Side side);
std::unique_ptr<Codec> make_fp16_codec(const PlanBundle& bundle, int layer, Side side);
/// The side's own codec, SidePlan::codec.
std::unique_ptr<Codec> make_side_codec(const PlanBundle& bundle, int layer, Side side);

/// "q4_0" and its relatives. exact_input: take values as they are instead of rounding them to fp16.
std::unique_ptr<Codec> make_ggml_codec(const std::string& format, HeadGeometry geometry,
                                       bool exact_input = false);
/// KVTuner's integers in groups of 32, with a whole zero point; keys by channel over tokens, or by
/// token as values.
std::unique_ptr<Codec> make_kvtuner_codec(HeadGeometry geometry, int bits, bool by_channel);

}  // namespace kvplan::quant
