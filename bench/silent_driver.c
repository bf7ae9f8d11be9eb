/* A CUDA driver that launches nothing, for bench/host_time.py: what Triton's launcher calls, answered as an H100 would.
 *
 * silent_log(PATH) notes every launch from then on, one line each: function, grid, threads, shared memory, whether it may
 * start before its predecessor has ended, and the parameters in hexadecimal, whose sizes silent_sizes(FUNCTION, COUNT,
 * SIZES) told; silent_log(NULL) ends that. A graph's kernels are noted when it is launched. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUNCTIONS 4096
#define PARAMETERS 128
#define NODES 512
#define STREAM ((void *)0x5f0)
#define PROGRAMMATIC 6 /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION */

typedef struct {
  int id;
  char padding[4];
  int value; /* of a union of 64 bytes */
  char rest[60];
} Attribute;

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream;
  const Attribute *attributes;
  unsigned count;
} Launch;

typedef struct {
  Launch launch;
  int overlaps;
  long function;
  uint64_t values[PARAMETERS];
} Node;

typedef struct {
  int count;
  Node nodes[NODES];
} Graph;

static Graph *capture = NULL; /* what is launched on STREAM goes there meanwhile */
static long functions = 0, launches = 0, graphs = 0;
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
long silent_graphs(void) { return graphs; }

static void run(const Node *node) {
  ++launches;
  if (!file) return;
  fprintf(file, "%ld %u %u %u %u %u %d", node->function, node->launch.grid_x, node->launch.grid_y, node->launch.grid_z,
          node->launch.block_x, node->launch.shared, node->overlaps);
  for (int i = 0; i < parameters[node->function].count; ++i) fprintf(file, " %llx", (unsigned long long)node->values[i]);
  fputc('\n', file);
}

/* A kernel's values are read when it is launched, as a driver reads them; in a capture they go to the graph. */
int cuLaunchKernelEx(const Launch *launch, void *function, void **values, void **extra) {
  Node node = {.launch = *launch, .function = (long)(intptr_t)function};
  for (unsigned i = 0; i < launch->count; ++i)
    if (launch->attributes[i].id == PROGRAMMATIC) node.overlaps = launch->attributes[i].value;
  for (int i = 0; i < parameters[node.function].count; ++i)
    memcpy(&node.values[i], values[i], parameters[node.function].sizes[i]);
  if (capture && launch->stream == STREAM) {
    if (capture->count == NODES) return 2;
    capture->nodes[capture->count++] = node;
  } else {
    run(&node);
  }
  return 0;
}

int cuStreamCreate(void **stream, unsigned flags) {
  *stream = STREAM;
  return 0;
}
int cuStreamBeginCapture_v2(void *stream, int mode) {
  if (capture || stream != STREAM) return 900;
  capture = calloc(1, sizeof *capture);
  return capture ? 0 : 2;
}
int cuStreamEndCapture(void *stream, void **graph) {
  *graph = capture;
  capture = NULL;
  return *graph ? 0 : 901;
}
int cuGraphInstantiateWithFlags(void **executable, const Graph *graph, unsigned long long flags) {
  Graph *made = malloc(sizeof *made);
  if (!made) return 2;
  *made = *graph;
  *executable = made;
  return 0;
}
int cuGraphExecUpdate_v2(Graph *executable, const Graph *graph, void *found) {
  if (executable->count != graph->count) return 910;
  for (int i = 0; i < graph->count; ++i)
    if (executable->nodes[i].function != graph->nodes[i].function) return 910;
  *executable = *graph;
  return 0;
}
int cuGraphLaunch(const Graph *executable, void *stream) {
  if (stream == STREAM) return 1;
  ++graphs;
  for (int i = 0; i < executable->count; ++i) run(&executable->nodes[i]);
  return 0;
}
int cuGraphDestroy(Graph *graph) {
  free(graph);
  return 0;
}
int cuGraphExecDestroy(Graph *executable) { return cuGraphDestroy(executable); }

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
