// llama.cpp and three forks: command line, environment and build flags.

#include <algorithm>
#include <map>

#include "exporters/stack_tables.h"
#include "exporters/writers.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

constexpr int kScheduleContext = 8192;  // tokens that buun's bands span

/// Pairs that a CUDA build of mainline has kernels for by default.
constexpr std::string_view kBuiltPairs[] = {"q4_0-q4_0", "q8_0-q8_0", "f16-f16", "bf16-bf16"};

struct Text {
  std::string args = "-fa on", env, build = "-DGGML_CUDA=ON";
};

std::string types(const std::string& k, const std::string& v) {
  return " -ctk " + k + " -ctv " + v;
}

void write_mainline(const Projection& p, bool plan_rotates, Text& text) {
  const std::string &k = p.format(0, Side::kKey).name, &v = p.format(0, Side::kValue).name;
  text.args += types(k, v);
  const std::string pair = k + "-" + v;
  if (std::ranges::find(kBuiltPairs, pair) == std::end(kBuiltPairs)) {
    text.build += "\n-DGGML_CUDA_FA_QUANTS=\"";
    for (const std::string_view built : kBuiltPairs) text.build += std::string(built) + ";";
    text.build += pair + "\"";
  }
  if (!plan_rotates && pair != "f16-f16") text.env = "LLAMA_ATTN_ROT_DISABLE=1\n";
}

void write_ik(const Projection& p, const std::string& rotated, Text& text) {
  const auto name = [&](int format) {
    return p.stack.formats[static_cast<std::size_t>(format)].name;
  };
  const auto& [k, v] = p.segments;
  text.args += types(name(k.base), name(v.base));
  for (const Side side : kSides) {
    const Segments& own = p.segments[static_cast<std::size_t>(side)];
    const std::string flag = std::string(" -ct") + side_name(side);
    if (own.first_count > 0)
      text.args += flag + "-first " + name(own.first) + "," + std::to_string(own.first_count);
    if (own.last_count > 0)
      text.args += flag + "-last " + name(own.last) + "," + std::to_string(own.last_count);
  }
  for (const Side side : kSides) {
    const Segments& own = p.segments[static_cast<std::size_t>(side)];
    const bool plain = p.stack.formats[static_cast<std::size_t>(own.base)].plain();
    if (!plain && rotated.find(side_name(side)) != std::string::npos)
      text.args += std::string(" -") + side_name(side) + "had";
  }
}

void write_thetom(const Projection& p, Text& text) {
  const int mode = p.setting_number;
  // A layer that the mode leaves at the types of the command line.
  const int layer = mode == 1 ? 4 : mode == 5 || mode == 7 ? 2 : 0;
  text.args += types(p.format(layer, Side::kKey).name, p.format(layer, Side::kValue).name);
  text.env = "TURBO_AUTO_ASYMMETRIC=0\nTURBO_LAYER_ADAPTIVE=" + std::to_string(mode) + "\n";
}

/// Default tier: the most frequent one, of equals the narrowest.
int default_tier(const Projection& p) {
  std::map<int, int> counts;
  for (const LayerFormat& layer : p.layers) {
    ++counts[layer.k];
    ++counts[layer.v];
  }
  return std::ranges::max_element(counts, {}, [](const auto& entry) { return entry.second; })
      ->first;
}

std::string write_buun(const Projection& p, Text& text) {
  const auto tier = [&](int format) {
    return std::string(buun_tier(p.stack.formats[static_cast<std::size_t>(format)].name));
  };
  const int base = default_tier(p);
  const std::string type = p.stack.formats[static_cast<std::size_t>(base)].name;
  text.args += types(type, type);
  text.env = "VBR_LAYER_SCHEDULE=@kv.schedule\nVBR_LAYER_STRICT=1\nVBR_SCHEDULE_CTX=" +
             std::to_string(kScheduleContext) + "\nVBR_VMM=0\n";
  std::string schedule = "default=" + tier(base) + ";\n";
  for (std::size_t begin = 0; begin < p.layers.size();) {
    std::size_t end = begin + 1;
    while (end < p.layers.size() && p.layers[end] == p.layers[begin]) ++end;
    const auto band = [&](int format, const char* side) {
      schedule += "band=0-" + std::to_string(kScheduleContext) + ":" + tier(format) + side + ":l" +
                  std::to_string(begin) + "-" + std::to_string(end - 1) + ";\n";
    };
    const LayerFormat& layer = p.layers[begin];
    if (layer.k == layer.v) {
      if (layer.k != base) band(layer.k, "");
    } else {
      if (layer.k != base) band(layer.k, ":k");
      if (layer.v != base) band(layer.v, ":v");
    }
    begin = end;
  }
  return schedule;
}

}  // namespace

std::vector<ExportFile> write_llamacpp(const PlanBundle& bundle, const ExportOptions& options,
                                       Projection& projection) {
  Text text;
  std::vector<ExportFile> files;
  const std::string rotated = rotated_sides(bundle.plan);
  const std::string& dialect = projection.stack.dialect;
  if (dialect == "mainline") {
    write_mainline(projection, !rotated.empty(), text);
  } else if (dialect == "ik") {
    write_ik(projection, rotated, text);
  } else if (dialect == "thetom") {
    write_thetom(projection, text);
  } else {
    files.push_back({"kv.schedule", write_buun(projection, text)});
  }
  if (!options.mean_centre.empty()) {
    if (dialect != "mainline")
      throw ArgumentError(
          "--mean-centre: servers that centre take the types of --dialect "
          "mainline, found " +
          dialect);
    files.push_back({options.mean_centre, mean_centre_gguf(bundle, projection, options.file)});
    text.args += " --kv-mean-center " + options.mean_centre;
  }
  files.push_back({"llama.args", text.args + "\n"});
  files.push_back({"llama.env", text.env});
  files.push_back({"build.txt", text.build + "\n"});
  return files;
}

}  // namespace kvplan::exporters
