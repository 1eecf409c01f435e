// Writes the seeds of every fuzz target: fuzz_corpus FOLDER makes FOLDER/TARGET/seed-NAME.
// The seeds in tests/fuzz/corpus are its output (scripts/fuzz --seeds).

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quant/codebook.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/safetensors.h"
#include "tests/fuzz/input_folder.h"
#include "tests/fuzz/targets.h"
#include "tests/quant/page_fixtures.h"
#include "tests/quant/synthetic_profile.h"
#include "tests/schemas/gguf_builder.h"

namespace {

using namespace kvplan;
using nlohmann::json;
namespace fs = std::filesystem;

fs::path corpus;

void write_seed(const std::string& target, const std::string& name, const std::string& bytes) {
  fs::create_directories(corpus / target);
  std::ofstream(corpus / target / ("seed-" + name), std::ios::binary) << bytes;
}

std::string text_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// ---- containers of models ----

std::string array_of(std::uint32_t type, const std::vector<std::string>& values) {
  GgufBytes out;
  out.raw(std::uint32_t{9}).raw(type).raw(std::uint64_t{values.size()});
  for (const auto& value : values) out.append(value);
  return out.bytes();
}

template <class T>
std::string bytes_of(T value) {
  return GgufBytes().raw(value).bytes();
}

std::string strings(const std::vector<std::string>& texts) {
  std::vector<std::string> values;
  for (const auto& text : texts) values.push_back(GgufBytes().text(text).bytes());
  return array_of(8, values);
}

template <class T>
std::string numbers(std::uint32_t type, const std::vector<T>& from) {
  std::vector<std::string> values;
  for (const T value : from) values.push_back(bytes_of(value));
  return array_of(type, values);
}

/// One layer of four channels in each of two query heads.
GgufBuilder small_llama() {
  constexpr std::uint64_t kHidden = 8;
  GgufBuilder b;
  b.set("general.architecture", GgufBuilder::text("llama"));
  b.set("llama.block_count", GgufBuilder::u32(1));
  b.set("llama.context_length", GgufBuilder::u32(64));
  b.set("llama.embedding_length", GgufBuilder::u32(kHidden));
  b.set("llama.feed_forward_length", GgufBuilder::u32(8));
  b.set("llama.attention.head_count", GgufBuilder::u32(2));
  b.set("llama.attention.head_count_kv", GgufBuilder::u32(1));
  b.set("llama.attention.layer_norm_rms_epsilon", GgufBuilder::f32(1e-5f));
  const auto add = [&](const std::string& name, std::vector<std::uint64_t> dimensions) {
    std::uint64_t bytes = 4;
    for (const auto n : dimensions) bytes *= n;
    b.tensors.push_back(
        {.name = name, .dimensions = std::move(dimensions), .data = std::string(bytes, '\0')});
  };
  add("token_embd.weight", {kHidden, 8});
  add("output_norm.weight", {kHidden});
  for (const char* name : {"attn_norm", "ffn_norm"})
    add("blk.0." + std::string(name) + ".weight", {kHidden});
  for (const char* name : {"attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
    add("blk.0." + std::string(name) + ".weight", {kHidden, 8});
  for (const char* name : {"attn_k", "attn_v"})
    add("blk.0." + std::string(name) + ".weight", {kHidden, 4});
  return b;
}

void gguf_seeds() {
  GgufBuilder model = small_llama();
  write_seed("gguf", "llama", model.bytes());

  GgufBuilder bpe;
  bpe.set("tokenizer.ggml.model", GgufBuilder::text("gpt2"));
  bpe.set("tokenizer.ggml.pre", GgufBuilder::text("llama-bpe"));
  bpe.set("tokenizer.ggml.tokens",
          strings({"H", "e", "l", "o", "ll", "He", "\xc4\xa0", "1", "<s>", "</s>"}));
  bpe.set("tokenizer.ggml.token_type", numbers<std::int32_t>(5, {1, 1, 1, 1, 1, 1, 1, 1, 3, 3}));
  bpe.set("tokenizer.ggml.merges", strings({"l l", "H e"}));
  bpe.set("tokenizer.ggml.unknown_token_id", GgufBuilder::u32(8));
  write_seed("gguf", "byte-level-bpe", bpe.bytes());

  GgufBuilder spm;
  spm.set("tokenizer.ggml.model", GgufBuilder::text("llama"));
  spm.set("tokenizer.ggml.tokens",
          strings({"<unk>", "<s>", "</s>", "<0x0A>", "\xe2\x96\x81", "l", "ll", "\xe2\x96\x81l"}));
  spm.set("tokenizer.ggml.token_type", numbers<std::int32_t>(5, {2, 3, 3, 6, 1, 1, 1, 1}));
  spm.set("tokenizer.ggml.scores", numbers<float>(6, {0, 0, 0, 0, -1, -2, -1.5f, -1.25f}));
  spm.set("tokenizer.ggml.unknown_token_id", GgufBuilder::u32(0));
  write_seed("gguf", "sentencepiece", spm.bytes());

  GgufBuilder every;
  every.set("a.u64", GgufBytes().raw(std::uint32_t{10}).raw(~std::uint64_t{0}).bytes());
  every.set("a.f64", GgufBytes().raw(std::uint32_t{12}).raw(0.5).bytes());
  every.set("a.bool", GgufBuilder::boolean(1));
  every.set("a.i16s", numbers<std::int16_t>(3, {-1, 2}));
  every.set("general.alignment", GgufBuilder::u32(8));
  every.alignment = 8;
  every.tensors = {{.name = "q8_0", .dimensions = {32}, .type = 8, .data = std::string(34, 'x')},
                   {.name = "none", .dimensions = {3, 1}, .type = 99, .data = "abc"}};
  write_seed("gguf", "types", every.bytes());
}

void safetensors_seeds() {
  SafetensorsWriter writer;
  Array<float> matrix({2, 3}, 0.5f);
  writer.add("f32", std::move(matrix));
  writer.add("f64", Array<double>({1}, 1.0));
  writer.add("i64", Array<std::int64_t>({2, 1}, 7));
  writer.add("none", Array<float>(std::vector<std::int64_t>{0, 4}));
  const auto bytes = writer.bytes();
  write_seed("safetensors", "types", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  std::string text =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BOOL","shape":[],"data_offsets":[0,1]}})";
  const std::uint64_t length = text.size();
  write_seed("safetensors", "metadata",
             std::string(reinterpret_cast<const char*>(&length), 8) + text + '\x01');
}

json added(int id, const char* content, bool normalized) {
  return {{"id", id},        {"content", content},       {"special", true},     {"lstrip", true},
          {"rstrip", false}, {"normalized", normalized}, {"single_word", false}};
}

void tokenizer_seeds() {
  const json bpe = {
      {"added_tokens", {added(8, "<s>", false), added(9, "<|im_end|>", true)}},
      {"normalizer",
       {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}, {{"type", "Strip"}}}}}},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", true}},
          {{"type", "Split"},
           {"pattern", {{"Regex", R"(\s+(?!\S)|\p{L}+)"}}},
           {"behavior", "Isolated"},
           {"invert", false}},
          {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", true}}}}}},
      {"model",
       {{"type", "BPE"},
        {"vocab", {{"H", 0}, {"e", 1}, {"l", 2}, {"o", 3}, {"ll", 4}, {"He", 5}, {"\u0120", 6}}},
        {"merges", {"l l", json::array({"H", "e"})}}}}};
  write_seed("tokenizer_json", "byte-level-bpe", bpe.dump());

  const json metaspace = {
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers",
         {{{"type", "Prepend"}, {"prepend", "\u2581"}},
          {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}},
          {{"type", "NFKD"}},
          {{"type", "StripAccents"}},
          {{"type", "Lowercase"}}}}}},
      {"model",
       {{"type", "BPE"},
        {"byte_fallback", true},
        {"fuse_unk", true},
        {"unk_token", "<unk>"},
        {"vocab", {{"<unk>", 0}, {"<0x0A>", 1}, {"l", 2}, {"\u2581", 3}, {"\u2581l", 4}}},
        {"merges", {"\u2581 l"}}}}};
  write_seed("tokenizer_json", "sentencepiece-bpe", metaspace.dump());

  const json unigram = {
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "WhitespaceSplit"}},
          {{"type", "Punctuation"}, {"behavior", "Removed"}},
          {{"type", "Metaspace"},
           {"replacement", "\u2581"},
           {"prepend_scheme", "always"},
           {"split", true}}}}}},
      {"model",
       {{"type", "Unigram"},
        {"unk_id", 0},
        {"vocab", json::array({json::array({"<unk>", 0.0}), json::array({"\u2581", -2.0}),
                               json::array({"l", -3.0}), json::array({"ll", -4.5}),
                               json::array({"\u2581He", -5.0})})}}}};
  write_seed("tokenizer_json", "unigram", unigram.dump());
}

// ---- documents ----

void write_pair_seed(const std::string& target, const std::string& name, const fs::path& folder) {
  json document = json::parse(text_of(folder / (target + ".json")));
  document["tensors"]["sha256"] = fuzz::kSha256Mark;
  write_seed(target, name, document.dump() + '\0' + text_of(folder / (target + ".safetensors")));
}

void profile_seeds() {
  const fuzz::InputFolder folder;
  quant::testing::SyntheticSpec spec;
  spec.layers = spec.kv_heads = 1;
  spec.head_dim = spec.rotary_dim = 8;
  spec.windows = 2;
  spec.window = 16;
  Profile profile = quant::testing::synthetic_profile(spec);
  profile.sources = {{"text", std::string(64, 'b'), 100, 0, 0.5, 1}};
  profile.program = "seed";
  write_profile(profile, folder.path() / "half");
  write_pair_seed("profile", "half-rotary", folder.path() / "half");

  spec.rotary_dim = 4;
  spec.windows = 1;
  spec.head_dim = 4;
  profile = quant::testing::synthetic_profile(spec);
  profile.sources = {{"text", std::string(64, 'b'), 100, 0, 0.5, 1}};
  profile.model.rope.scaling = RopeScaling{"llama3", 8, 1, 4, 8192};
  profile.summary.resize(1);
  profile.summary[0].outlier_channels_k = {3};
  write_profile(profile, folder.path() / "summary");
  write_pair_seed("profile", "summary", folder.path() / "summary");
}

/// Of one layer, so that a seed stays small.
PlanBundle first_layer(PlanBundle bundle) {
  bundle.plan.model.num_layers = 1;
  bundle.plan.layers.resize(1);
  if (!bundle.tensors.layers.empty()) bundle.tensors.layers.resize(1);
  return bundle;
}

void plan_seeds() {
  const fuzz::InputFolder folder;
  const auto add = [&](const std::string& name, PlanBundle bundle) {
    bundle.plan.provenance.program = "seed";
    write_plan(first_layer(std::move(bundle)), folder.path() / name);
    write_pair_seed("plan", name, folder.path() / name);
  };
  PlanBundle calibrated = quant::testing::calibrated_plan(16, 8, {{4, 2}}, {{3, 0}});
  calibrated.plan.codebooks = {{2, "uniform"}, {3, "lloyd_max"}, {4, "lloyd_max"}};
  calibrated.plan.front = {{3, 0.1}};
  std::erase_if(calibrated.tensors.levels,
                [](const auto& l) { return l.first < 2 || l.first > 4; });
  add("calibrated", calibrated);
  const auto small = quant::testing::paged_model(1, 16);
  for (const char* name :
       {"turboquant:2", "turboquant:2+prod", "turboquant:3+rht", "int:4+g8", "fp16"}) {
    std::string file = name;
    for (char& c : file) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '-';
    add(file, quant::testing::baseline(name, small));
  }
  for (const char* name : {"q8_0", "kivi:2", "nvfp4"}) {
    std::string file = name;
    for (char& c : file) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '-';
    add(file, quant::testing::baseline(name, quant::testing::paged_model(1, 32)));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: fuzz_corpus FOLDER\n";
    return 2;
  }
  corpus = argv[1];
  gguf_seeds();
  safetensors_seeds();
  tokenizer_seeds();
  profile_seeds();
  plan_seeds();
}
