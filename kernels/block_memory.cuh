#pragma once
// The shared memory of a block of the decode kernel (SharedMap). Private to the decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/round.h"
#include "kernels/scores.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

KVPLAN_DEVICE int warps_of_block() { return threads() / quant::kWarpLanes; }

template <int Blocks>
struct BlockMemory {
  static constexpr int kColumnsKept = 4 * Blocks;  // of a piece
  const SharedMap& map;
  int stride;  // floats of a row of products

  KVPLAN_DEVICE explicit BlockMemory(const AttentionView& v)
      : map(v.layer.shared),
        stride(ResultMemory(v.layer.head_dim, kColumnsKept, 1, false).stride) {}

  KVPLAN_DEVICE Round& round() const { return *at<Round>(map.round); }

  KVPLAN_DEVICE uint2* query(int piece) const { return of_piece<uint2>(piece, map.query_offset); }
  KVPLAN_DEVICE ColumnTerms* terms(int piece) const {
    return of_piece<ColumnTerms>(piece, map.terms_offset);
  }
  KVPLAN_DEVICE RunEntry* runs(int piece) const {
    return of_piece<RunEntry>(piece, map.runs_offset);
  }
  KVPLAN_DEVICE float2* centre(int piece) const {
    return of_piece<float2>(piece, map.centre_offset);
  }
  /// [coordinates] of a column: queries in the transformed domain, before the warps have outputs.
  KVPLAN_DEVICE float* product(int piece, int column) const {
    return at<float>(map.outputs) + (piece * kColumnsKept + column) * stride;
  }

  /// [tiles of 16 coordinates] of a column: largest number times step, sum of bias.
  KVPLAN_DEVICE float2* measures(int piece, int column) const {
    return at<float2>(map.measures) + (piece * kColumnsKept + column) * (stride / 16);
  }

  KVPLAN_DEVICE WarpState& state(int warp) const {
    return *of_warp<WarpState>(warp, map.state_offset);
  }
  KVPLAN_DEVICE PageList* list(int warp) const { return of_warp<PageList>(warp, map.list_offset); }
  KVPLAN_DEVICE std::byte* mixed(int warp) const {
    return of_warp<std::byte>(warp, map.mixed_offset);
  }
  KVPLAN_DEVICE std::uint32_t barriers(int warp) const {
    return address(map.warps + warp * map.warp_bytes + map.barriers_offset);
  }
  KVPLAN_DEVICE std::uint32_t feed(int warp) const {
    return address(map.feeds + warp * map.feed_bytes);
  }
  KVPLAN_DEVICE Output<Blocks>* output(int warp) const {
    return at<Output<Blocks>>(map.outputs + warp * map.output_bytes);
  }

  template <class T>
  KVPLAN_DEVICE T* at(int window_address) const {
    return reinterpret_cast<T*>(shared_memory() + (window_address - static_cast<int>(kSharedBase)));
  }

 private:
  template <class T>
  KVPLAN_DEVICE T* of_piece(int piece, int offset) const {
    return at<T>(map.pieces + piece * map.piece_bytes + offset);
  }
  template <class T>
  KVPLAN_DEVICE T* of_warp(int warp, int offset) const {
    return at<T>(map.warps + warp * map.warp_bytes + offset);
  }
  KVPLAN_DEVICE static std::uint32_t address(int window_address) {
    return static_cast<std::uint32_t>(window_address);
  }
};

}  // namespace kvplan::kernels
