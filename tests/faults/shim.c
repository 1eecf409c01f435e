// Preloaded into the program by test_faults.py: a wall clock that jumps, and files that cannot be read.
//   SHIM_CLOCK=1       every look at the wall clock gives another year
//   SHIM_EIO=PART      reading a file whose path contains PART fails with EIO, mapping it too
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t jump(void) {
  static unsigned looks = 0;
  return (time_t)(looks++ * 2654435761u % 100) * 365 * 24 * 3600;
}

static int jumps(void) { return getenv("SHIM_CLOCK") != NULL; }

int clock_gettime(clockid_t clock, struct timespec* at) {
  static int (*real)(clockid_t, struct timespec*);
  if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  const int status = real(clock, at);
  if (status == 0 && clock == CLOCK_REALTIME && jumps()) at->tv_sec = jump();
  return status;
}

int gettimeofday(struct timeval* at, void* zone) {
  (void)zone;
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

static int fails(int file) {
  const char* part = getenv("SHIM_EIO");
  if (!part) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strstr(path, part) != NULL;
}

ssize_t read(int file, void* to, size_t bytes) {
  static ssize_t (*real)(int, void*, size_t);
  if (!real) real = (ssize_t(*)(int, void*, size_t))dlsym(RTLD_NEXT, "read");
  if (!fails(file)) return real(file, to, bytes);
  errno = EIO;
  return -1;
}

void* mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
  static void* (*real)(void*, size_t, int, int, int, off_t);
  if (!real) real = (void* (*)(void*, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
  if (file < 0 || !fails(file)) return real(at, bytes, protection, flags, file, offset);
  errno = EIO;
  return MAP_FAILED;
}
