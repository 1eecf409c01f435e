#pragma once
// Which segments a block of `prepare` and `finish` serves: those of one KV head whose columns in
// use fill the 16 of a product.

#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// Columns of a segment that any sequence of the batch may use.
inline int columns_in_use(const AttentionView& v) {
  const int columns = v.batch.max_new_tokens * v.queries_per_kv;
  return columns < kColumns ? columns : kColumns;
}
inline int segment_groups(const AttentionView& v, int columns) {
  const int segments = v.batch.sequences * v.column_blocks;
  const int per_group = kProductColumns / columns;
  return (segments + per_group - 1) / per_group;
}

/// Group `index` of KV head block_y(). Column c of segment s of the group is column s * columns + c
/// of the product.
struct SegmentGroup {
  int head, columns, first, count;  // first: of the head's segments

  KVPLAN_DEVICE SegmentGroup(const AttentionView& v, int columns_of_segment, int index)
      : head(block_y()), columns(columns_of_segment) {
    const int per_group = kProductColumns / columns;
    first = index * per_group;
    const int left = v.batch.sequences * v.column_blocks - first;
    count = left < per_group ? left : per_group;
  }
  KVPLAN_DEVICE int sequence(const AttentionView& v, int s) const {
    return (first + s) / v.column_blocks;
  }
  KVPLAN_DEVICE int segment(const AttentionView& v, int s) const {
    return (sequence(v, s) * v.layer.kv_heads + head) * v.column_blocks +
           (first + s) % v.column_blocks;
  }
  /// Row of q and out that a column of the product stands for, counted in heads; -1: none.
  KVPLAN_DEVICE std::int64_t row(const AttentionView& v, int column) const {
    const int s = column / columns;
    if (s >= count) return -1;
    const int i = sequence(v, s);
    const int c = (first + s) % v.column_blocks * kColumns + column % columns;
    const int token = c / v.queries_per_kv;
    if (token >= v.batch.length[i] - v.batch.length_before[i]) return -1;
    return (std::int64_t{v.batch.first_row[i]} + token) * v.layer.kv_heads * v.queries_per_kv +
           head * v.queries_per_kv + c % v.queries_per_kv;
  }
};

}  // namespace kvplan::kernels
