#include "kernels/cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/static_data.h"
#include "kernels/step.h"

namespace kvplan::kernels {
namespace {

constexpr int kMaxQueryTokens = 4;
constexpr int kMaxQueriesPerKv = 16;
constexpr int kMaxHeadDim = 256;
constexpr std::size_t kVectorBytes = 16;  // kernels read and write vectors of so many bytes

std::size_t to_size(std::int64_t n) { return static_cast<std::size_t>(n); }

int ceiling(int n, int unit) { return (n + unit - 1) / unit; }

/// The next part of `memory`, as T*; null for 0 bytes.
template <class T>
T* take(const DeviceMemory& memory, Parts& parts, std::size_t bytes) {
  if (bytes == 0) return nullptr;
  return reinterpret_cast<T*>(memory.data() + parts.take(bytes));
}

void require_pointer(const void* pointer, const char* name, std::size_t alignment) {
  if (!pointer) throw ArgumentError(std::string(name) + " must not be null");
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0)
    throw ArgumentError(std::string(name) + " must be aligned to " + std::to_string(alignment) +
                        " bytes");
}

void require_limits(const PlanBundle& bundle, const quant::CacheGeometry& geometry) {
  const ModelSpec& model = bundle.plan.model;
  const auto refuse = [](const char* field, const std::string& limit, int found) {
    throw ArgumentError("the CUDA runtime needs " + std::string(field) + " of " + limit +
                        ", found " + std::to_string(found));
  };
  if (geometry.max_query_tokens > kMaxQueryTokens)
    refuse("max_query_tokens", "1 to " + std::to_string(kMaxQueryTokens),
           geometry.max_query_tokens);
  if (geometry.query_heads / model.kv_heads > kMaxQueriesPerKv)
    refuse("query_heads",
           "at most " + std::to_string(kMaxQueriesPerKv) + " times the plan's " +
               std::to_string(model.kv_heads) + " KV heads",
           geometry.query_heads);
  if (model.head_dim > kMaxHeadDim)
    throw InputError("plan.json", "/model/head_dim",
                     "the CUDA runtime holds heads of at most " + std::to_string(kMaxHeadDim) +
                         " channels, found " + std::to_string(model.head_dim));
  if (model.kv_heads > kMaxKvHeads)
    throw InputError("plan.json", "/model/kv_heads",
                     "the CUDA runtime holds at most " + std::to_string(kMaxKvHeads) +
                         " KV heads, found " + std::to_string(model.kv_heads));
  if (bundle.plan.layers.empty())
    throw InputError("plan.json", "/layers", "expected at least one layer");
}

}  // namespace

CachePlan plan_cache(const PlanBundle& bundle, const quant::CacheGeometry& geometry,
                     int multiprocessors) {
  quant::require_geometry(bundle.plan, geometry);
  require_limits(bundle, geometry);
  CachePlan plan;
  plan.formats = quant::page_format(bundle);
  plan.geometry = geometry;
  plan.geometry.blocks = quant::pool_blocks(geometry, bundle.plan.sink_tokens);
  plan.grid = {0};
  const int columns = std::min(
      kColumns, geometry.max_query_tokens * (geometry.query_heads / bundle.plan.model.kv_heads));
  for (std::size_t l = 0; l < plan.formats.size(); ++l) {
    const quant::LayerFormat& format = plan.formats[l];
    const DecodeShape& shape = plan.decode_shapes.emplace_back(
        decode_shape(format, bundle.plan.model.head_dim, quant::phase_steps(format),
                     needs_split_tile(bundle, format, l), columns, multiprocessors));
    plan.grid.blocks = std::max(plan.grid.blocks, shape.blocks);
    plan.block_bytes += format.block_bytes;
  }
  plan.size = quant::cache_size(bundle, geometry, plan.grid);
  return plan;
}

void require_line(const StepChange& step, int sink_tokens, int kv_heads, int queries_per_kv,
                  int max_query_tokens) {
  std::int64_t units = 0;  // of a KV head and column block
  for (const StepEntry& entry : step.entries)
    units += entry.length / quant::kPageTokens + quant::plain_chunks(sink_tokens) + kStartUnits;
  const int column_blocks =
      ceiling(std::min(step.max_tokens, max_query_tokens) * queries_per_kv, kColumns);
  constexpr std::int64_t kMostUnits = (std::int64_t{1} << 31) / kMostCost;
  if (units > kMostUnits / (std::int64_t{kv_heads} * column_blocks))
    throw ArgumentError(
        "the sequences of a step hold too many tokens together for one call of attention (" +
        std::to_string(units) + " pages); attend to them in several steps");
}

Cache::Cache(const PlanBundle& bundle, const quant::CacheGeometry& geometry, int device)
    : Cache(plan_cache(bundle, geometry, query_device(device).multiprocessors), bundle, device) {}

Cache::Cache(CachePlan plan, const PlanBundle& bundle, int device)
    : device_(device),
      geometry_(plan.geometry),
      size_(plan.size),
      block_bytes_(plan.block_bytes),
      sequences_(plan.geometry, bundle.plan.sink_tokens, plan.block_bytes),
      appended_(plan.formats.size(), true) {
  const CurrentDevice current(device_);
  pages_ = DeviceMemory(size_.pages);
  open_ = DeviceMemory(size_.open);
  tables_ = DeviceMemory(size_.tables);
  statics_ = DeviceMemory(size_.statics);
  workspace_ = DeviceMemory(size_.workspace);
  place_layers(bundle, plan);
  const quant::SharedBuffers buffers =
      quant::shared_buffers(plan.formats, bundle.plan.sink_tokens, geometry_, plan.grid);
  place_batch(buffers);
  place_workspace(plan, buffers);

  std::size_t shared_bytes = 0;
  for (const DecodeShape& shape : plan.decode_shapes)
    shared_bytes = std::max(shared_bytes, shape.shared_bytes);
  check(configure_decode(shared_bytes), "setting the shared memory of the decode kernel");
  const std::size_t staging_bytes = sizeof(StepEntry) * to_size(geometry_.max_sequences) +
                                    sizeof(std::int32_t) * to_size(geometry_.blocks);
  for (std::size_t i = 0; i < kStagings; ++i) stagings_.emplace_back(staging_bytes);
  check(cudaDeviceSynchronize(), "setting up the cache");
}

Cache::~Cache() {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess) return;
  cudaDeviceSynchronize();
  cudaSetDevice(before);
}

void Cache::place_layers(const PlanBundle& bundle, const CachePlan& plan) {
  StaticData data = make_static_data(bundle, plan.formats, geometry_, statics_.data());
  if (data.image.size() != statics_.bytes())
    throw InternalError("the static data of the cache take " + std::to_string(data.image.size()) +
                        " bytes, its size says " + std::to_string(statics_.bytes()));
  check(cudaMemcpy(statics_.data(), data.image.data(), data.image.size(), cudaMemcpyHostToDevice),
        "uploading the plan");
  layers_ = std::move(data.layers);
  const auto buffers = quant::layer_buffers(plan.formats, bundle.plan.sink_tokens, geometry_);
  Parts pages, open;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    LayerView& layer = layers_[l];
    layer.pool = take<std::byte>(pages_, pages, buffers[l].pool);
    layer.sinks = take<std::uint16_t>(open_, open, buffers[l].sinks);
    layer.open = take<std::uint16_t>(open_, open, buffers[l].open);
    layer.costs = work_costs(plan.formats[l], quant::phase_steps(plan.formats[l]));
    layer.uniform = plan.decode_shapes[l].uniform;
    layer.mixed = plan.decode_shapes[l].mixed;
    layer.shared = plan.decode_shapes[l].shared;
    layer.shared_bytes = plan.decode_shapes[l].shared_bytes;
  }
}

void Cache::place_batch(const quant::SharedBuffers& buffers) {
  Parts parts;
  page_table_ = take<std::int32_t>(tables_, parts, buffers.page_table);
  auto* const batch = take<std::int32_t>(tables_, parts, buffers.batch);
  for (std::size_t i = 0; i < batch_arrays_.size(); ++i)
    batch_arrays_[i] = batch + i * to_size(geometry_.max_sequences);
  batch_.slot = batch_arrays_[0];
  batch_.length_before = batch_arrays_[1];
  batch_.length = batch_arrays_[2];
  batch_.first_row = batch_arrays_[3];
  batch_.page_table = page_table_;
  batch_.table_stride = static_cast<int>(quant::pages_per_sequence(geometry_, sink_tokens()));
}

void Cache::place_workspace(const CachePlan& plan, const quant::SharedBuffers& buffers) {
  Parts parts;
  AttentionView view;
  view.batch = batch_;
  view.queries_per_kv = geometry_.query_heads / kv_heads();
  view.arrived = take<std::int32_t>(workspace_, parts, buffers.arrived);
  view.part_state = take<float2>(workspace_, parts, buffers.part_state);
  view.part_output = take<float>(workspace_, parts, buffers.part_output);
  view.plain_state = take<float2>(workspace_, parts, buffers.plain_state);
  view.plain_output = take<float>(workspace_, parts, buffers.plain_output);
  view.plain_chunks = quant::plain_chunks(sink_tokens());
  check(cudaMemset(view.arrived, 0, buffers.arrived), "clearing the workspace");
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    view.layer = layers_[l];
    view.output_tiles = 0;
    for (const quant::HeadLayout& head : plan.formats[l].heads)
      view.output_tiles = std::max(view.output_tiles, head.v.tiles);
    view.decode_blocks = plan.decode_shapes[l].blocks;
    view.block_warps = plan.decode_shapes[l].block_warps;
    attention_.push_back(view);
  }
}

const LayerView& Cache::checked_layer(int layer) const {
  if (layer < 0 || layer >= num_layers())
    throw ArgumentError("layer " + std::to_string(layer) + " was asked of a cache with " +
                        std::to_string(num_layers()) + " layers");
  return layers_[to_size(layer)];
}

void Cache::require_step() const {
  if (!step_open_)
    throw ArgumentError(
        "there is no step at work: begin one first (releasing a slot of a step ends it)");
}

void Cache::require_whole_step(const char* before) const {
  if (!step_open_ ||
      std::ranges::adjacent_find(appended_, std::ranges::not_equal_to()) == appended_.end())
    return;
  const auto layer = std::ranges::find(appended_, false) - appended_.begin();
  throw ArgumentError("layer " + std::to_string(layer) +
                      " lacks the tokens of the step; append to every layer before " + before);
}

std::int64_t Cache::stored_length(int layer, int slot) const {
  const std::int64_t length = sequences_.length(slot);
  if (!step_open_ || appended_[to_size(layer)]) return length;
  const auto entry = std::ranges::find(step_.entries, slot, &StepEntry::slot);
  return entry == step_.entries.end() ? length : entry->length_before;
}

void Cache::begin_step(std::span<const quant::SequenceStep> step, cudaStream_t stream) {
  require_whole_step("the next step begins");
  const CurrentDevice current(device_);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), "asking whether the stream is captured");
  if (capturing != cudaStreamCaptureStatusNone)
    throw ArgumentError(
        "a step cannot begin while its stream is captured in a graph: capture the calls after it, "
        "and begin each step before the graph is replayed");
  StepChange change = sequences_.prepare(step);
  require_line(change, sink_tokens(), kv_heads(), geometry_.query_heads / kv_heads(),
               geometry_.max_query_tokens);

  const Staging& staging = stagings_[next_staging_];
  staging.sent.wait();
  auto* const entries = reinterpret_cast<StepEntry*>(staging.memory.data());
  auto* const blocks = reinterpret_cast<std::int32_t*>(entries + geometry_.max_sequences);
  std::ranges::copy(change.entries, entries);
  std::ranges::copy(change.blocks, blocks);
  StepTransfer transfer;
  transfer.entries = entries;
  transfer.blocks = blocks;
  transfer.sequences = static_cast<int>(change.entries.size());
  transfer.slot = batch_arrays_[0];
  transfer.length_before = batch_arrays_[1];
  transfer.length = batch_arrays_[2];
  transfer.first_row = batch_arrays_[3];
  transfer.page_table = page_table_;
  transfer.table_stride = batch_.table_stride;
  check(send_step(transfer, stream), "sending the step to the device");
  staging.sent.record(stream);
  next_staging_ = (next_staging_ + 1) % stagings_.size();

  sequences_.commit(change);
  batch_.sequences = transfer.sequences;
  batch_.max_new_tokens = change.max_tokens;
  step_ = std::move(change);
  step_open_ = true;
  appended_.assign(appended_.size(), false);
}

void Cache::append(int layer, const void* k, const void* v, cudaStream_t stream) {
  const LayerView& view = checked_layer(layer);
  require_step();
  if (appended_[to_size(layer)])
    throw ArgumentError("layer " + std::to_string(layer) +
                        " has the tokens of the step already; begin the next step first");
  require_pointer(k, "k", kVectorBytes);
  require_pointer(v, "v", kVectorBytes);
  const CurrentDevice current(device_);
  const AppendView call{batch_, static_cast<const std::uint16_t*>(k),
                        static_cast<const std::uint16_t*>(v), view};
  check(kernels::append(call, stream), "appending");
  appended_[to_size(layer)] = true;
}

void Cache::attend(int layer, const void* q, const quant::AttentionOptions& options,
                   const AttentionOutput& output, cudaStream_t stream) {
  checked_layer(layer);
  require_step();
  if (!appended_[to_size(layer)])
    throw ArgumentError("layer " + std::to_string(layer) +
                        " lacks the tokens of the step; append to it before attention");
  if (step_.max_tokens > geometry_.max_query_tokens)
    throw ArgumentError("the step brings " + std::to_string(step_.max_tokens) +
                        " tokens of one sequence and the cache was created for attention of at "
                        "most " +
                        std::to_string(geometry_.max_query_tokens) +
                        "; attend to longer chunks over what is read back");
  require_pointer(q, "q", kVectorBytes);
  if (output.half || !output.single) require_pointer(output.half, "out", kVectorBytes);
  if (output.single) require_pointer(output.single, "out", kVectorBytes);
  if (output.lse) require_pointer(output.lse, "lse", sizeof(float));
  if (!std::isfinite(options.scale) || !std::isfinite(options.soft_cap) || options.soft_cap < 0 ||
      options.window < 0)
    throw ArgumentError(
        "attention needs a finite scale, and a soft cap and a window of at least 0");
  const CurrentDevice current(device_);
  AttentionView view = attention_[to_size(layer)];
  view.batch = batch_;
  view.column_blocks = ceiling(step_.max_tokens * view.queries_per_kv, kColumns);
  view.scale = options.scale != 0
                   ? options.scale
                   : static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim())));
  view.soft_cap = options.soft_cap;
  view.window = options.window;
  view.q = static_cast<const std::uint16_t*>(q);
  view.out = output.half;
  view.out_float = output.single;
  view.lse = output.lse;
  check(kernels::attend(view, stream), "attention");
}

void Cache::read_back(int layer, Side side, int slot, std::int64_t first, std::int64_t count,
                      std::uint16_t* x, float* x_float, cudaStream_t stream) const {
  const LayerView& view = checked_layer(layer);
  const std::int64_t length = stored_length(layer, slot);
  if (first < 0 || count < 0 || first > length || count > length - first)
    throw ArgumentError(std::to_string(count) + " positions from " + std::to_string(first) +
                        " were asked of the " + std::to_string(length) + " that slot " +
                        std::to_string(slot) + " holds in layer " + std::to_string(layer));
  if (x) require_pointer(x, "x", kVectorBytes);
  if (x_float) require_pointer(x_float, "x", kVectorBytes);
  if (count == 0 || (!x && !x_float)) return;
  const CurrentDevice current(device_);
  ReadBackView call;
  call.layer = view;
  call.slot = slot;
  call.length = static_cast<int>(length);
  call.first = first;
  call.count = count;
  call.page_table = page_table_;
  call.table_stride = batch_.table_stride;
  call.side = static_cast<int>(side);
  call.x = x;
  call.x_float = x_float;
  check(kernels::read_back(call, stream), "reading back");
}

void Cache::copy_page(int layer, int slot, std::int64_t page, std::span<std::byte> bytes) const {
  const LayerView& view = checked_layer(layer);
  const int pages = full_pages(static_cast<int>(stored_length(layer, slot)), view.sink_tokens);
  if (page < 0 || page >= pages)
    throw ArgumentError("page " + std::to_string(page) + " was asked of the " +
                        std::to_string(pages) + " full ones that slot " + std::to_string(slot) +
                        " has in layer " + std::to_string(layer));
  if (bytes.size() < view.block_bytes)
    throw ArgumentError("a page of layer " + std::to_string(layer) + " takes " +
                        std::to_string(view.block_bytes) + " bytes, found room for " +
                        std::to_string(bytes.size()));
  const CurrentDevice current(device_);
  check(cudaDeviceSynchronize(), "waiting for the page");
  const auto block = to_size(sequences_.blocks(slot)[to_size(page)]);
  check(cudaMemcpy(bytes.data(), view.pool + block * view.block_bytes, view.block_bytes,
                   cudaMemcpyDeviceToHost),
        "copying a page");
}

void Cache::fork(int from, int to, cudaStream_t stream) {
  sequences_.require_fork(from, to);
  require_whole_step("a fork");
  const CurrentDevice current(device_);
  const std::span<const std::int32_t> blocks = sequences_.blocks(from);
  const std::int64_t length = sequences_.length(from),
                     sinks = std::min<std::int64_t>(length, sink_tokens()),
                     open = length - sinks - std::ssize(blocks) * kOpenTokens;
  // What was written, and no more: the first `used` of `room` rows of every head.
  const auto copy = [&](auto* slots, std::int64_t heads, std::int64_t room, std::int64_t used) {
    if (used == 0) return;
    const std::size_t pitch = to_size(room) * sizeof *slots;
    check(cudaMemcpy2DAsync(slots + to * heads * room, pitch, slots + from * heads * room, pitch,
                            to_size(used) * sizeof *slots, to_size(heads), cudaMemcpyDeviceToDevice,
                            stream),
          "copying a sequence");
  };
  for (const LayerView& layer : layers_) {
    const std::int64_t heads = 2 * layer.kv_heads, d = layer.head_dim;
    copy(layer.sinks, heads, layer.sink_tokens * d, sinks * d);
    copy(layer.open, heads, kOpenTokens * d, open * d);
  }
  copy(page_table_, 1, batch_.table_stride, std::ssize(blocks));
  sequences_.fork(from, to);
}

void Cache::release(int slot) {
  sequences_.release(slot);
  if (std::ranges::find(step_.entries, slot, &StepEntry::slot) != step_.entries.end())
    step_open_ = false;
}

}  // namespace kvplan::kernels
