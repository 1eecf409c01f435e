#pragma once
// A plan on a stack: which format every layer gets, how many bytes that takes, what of the plan is
// lost.

#include <array>
#include <string>
#include <vector>

#include "exporters/choose.h"
#include "exporters/loss_report.h"
#include "exporters/stack.h"
#include "schemas/plan.h"

namespace kvplan::exporters {

struct ProjectionOptions {
  bool allow_lower = false;        // widths below the plan's, within its bytes if they can be held
  bool mean_centre = false;        // llamacpp: the centres of K are written out
  bool head_widths = false;        // kvtuner: a width per KV head
  std::string file = "plan.json";  // names the plan in messages
};

struct Projection {
  Stack stack;
  CacheShape shape;
  std::vector<LayerFormat> layers;  // index into stack.formats
  std::string setting;              // stack-wide choice, as in Setting
  int setting_number = 0;
  std::vector<int> forced16;                           // as in Setting
  std::array<Segments, 2> segments = {};               // where the stack has them
  std::vector<std::array<std::vector<int>, 2>> heads;  // [layer][side][KV head], index into
                                                       // stack.formats; empty: one for all heads
  std::vector<std::array<StackRotation, 2>> rotation;  // [layer][side]
  LossReport report;

  const LayerFormat& at(int layer) const { return layers.at(static_cast<std::size_t>(layer)); }
  bool cached(int layer) const { return shape.layers.at(static_cast<std::size_t>(layer)).cached(); }
  const Format& format(int layer, Side side) const { return stack.format(at(layer), side); }
  /// Mean width of the heads.
  double width(int layer, Side side) const;
  /// The published codec (docs/baselines.md) that does what the stack does to this side, "+wht=T"
  /// where llama.cpp rotates; "fp16" for a side that stays plain; empty where quant has none.
  std::string codec(int layer, Side side) const;
};

/// Mean payload bits per element of a side, over heads, groups and outliers, rounded up; 16: plain.
int wanted_width(const SidePlan& side);

/// "", "k", "v" or "kv": the sides that the plan rotates. Those of calibrated plans count: a
/// stack's own rotation stands in for their transforms.
std::string rotated_sides(const Plan& plan);

/// Throws InputError naming layer, field and remedy when the stack cannot hold the plan.
Projection project(const PlanBundle& bundle, const Stack& stack,
                   const ProjectionOptions& options = {});

/// The projection of an assignment that somebody else chose (`plan --for`).
Projection project_onto(const PlanBundle& bundle, const Stack& stack, const Assignment& assignment,
                        const ProjectionOptions& options = {});

/// A plan that says what the stack does under a projection: widths of the formats, a codec for each
/// quantised side (SidePlan::codec), no sinks, and what of `bundle` still holds (model, context,
/// absmax, provenance). policy "export:STACK". InputError where quant has no such codec.
PlanBundle as_plan(const Projection& projection, const PlanBundle& bundle);

}  // namespace kvplan::exporters
