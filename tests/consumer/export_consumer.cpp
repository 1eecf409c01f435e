// Uses the installed exporters: a plan as the files of a serving stack.

#include <cstdio>

#include "exporters/export.h"
#include "schemas/error.h"
#include "schemas/plan.h"

int main(int argc, char** argv) try {
  if (argc != 3) return 2;
  const kvplan::PlanBundle bundle = kvplan::read_plan(argv[2]);
  const auto result = kvplan::exporters::export_plan(argv[1], bundle, {});
  for (const auto& file : result.files)
    std::printf("%s: %zu bytes\n", file.name.c_str(), file.bytes.size());
  return result.files.empty() ? 1 : 0;
} catch (const kvplan::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 3;
}
