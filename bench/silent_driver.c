/* A CUDA driver that launches nothing, for bench/host_time.py: what Triton's launcher calls, answered as an H100 would.
 *
 * silent_log(PATH) notes every launch from then on, one line each: function, grid, threads, shared memory, and the
 * parameters in hexadecimal, whose sizes silent_sizes(FUNCTION, COUNT, SIZES) told; silent_log(NULL) ends that. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define FUNCTIONS 4096
#define PARAMETERS 128

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream, *attributes;
  unsigned count;
} Launch;

static long functions = 0, launches = 0;
static struct { int count, sizes[PARAMETERS]; } parameters[FUNCTIONS];
static FILE *file = NULL;

void silent_log(const char *path) {
  if (file) fclose(file);
  file = path ? fopen(path, "w") : NULL;
}

int silent_sizes(long function, int count, const int *sizes) {
  if (function < 0 || function >= FUNCTIONS || count > PARAMETERS) return 1;
  parameters[function].count = count;
  memcpy(parameters[function].sizes, sizes, count * sizeof(int));
  return 0;
}

long silent_launches(void) { return launches; }

int cuLaunchKernelEx(const Launch *launch, void *function, void **values, void **extra) {
  long number = (long)(intptr_t)function;
  ++launches;
  if (!file) return 0;
  fprintf(file, "%ld %u %u %u %u %u", number, launch->grid_x, launch->grid_y, launch->grid_z, launch->block_x,
          launch->shared);
  for (int i = 0; i < parameters[number].count; ++i) {
    uint64_t value = 0;
    memcpy(&value, values[i], parameters[number].sizes[i]);
    fprintf(file, " %llx", (unsigned long long)value);
  }
  fputc('\n', file);
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 1: *value = 1024; break;      /* threads a block */
    case 10: *value = 32; break;       /* threads a warp */
    case 16: *value = 132; break;      /* multiprocessors */
    case 75: *value = 9; break;        /* compute capability */
    case 76: *value = 0; break;
    case 81: *value = 233472; break;   /* bytes of shared memory a multiprocessor */
    case 97: *value = 232448; break;   /* bytes of shared memory a block may ask for */
    default: *value = 65536;
  }
  return 0;
}

int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)(intptr_t)++functions;
  return functions < FUNCTIONS ? 0 : 2;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = module;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads a block; registers, spills */
  return 0;
}
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  memcpy(value, &pointer, sizeof pointer); /* every address is the device's own */
  return 0;
}
int cuGetErrorString(int error, const char **text) {
  *text = "no memory for another function";
  return 0;
}
int cuDeviceGet(int *device, int ordinal) { return *device = 0; }
int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return cuCtxGetCurrent(context); }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuCtxGetLimit(size_t *value, int limit) { return (int)(*value = 0); }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }
int cuInit(unsigned flags) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { return (*clusters = 1) - 1; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
