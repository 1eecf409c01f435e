#pragma once
// Random vectors for studies, and what a codec does to them. Everything here is one thread and
// depends on the seeds alone.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "quant/codec.h"
#include "quant/random.h"
#include "schemas/types.h"
#include "studies/study.h"

namespace kvplan::studies {

inline double square(double x) { return x * x; }

/// The draws of a study; `id` has at most four characters. Studies, draws and parts never share a
/// stream.
quant::RandomStream study_stream(const StudyContext& context, std::string_view id,
                                 std::uint32_t draw = 0, std::uint32_t part = 0);

// Rows of n vectors [n,d].
Array<float> gaussian_vectors(std::int64_t n, int d, quant::RandomStream& random);
/// Uniform on the sphere.
Array<float> unit_vectors(std::int64_t n, int d, quant::RandomStream& random);
/// Independent coordinates of Student's t distribution with an integer number of degrees of
/// freedom.
Array<float> student_t_vectors(std::int64_t n, int d, int degrees, quant::RandomStream& random);
/// Multiplies the first `channels` channels of every row.
void scale_channels(Array<float>& x, int channels, float factor);

/// Sums in double, in the order of the elements.
double dot(std::span<const float> a, std::span<const float> b);
double squared_norm(std::span<const float> x);
double squared_distance(std::span<const float> a, std::span<const float> b);

/// Mean over the rows of |x - x_hat|^2 / |x|^2.
double relative_error(const Array<float>& x, const Array<float>& x_hat);

/// A model with one layer and one KV head of `head_dim` and no rotary embedding: what the codecs of
/// studies are made for.
ModelSpec one_head_model(int head_dim);
/// Codec of a baseline (quant/baselines.h) for that model; `seed` is that of its rotation.
std::unique_ptr<quant::Codec> baseline_codec(const std::string& name, int head_dim,
                                             std::uint64_t seed = 0, Side side = Side::kKey);
/// decode(encode(x)) of rows [n,d] as n tokens of one head.
Array<float> stored(const quant::Codec& codec, const Array<float>& x);
/// relative_error of a baseline.
double baseline_error(const std::string& name, const Array<float>& x, std::uint64_t seed = 0);

/// A number for a table or note, with `digits` significant digits ("0.03397").
std::string figure(double value, int digits = 4);
/// "WHAT at 3 bits", the name of a check.
std::string at_width(const std::string& what, int bits);

}  // namespace kvplan::studies
