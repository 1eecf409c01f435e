// Uses one thing of each installed library: reads a plan, packs a vector with its codec, allocates.

#include <cstdio>
#include <vector>

#include "planner/allocator.h"
#include "quant/codec.h"
#include "schemas/error.h"
#include "schemas/plan.h"

int main(int argc, char** argv) try {
  if (argc != 2) return 2;
  const kvplan::PlanBundle bundle = kvplan::read_plan(argv[1]);
  const auto codec = kvplan::quant::make_codec(bundle, 0, kvplan::Side::kKey);
  const kvplan::ModelSpec& model = bundle.plan.model;
  const kvplan::quant::KvShape shape{1, model.kv_heads, model.head_dim};
  const std::vector<float> x(static_cast<std::size_t>(shape.elements()), 0.5f);
  std::vector<std::byte> codes(codec->packed_bytes(shape));
  codec->encode(shape, 4, x, codes);

  kvplan::CostTable table;
  table.units.resize(1);
  table.units[0].choices = {{0, 0, 1.0}, {1, 8, 0.25}};
  const auto best = kvplan::planner::allocate(table, 8);
  std::printf("%zu bytes, cost %g\n", codes.size(), best.cost);
  return best.choice[0] == 1 ? 0 : 1;
} catch (const kvplan::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 3;
}
