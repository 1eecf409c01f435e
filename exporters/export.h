#pragma once
// A plan as the files that a serving stack loads. Nothing is written here: files come back as named
// buffers.

#include <filesystem>
#include <string>
#include <vector>

#include "exporters/projection.h"

namespace kvplan::exporters {

struct ExportOptions {
  StackOptions stack = {};
  std::string target_version = {};  // empty: the one that the tables hold for
  bool allow_lower = false;
  bool per_head = false;             // kv-scales: scales per KV head; kvtuner: widths per KV head
  int tensor_parallel = 1;           // sglang: ranks
  std::filesystem::path model = {};  // original Hugging Face folder, for scales in the checkpoint
  std::string mean_centre = {};    // llamacpp: name of the GGUF with the centres of K; empty: none
  std::string file = "plan.json";  // names the plan in messages
};

struct ExportFile {
  std::string name;
  std::string bytes;
};

struct Export {
  Projection projection;
  std::vector<ExportFile> files;  // without loss-report.json and manifest.json
};

/// ArgumentError: unknown target or option. InputError: the stack cannot hold the plan, or a file
/// of the model is missing or broken.
Export export_plan(std::string_view target, const PlanBundle& bundle,
                   const ExportOptions& options = {});

/// manifest.json: what the files were made from. `command` is the command line.
std::string manifest_json(const Export& result, const PlanBundle& bundle,
                          const std::string& program, const std::string& command);

}  // namespace kvplan::exporters
