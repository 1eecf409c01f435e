/* The C interface from C, found by pkg-config. Needs no GPU. */
#include <kernels/runtime.h>
#include <stdio.h>

int main(int argc, char** argv) {
  kvplan_geometry geometry = {0};
  kvplan_size size;
  if (argc != 3 || sscanf(argv[2], "%d", &geometry.query_heads) != 1) return 2;
  geometry.max_sequences = 2;
  geometry.max_tokens = 256;
  geometry.max_query_tokens = 1;
  if (kvplan_size_of(argv[1], &geometry, 132, &size) != KVPLAN_OK) {
    fprintf(stderr, "%s\n", kvplan_last_error());
    return 3;
  }
  printf("%zu bytes\n", size.total);
  return size.total > 0 ? 0 : 1;
}
