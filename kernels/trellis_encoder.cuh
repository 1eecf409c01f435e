#pragma once
// Nearest code words of a trellis, a vector by a warp: the float operations of quant::Trellis,
// hence its codes. Private to the kernels that pack.

#include "kernels/ptx.cuh"
#include "kernels/views.h"
#include "quant/page_layout.h"
#include "quant/trellis.h"

namespace kvplan::kernels {

inline constexpr int kTrellisReach = quant::kMinTrellisLength;  // steps on each side of the joint
inline constexpr int kBranchSteps = 8;                          // of a word of branches

/// What a warp needs in shared memory for vectors of up to `coordinates`.
struct TrellisScratch {
  float (*costs)[quant::kTrellisStates];         // [2]
  std::uint32_t (*branches)[quant::kWarpLanes];  // [ceil(coordinates / kBranchSteps)]
  std::uint8_t* states;                          // [coordinates]

  KVPLAN_DEVICE TrellisScratch(std::byte* memory, int coordinates) {
    costs = reinterpret_cast<float(*)[quant::kTrellisStates]>(memory);
    branches = reinterpret_cast<std::uint32_t(*)[quant::kWarpLanes]>(costs + 2);
    states = reinterpret_cast<std::uint8_t*>(branches + words(coordinates));
  }
  static constexpr int words(int coordinates) {
    return (coordinates + kBranchSteps - 1) / kBranchSteps;
  }
  static constexpr int bytes(int coordinates) {
    return static_cast<int>(2 * quant::kTrellisStates * sizeof(float)) +
           words(coordinates) * 4 * quant::kWarpLanes + (coordinates + 15) / 16 * 16;
  }
};

/// The trellis of one head: runs[0] .. runs[count - 1], ascending coordinates.
struct TrellisRuns {
  const quant::TileRun* runs;
  int count;
  const float* levels;  // [tables][256]

  KVPLAN_DEVICE const float* values(const quant::TileRun& run) const {
    return levels + run.table * quant::kTrellisStates;
  }
  KVPLAN_DEVICE int begin(int r) const { return runs[r].coordinate - runs[0].coordinate; }
  KVPLAN_DEVICE int end(int r) const {
    return begin(r) + runs[r].tiles * quant::tile_coordinates(runs[r].half != 0);
  }
  KVPLAN_DEVICE int size() const { return end(count - 1); }
};

/// By a warp, as quant::Trellis::encode.
class TrellisEncoder {
 public:
  /// weight: [size()] of squared errors.
  KVPLAN_DEVICE TrellisEncoder(const TrellisRuns& trellis, const float* weight,
                               const TrellisScratch& scratch)
      : trellis_(trellis), weight_(weight), scratch_(scratch) {}

  /// Coordinate i is y[i * stride] * scale. scratch.states: [size()].
  KVPLAN_DEVICE void encode(const float* y, int stride, float scale) {
    y_ = y;
    stride_ = stride;
    scale_ = scale;
    const int n = trellis_.size();
    start(0, -1);
    run(kTrellisReach - 1, kTrellisReach);
    run(n - 1, kTrellisReach);
    const int joint = trace<false>(least_state(), n - kTrellisReach);
    start(INFINITY, joint);
    run(n - 1, n);
    trace<true>(joint, 0);
  }

 private:
  /// All states cost as much but for one, which costs nothing.
  KVPLAN_DEVICE void start(float cost, int free) {
    sync_warp();
    from_ = 0;
    for (int s = lane(); s < quant::kTrellisStates; s += quant::kWarpLanes)
      scratch_.costs[0][s] = s == free ? 0 : cost;
    sync_warp();
  }

  /// Extends the best path into each state by the coordinates first, first - 1, .., first - count +
  /// 1.
  KVPLAN_DEVICE void run(int first, int count) {
    step_ = 0;
    taken_ = 0;
    const int last = first - count + 1;
#pragma unroll 1
    for (int r = trellis_.count - 1; r >= 0; --r) {
      const int begin = trellis_.begin(r), end = trellis_.end(r);
      const int from = end - 1 < first ? end - 1 : first, to = begin > last ? begin : last;
      if (from < to) continue;
      const float* const values = trellis_.values(trellis_.runs[r]);
      switch (trellis_.runs[r].width) {
        case 1:
          advance<1>(values, from, to);
          break;
        case 2:
          advance<2>(values, from, to);
          break;
        case 3:
          advance<3>(values, from, to);
          break;
        default:
          advance<4>(values, from, to);
      }
    }
    if (step_ % kBranchSteps != 0) scratch_.branches[step_ / kBranchSteps][lane()] = taken_;
    sync_warp();
  }

  /// A lane has the joins lane + 32 slot of paths (of 4 bits, two lanes have each) and the 8 states
  /// that they lead to; branches of its joins take 4 bits of a step.
  template <int Width>
  KVPLAN_DEVICE void advance(const float* values, int from, int to) {
    constexpr int kBranches = 1 << Width, kJoins = quant::kTrellisStates >> Width;
    constexpr int kSlots = kJoins < quant::kWarpLanes ? 1 : kJoins / quant::kWarpLanes;
    constexpr int kOwn = 8 / kSlots;  // states behind a join
    const int join = lane() % kJoins, first = lane() / kJoins * kOwn;
    float value[kSlots][kOwn];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
      for (int k = 0; k < kOwn; ++k)
        value[slot][k] = values[((join + quant::kWarpLanes * slot) << Width) + first + k];
#pragma unroll 1
    for (int i = from; i >= to; --i) {
      const float x = y_[i * stride_] * scale_, weight = weight_[i];
      const float* const before = scratch_.costs[from_];
      float* const after = scratch_.costs[from_ ^ 1];
      std::uint32_t branches = 0;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int at = join + quant::kWarpLanes * slot;
        float least = before[at];
        std::uint32_t branch = 0;
#pragma unroll
        for (int b = 1; b < kBranches; ++b) {
          const float cost = before[b * kJoins + at];
          if (cost < least) {
            least = cost;
            branch = static_cast<std::uint32_t>(b);
          }
        }
        branches |= branch << Width * slot;
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const float error = x - value[slot][k];
          after[(at << Width) + first + k] = least + weight * (error * error);
        }
      }
      taken_ |= branches << 4 * (step_ % kBranchSteps);
      if (++step_ % kBranchSteps == 0) {
        scratch_.branches[step_ / kBranchSteps - 1][lane()] = taken_;
        taken_ = 0;
      }
      from_ ^= 1;
      sync_warp();
    }
  }

  /// The cheapest state, of equal ones the lowest.
  KVPLAN_DEVICE int least_state() const {
    const float* const costs = scratch_.costs[from_];
    int state = lane();
    float least = costs[state];
    for (int s = lane() + quant::kWarpLanes; s < quant::kTrellisStates; s += quant::kWarpLanes)
      if (costs[s] < least) least = costs[s], state = s;
    for (int step = 1; step < quant::kWarpLanes; step *= 2) {
      const float other = shuffle_xor(least, step);
      const int other_state = shuffle_xor(state, step);
      if (other < least || (other == least && other_state < state))
        least = other, state = other_state;
    }
    return state;
  }

  /// From the state ahead of coordinate `first` along the last run's best path to the circle's end;
  /// `Store`: all states.
  template <bool Store>
  KVPLAN_DEVICE int trace(int state, int first) {
    const int n = trellis_.size();
#pragma unroll 1
    for (int r = 0; r < trellis_.count; ++r) {
      const int width = trellis_.runs[r].width, end = trellis_.end(r);
      const int begin = trellis_.begin(r) > first ? trellis_.begin(r) : first;
#pragma unroll 1
      for (int i = begin; i < end; ++i) {
        if (Store && lane() == 0) scratch_.states[i] = static_cast<std::uint8_t>(state);
        const int step = n - 1 - i, join = state >> width;
        const std::uint32_t word =
            scratch_.branches[step / kBranchSteps][join % quant::kWarpLanes] >>
            4 * (step % kBranchSteps);
        const int branch =
            static_cast<int>(word >> width * (join / quant::kWarpLanes)) & ((1 << width) - 1);
        state = branch << (8 - width) | join;
      }
    }
    sync_warp();
    return state;
  }

  TrellisRuns trellis_;
  const float* weight_;
  TrellisScratch scratch_;
  const float* y_ = nullptr;
  int stride_ = 0;
  float scale_ = 0;
  int from_ = 0, step_ = 0;
  std::uint32_t taken_ = 0;
};

/// Byte `b` of the stream of the states.
KVPLAN_DEVICE std::uint32_t stream_byte_of(const TrellisRuns& trellis, const std::uint8_t* states,
                                           int b) {
  int r = 0;
  while (r + 1 < trellis.count && trellis.runs[r + 1].bit <= 8 * b) ++r;
  const int width = trellis.runs[r].width, bit = 8 * b - trellis.runs[r].bit;
  const int i = trellis.begin(r) + bit / width, used = bit % width;
  const int next = i + 1 == trellis.size() ? 0 : i + 1;
  return (std::uint32_t{states[i]} >> used | std::uint32_t{states[next]} << (width - used)) & 0xff;
}

}  // namespace kvplan::kernels
