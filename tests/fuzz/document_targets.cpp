// profile and plan: our own documents with their tensors, and everything that takes them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "quant/cache_size.h"
#include "quant/codec.h"
#include "quant/fit.h"
#include "quant/kv_cache.h"
#include "schemas/error.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/sha256.h"
#include "tests/fuzz/input_folder.h"
#include "tests/fuzz/targets.h"

namespace kvplan::fuzz {
namespace {

// A plan may describe a cache that is larger than what one input should cost.
constexpr std::int64_t kMaxElements = 1 << 14;    // of a layer's vectors that are coded
constexpr std::size_t kMaxCacheBytes = 16 << 20;  // of a reference cache
constexpr int kMaxFitDim = 32;
constexpr std::int64_t kCodedTokens = 3;

/// The document and its tensors as files of the folder.
void write_pair(const InputFolder& folder, std::span<const char> input, const std::string& stem) {
  const auto end = std::find(input.begin(), input.end(), '\0');
  std::string document(input.begin(), end);
  const std::string tensors(end == input.end() ? end : end + 1, input.end());
  const auto mark = document.find(kSha256Mark);
  if (mark != std::string::npos)
    document.replace(mark, std::strlen(kSha256Mark), sha256(std::string_view(tensors)));
  folder.write((stem + ".json").c_str(), document);
  folder.write((stem + ".safetensors").c_str(), tensors);
}

std::string text_of(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void require(bool property, const char* what) {
  if (!property) throw std::logic_error(what);
}

/// Vectors that differ in size and sign between channels.
std::vector<float> some_vectors(const quant::KvShape& shape) {
  std::vector<float> x(static_cast<std::size_t>(shape.elements()));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = (static_cast<float>(i * 37 % 101) - 50) / 16;
  return x;
}

void use_codecs(const PlanBundle& bundle) {
  const ModelSpec& model = bundle.plan.model;
  const quant::KvShape shape{kCodedTokens, model.kv_heads, model.head_dim};
  if (shape.elements() > kMaxElements) return;
  const auto x = some_vectors(shape);
  for (int layer = 0; layer < std::min(model.num_layers, 2); ++layer) {
    for (const Side side : kSides) {
      const auto codec = quant::make_codec(bundle, layer, side);
      std::vector<std::byte> codes(codec->packed_bytes(shape));
      std::vector<float> back(x.size());
      codec->encode(shape, 4, x, codes);
      codec->decode(shape, 4, codes, back);
      // Codes that no encoder wrote decode to something, too.
      std::ranges::fill(codes, std::byte{0xff});
      codec->decode(shape, 4, codes, back);
    }
  }
}

void use_cache(const PlanBundle& bundle) {
  quant::CacheGeometry geometry;
  geometry.query_heads = bundle.plan.model.query_heads;
  geometry.max_tokens = 128;
  const auto size = quant::cache_size(bundle, geometry);
  if (size.total() > kMaxCacheBytes || bundle.plan.sink_tokens > 64) return;
  const auto cache = quant::make_reference_cache(bundle, geometry);
  const int tokens = 70;
  const quant::SequenceStep step{0, tokens};
  cache->begin_step({&step, 1});
  const ModelSpec& model = bundle.plan.model;
  const std::vector<std::uint16_t> kv(
      static_cast<std::size_t>(tokens) * model.kv_heads * model.head_dim, 0x3c00);
  cache->append(0, kv, kv);
  std::vector<float> back(kv.size());
  cache->read_back(0, Side::kKey, 0, 0, tokens, back);
}

/// Refusals of what a plan or profile asks for are typed; all else is a finding.
template <class Use>
void tolerate_refusal(const Use& use) {
  try {
    use();
  } catch (const InputError&) {
  } catch (const ArgumentError&) {
  } catch (const MemoryError&) {
  }
}

}  // namespace

bool profile(std::span<const char> input) {
  static const InputFolder kFolder;
  write_pair(kFolder, input, "profile");
  Profile read;
  try {
    read = read_profile(kFolder.path());
  } catch (const InputError&) {
    return false;
  }
  const auto copy = kFolder.path() / "copy";
  write_profile(read, copy);
  const std::string once = text_of(copy / "profile.json");
  write_profile(read_profile(copy), copy);
  require(once == text_of(copy / "profile.json"), "writing what was read changes the profile");

  const std::vector<double> weights = {2};
  const std::vector<std::string> names = {"a"};
  tolerate_refusal([&] { merge_profiles({&read, 1}, weights, names); });
  if (read.model.head_dim <= kMaxFitDim && read.model.num_layers * read.model.kv_heads <= 4) {
    tolerate_refusal([&] {
      quant::FitOptions options = quant::default_fit_options("calibrated");
      options.group_size = 8;
      quant::Fit(read, options).costs();
    });
  }
  return true;
}

bool plan(std::span<const char> input) {
  static const InputFolder kFolder;
  write_pair(kFolder, input, "plan");
  PlanBundle read;
  try {
    read = read_plan(kFolder.path());
  } catch (const InputError&) {
    return false;
  }
  const auto copy = kFolder.path() / "copy";
  write_plan(read, copy, true);
  const PlanBundle again = read_plan(copy / "plan.json");
  require(plan_json(again) == text_of(copy / "plan.json"),
          "writing what was read changes the plan");
  tolerate_refusal([&] { use_codecs(read); });
  tolerate_refusal([&] { use_cache(read); });
  return true;
}

}  // namespace kvplan::fuzz
