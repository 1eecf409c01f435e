#include "quant/baseline_name.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <initializer_list>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kMaxBits = 8;
constexpr int kMaxSketchMultiple = 8;  // rows of a sketch per coordinate

constexpr const char* kForms =
    "fp16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl, nvfp4, mxfp4, fp8_e4m3, fp8_e5m2, kivi:B, "
    "int:B or int:K/V (options gN), polar:B (options edge, a rotation, heads), turboquant:B or "
    "turboquant:K/V (options joined with +: haar|hadamard|rht|rht2|none, heads, "
    "one|nc|biased|unbiased, beta|gauss|uniform, block=N, std, centre, prod|prodkv, "
    "rademacher|orthogonal, m=N|Nd|d/N, split=N|outliers=N); of serving stacks: q6_0, +wht=T after "
    "a "
    "ggml format, fp8_e4m3+tensor, fp8_e4m3+unit, nvfp4+unit, int8_per_token_head, "
    "int4_per_token_head, turboquant_k8v4, turboquant_4bit_nc, turboquant_k3v4_nc, "
    "turboquant_3bit_nc, kvtuner:B (option pertoken), hf:B (option gN), lmdeploy_int8, "
    "lmdeploy_int4, lmdeploy_turbo";

struct FixedCodec {
  std::string_view name;
  int k_bits, v_bits;
  bool stack = false;  // of a serving stack alone
  bool ggml = false;   // takes a Hadamard transform
};
constexpr auto kFixed = std::to_array<FixedCodec>({{"fp16", kFp16Width, kFp16Width},
                                                   {"q8_0", 8, 8, false, true},
                                                   {"q6_0", 6, 6, true, true},
                                                   {"q4_0", 4, 4, false, true},
                                                   {"q4_1", 4, 4, false, true},
                                                   {"q5_0", 5, 5, false, true},
                                                   {"q5_1", 5, 5, false, true},
                                                   {"iq4_nl", 4, 4, false, true},
                                                   {"nvfp4", 4, 4},
                                                   {"mxfp4", 4, 4},
                                                   {"fp8_e4m3", 8, 8},
                                                   {"fp8_e5m2", 8, 8},
                                                   {"int8_per_token_head", 8, 8, true},
                                                   {"int4_per_token_head", 4, 4, true},
                                                   {"turboquant_k8v4", 8, 4, true},
                                                   {"turboquant_4bit_nc", 4, 4, true},
                                                   {"turboquant_k3v4_nc", 3, 4, true},
                                                   {"turboquant_3bit_nc", 3, 3, true},
                                                   {"lmdeploy_int8", 8, 8, true},
                                                   {"lmdeploy_int4", 4, 4, true},
                                                   {"lmdeploy_turbo", 3, 2, true}});

std::optional<int> parse_integer(std::string_view text, int lowest, int highest) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < lowest || value > highest)
    return std::nullopt;
  return value;
}

class Parser {
 public:
  Parser(std::string_view name, int head_dim) : name_(name), head_dim_(head_dim) {}

  BaselineSpec parse() {
    const std::vector<std::string_view> words = split(name_);
    const auto colon = words.front().find(':');
    const std::string_view family = words.front().substr(0, colon);
    const std::string_view bits =
        colon == std::string_view::npos ? std::string_view{} : words.front().substr(colon + 1);
    spec_.codec = std::string(family);
    spec_.group_size = head_dim_;
    const auto fixed = std::ranges::find(kFixed, family, &FixedCodec::name);
    if (fixed != kFixed.end()) {
      if (colon != std::string_view::npos) refuse("it takes no bits");
      spec_.k_bits = fixed->k_bits;
      spec_.v_bits = fixed->v_bits;
      spec_.stack = fixed->stack;
      ggml_ = fixed->ggml;
    } else if (family == "kivi") {
      parse_bits(bits, 1, false);
    } else if (family == "kvtuner" || family == "hf") {
      parse_bits(bits, 1, false);
      spec_.stack = true;
    } else if (family == "int") {
      parse_bits(bits, 2, true);
    } else if (family == "turboquant" || family == "polar") {
      parse_bits(bits, 1, family == "turboquant");
      spec_.codec = "rotated";
      spec_.codebook = "lloyd_max_beta";
      spec_.rotation.kind = "haar";
      if (family == "polar") spec_.code = "polar";
    } else {
      refuse("there is no such codec");
    }
    for (std::size_t i = 1; i < words.size(); ++i)
      if (!take_option(family, words[i]))
        refuse("\"" + std::string(words[i]) + "\" is no option of " + std::string(family));
    finish();
    return spec_;
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const {
    throw ArgumentError("unknown baseline \"" + std::string(name_) + "\": " + reason +
                        "; expected one of " + kForms);
  }

  static std::vector<std::string_view> split(std::string_view text) {
    std::vector<std::string_view> words;
    for (auto plus = text.find('+'); plus != std::string_view::npos; plus = text.find('+')) {
      words.push_back(text.substr(0, plus));
      text.remove_prefix(plus + 1);
    }
    words.push_back(text);
    return words;
  }

  // "3" or, where the sides may differ, "6/3".
  void parse_bits(std::string_view text, int lowest, bool by_side) {
    const auto slash = text.find('/');
    const bool both = slash == std::string_view::npos;
    const auto k = parse_integer(text.substr(0, slash), lowest, kMaxBits);
    const auto v = both ? k : parse_integer(text.substr(slash + 1), lowest, kMaxBits);
    if (!k || !v || (!both && !by_side))
      refuse("expected " + std::to_string(lowest) + " to 8 bits after the colon" +
             (by_side ? ", or those of keys and values as K/V" : ""));
    spec_.k_bits = *k;
    spec_.v_bits = *v;
  }

  // Options of one topic exclude each other.
  void claim(const char* topic) {
    if (!topics_.insert(topic).second) refuse(std::string("it says the ") + topic + " twice");
  }

  bool take_option(std::string_view family, std::string_view option) {
    if (family == "int" || family == "hf") return take_group(option);
    if (family == "kvtuner" && option == "pertoken") {
      claim("scheme");
      spec_.channel_keys = false;
      return true;
    }
    if (ggml_) return take_transform(option);
    if ((family == "nvfp4" && option == "unit") ||
        (family == "fp8_e4m3" && (option == "unit" || option == "tensor"))) {
      claim("scale");
      spec_.scales = option;
      return spec_.stack = true;
    }
    if (family == "polar" && option == "edge") {
      claim("bin's point");
      spec_.code = "polar_edge";
      return true;
    }
    if (spec_.codec != "rotated") return false;
    return take_rotation(option) ||
           (family == "turboquant" &&
            (take_scalar_code(option) || take_sketch(option) || take_outliers(option)));
  }

  bool take_group(std::string_view option) {
    const auto size =
        option.starts_with("g") ? parse_integer(option.substr(1), 1, head_dim_) : std::nullopt;
    if (!size) return false;
    if (head_dim_ % *size != 0)
      refuse("groups must divide the head dimension " + std::to_string(head_dim_));
    claim("group");
    spec_.group_size = *size;
    return true;
  }

  bool take_transform(std::string_view option) {
    if (!option.starts_with("wht=")) return false;
    claim("transform");
    const auto tile = parse_integer(option.substr(4), 2, head_dim_);
    if (!tile || !std::has_single_bit(static_cast<unsigned>(*tile)) || head_dim_ % *tile != 0)
      refuse("a Hadamard transform needs a power of two that divides the head dimension " +
             std::to_string(head_dim_));
    spec_.wht = *tile;
    return spec_.stack = true;
  }

  bool take_rotation(std::string_view option) {
    struct Kind {
      std::string_view name;
      const char* kind;
      int rounds;
    };
    constexpr std::array<Kind, 5> kKinds = {{{"haar", "haar", 1},
                                             {"hadamard", "hadamard", 1},
                                             {"rht", "signed_hadamard", 1},
                                             {"rht2", "signed_hadamard", 2},
                                             {"none", "none", 1}}};
    if (option == "heads") {
      claim("scope");
      spec_.rotation.scope = "head";
      return true;
    }
    const auto found = std::ranges::find(kKinds, option, &Kind::name);
    if (found == kKinds.end()) return false;
    claim("rotation");
    spec_.rotation.kind = found->kind;
    spec_.rotation.rounds = found->rounds;
    return true;
  }

  bool take_scalar_code(std::string_view option) {
    using Names = std::initializer_list<std::pair<std::string_view, const char*>>;
    const auto take = [&](const char* topic, std::string& field, Names names) {
      for (const auto& [name, value] : names)
        if (option == name) {
          claim(topic);
          field = value;
          return true;
        }
      return false;
    };
    if (take("scale rule", spec_.scale_rule,
             {{"one", "one"},
              {"nc", "norm_corrected"},
              {"biased", "biased"},
              {"unbiased", "unbiased"}}) ||
        take("codebook", spec_.codebook,
             {{"beta", "lloyd_max_beta"}, {"gauss", "lloyd_max"}, {"uniform", "uniform"}}))
      return true;
    if (option == "std") {
      claim("norm");
      spec_.norm = "fp16_std";
      return true;
    }
    if (option == "centre") {
      claim("mean");
      spec_.centre = true;
      return true;
    }
    if (!option.starts_with("block=")) return false;
    const auto block = parse_integer(option.substr(6), 1, head_dim_);
    if (!block || head_dim_ % *block != 0)
      refuse("a norm block must divide the head dimension " + std::to_string(head_dim_));
    claim("norm block");
    spec_.variant.norm_block = *block;
    return true;
  }

  bool take_sketch(std::string_view option) {
    if (option == "prod" || option == "prodkv") {
      claim("sketch");
      spec_.variant.sketch_sides = option == "prod" ? "k" : "kv";
      return true;
    }
    if (option == "rademacher" || option == "orthogonal") {
      claim("kind of sketch");
      spec_.variant.sketch = option;
      return true;
    }
    if (!option.starts_with("m=")) return false;
    claim("rows of the sketch");
    spec_.variant.sketch_rows = parse_rows(option.substr(2));
    return true;
  }

  // "256", "d", "2d", "d/2".
  int parse_rows(std::string_view text) const {
    const int most = kMaxSketchMultiple * head_dim_;
    std::optional<int> rows;
    if (text == "d") {
      rows = head_dim_;
    } else if (text.starts_with("d/")) {
      const auto divisor = parse_integer(text.substr(2), 1, head_dim_);
      if (divisor) rows = head_dim_ / *divisor;
    } else if (text.ends_with("d")) {
      const auto factor = parse_integer(text.substr(0, text.size() - 1), 1, kMaxSketchMultiple);
      if (factor) rows = *factor * head_dim_;
    } else {
      rows = parse_integer(text, 1, most);
    }
    if (!rows) refuse("a sketch has 1 to " + std::to_string(most) + " (8d) rows");
    return *rows;
  }

  bool take_outliers(std::string_view option) {
    const bool own_instance = option.starts_with("split=");
    if (!own_instance && !option.starts_with("outliers=")) return false;
    const auto count = parse_integer(option.substr(option.find('=') + 1), 1, head_dim_ - 1);
    if (!count)
      refuse("expected 1 to " + std::to_string(head_dim_ - 1) + " outlier channels of " +
             std::to_string(head_dim_));
    claim("outlier channels");
    spec_.outliers = *count;
    if (!own_instance) return true;
    if (spec_.k_bits != spec_.v_bits || spec_.k_bits == kMaxBits)
      refuse("a split needs one width of 1 to 7 bits for both sides, its outliers take one more");
    spec_.variant.outlier_code = "rotated";
    spec_.variant.outlier_bits = spec_.k_bits + 1;
    return true;
  }

  void finish() {
    const bool sketched = topics_.contains("sketch");
    if (!sketched && (topics_.contains("kind of sketch") || topics_.contains("rows of the sketch")))
      refuse("rows of a sketch need prod or prodkv");
    if (!sketched) return;
    if (spec_.variant.sketch == "none") spec_.variant.sketch = "gaussian";
    if (spec_.variant.sketch_rows == 0) spec_.variant.sketch_rows = head_dim_;
  }

  std::string_view name_;
  int head_dim_;
  bool ggml_ = false;
  BaselineSpec spec_;
  std::set<std::string> topics_;
};

}  // namespace

BaselineSpec parse_baseline(std::string_view name, int head_dim) {
  return Parser(name, head_dim).parse();
}

}  // namespace kvplan::quant
