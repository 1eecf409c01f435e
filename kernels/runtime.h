#pragma once
/* C ABI of the CUDA runtime: status codes and device query. Torch-free, no exceptions cross it, no
 * hidden synchronisation. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kvplan_status {
  KVPLAN_OK = 0,
  KVPLAN_NO_DEVICE = 1,  /* no GPU or no driver */
  KVPLAN_OLD_DEVICE = 2, /* compute capability below 8.0 */
  KVPLAN_BAD_ARGUMENT = 3,
  KVPLAN_CUDA_ERROR = 4
} kvplan_status;

typedef struct kvplan_device_info {
  char name[256];
  int compute_capability; /* 10 * major + minor */
  int multiprocessors;
  size_t memory_bytes;
  size_t l2_bytes;
  int driver_version; /* as CUDA counts: 13000 for 13.0 */
} kvplan_device_info;

/* Fills *info for device `index` (0 based). On failure *info is untouched and kvplan_last_error()
 * has a sentence. */
kvplan_status kvplan_query_device(int index, kvplan_device_info* info);

/* The calling thread's last error as a sentence; "" if none. Valid until the thread's next kvplan
 * call. */
const char* kvplan_last_error(void);

#ifdef __cplusplus
}
#endif
