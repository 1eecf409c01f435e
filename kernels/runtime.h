#pragma once
/* C ABI of the CUDA runtime: a paged KV cache stored as a plan says, with attention straight from
 * its packed pages. Torch-free. No exception crosses it; after kvplan_create nothing allocates
 * device memory or synchronises unless its comment says so. Every function that returns a status
 * leaves a sentence in kvplan_last_error() when it fails, and has then changed nothing. A runtime
 * may be used by one thread at a time; different runtimes are independent. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kvplan_status {
  KVPLAN_OK = 0,
  KVPLAN_NO_DEVICE = 1,  /* no GPU or no driver */
  KVPLAN_OLD_DEVICE = 2, /* compute capability below 8.0, or a driver older than the CUDA runtime */
  KVPLAN_BAD_ARGUMENT = 3,
  KVPLAN_CUDA_ERROR = 4,
  KVPLAN_BAD_PLAN = 5,      /* unreadable, or not for this runtime or geometry */
  KVPLAN_OUT_OF_MEMORY = 6, /* of the device, at create */
  KVPLAN_OUT_OF_BLOCKS = 7, /* the pool has no block left; release a sequence and try again */
  KVPLAN_TOO_LONG = 8,      /* a sequence would outgrow max_tokens */
  KVPLAN_INTERNAL = 9
} kvplan_status;

typedef struct kvplan_device_info {
  char name[256];
  int compute_capability; /* 10 * major + minor */
  int multiprocessors;
  size_t memory_bytes;
  size_t l2_bytes;
  int driver_version; /* as CUDA counts: 13000 for 13.0 */
} kvplan_device_info;

/* Fills *info for device `index` (0 based). On failure *info is untouched. */
kvplan_status kvplan_query_device(int index, kvplan_device_info* info);

/* The calling thread's last error as a sentence; "" if none. Valid until the thread's next kvplan
 * call. */
const char* kvplan_last_error(void);

typedef struct kvplan_geometry {
  int query_heads;      /* a multiple of the plan's kv_heads, at most 16 times */
  int max_sequences;    /* slots */
  int64_t max_tokens;   /* of one sequence */
  int64_t blocks;       /* of 64 tokens, in each layer's pool; 0: max_sequences of max_tokens */
  int max_query_tokens; /* of one sequence in one kvplan_attend, 1..4 */
  int device;           /* 0 based */
} kvplan_geometry;

typedef struct kvplan_size {
  size_t pages, open, tables, statics, workspace, total; /* bytes on the device */
  size_t block_bytes;                                    /* of one block in all layers */
} kvplan_size;

/* Bytes that kvplan_create would allocate on the device, to the byte. `multiprocessors`: of the
 * GPU, which decide on the workspace; 0 asks geometry->device, anything else needs no GPU. */
kvplan_status kvplan_size_of(const char* plan_path, const kvplan_geometry* geometry,
                             int multiprocessors, kvplan_size* size);

typedef struct kvplan_runtime kvplan_runtime;
typedef void* kvplan_stream; /* a cudaStream_t; NULL is the default stream */

/* Reads the plan, allocates everything. Synchronises. */
kvplan_status kvplan_create(const char* plan_path, const kvplan_geometry* geometry,
                            kvplan_runtime** runtime);
/* Frees everything; waits for the device. NULL is allowed. */
void kvplan_destroy(kvplan_runtime* runtime);
kvplan_status kvplan_runtime_size(const kvplan_runtime* runtime, kvplan_size* size);

typedef struct kvplan_shape {
  int num_layers, kv_heads, query_heads, head_dim, sink_tokens, page_tokens;
} kvplan_shape;
kvplan_status kvplan_runtime_shape(const kvplan_runtime* runtime, kvplan_shape* shape);

/* A step. `slots` [count] are different slots, sequence i brings `tokens[i]` >= 1 tokens. Reserves
 * blocks and sends the batch to the device on `stream`; host work only besides. Waits for the step
 * eight steps before if the device has not got it yet. Not to be captured in a graph. The rows of
 * k, v, q and out in the calls that follow are the step's tokens, sequence after sequence. A step
 * whose calls were captured in a CUDA graph may be replayed after another begin_step with the same
 * `count` and the same tokens: the graph reads lengths and page tables from the device
 * (docs/runtime.md). */
kvplan_status kvplan_begin_step(kvplan_runtime* runtime, int count, const int* slots,
                                const int* tokens, kvplan_stream stream);

/* k, v: device pointers aligned to 16 bytes, fp16 [rows, kv_heads, head_dim] after rotary. Stores
 * sinks and the open page in fp16, packs pages that fill. Once per layer and step. */
kvplan_status kvplan_append(kvplan_runtime* runtime, int layer, const void* k, const void* v,
                            kvplan_stream stream);

typedef struct kvplan_attention {
  float scale;    /* of the scores; 0: 1 / sqrt(head_dim) */
  float soft_cap; /* scores become cap * tanh(score / cap); 0: none */
  int64_t window; /* a query at position t reads positions > t - window; 0: all */
} kvplan_attention;

/* Causal attention of the step's tokens, after kvplan_append of that layer. q, out: device, aligned
 * to 16 bytes, fp16 [rows, query_heads, head_dim]. lse: device, float [rows, query_heads] natural
 * log-sum-exp of the scores, or NULL. At most max_query_tokens per sequence: longer chunks attend
 * with the framework's kernels over kvplan_read_back. `options` NULL: defaults. */
kvplan_status kvplan_attend(kvplan_runtime* runtime, int layer, const void* q,
                            const kvplan_attention* options, void* out, float* lse,
                            kvplan_stream stream);

/* De-quantised vectors of a slot, positions first .. first + count - 1, plain domain after rotary:
 * fp16 [count, kv_heads, head_dim] to k and v (device, aligned to 16 bytes; either may be NULL).
 * For prefill over history, and debugging. Between begin_step and kvplan_append of the layer the
 * slots of the step have their former length there. */
kvplan_status kvplan_read_back(kvplan_runtime* runtime, int layer, int slot, int64_t first,
                               int64_t count, void* k, void* v, kvplan_stream stream);

/* Copies one layer's page (all KV heads) of a slot to the host, as packed; block_bytes of that
 * layer. For debugging; synchronises. page: index of the full page. *needed (needed may be NULL) is
 * set to the bytes that it takes; bytes NULL and capacity 0 only ask for them. */
kvplan_status kvplan_copy_page(kvplan_runtime* runtime, int layer, int slot, int64_t page,
                               void* bytes, size_t capacity, size_t* needed);

/* Tokens of a slot; 0 for a free one. */
kvplan_status kvplan_length(const kvplan_runtime* runtime, int slot, int64_t* length);
/* `to` (free) becomes a copy of `from`: full pages are shared, sinks and open page copied on
 * `stream`. After the appends of a step, not between them. */
kvplan_status kvplan_fork(kvplan_runtime* runtime, int from, int to, kvplan_stream stream);
/* Frees a slot; blocks that nobody shares return to the pool. Ends a step that the slot belongs to.
 */
kvplan_status kvplan_release(kvplan_runtime* runtime, int slot);
kvplan_status kvplan_free_blocks(const kvplan_runtime* runtime, int64_t* blocks);

#ifdef __cplusplus
}
#endif
