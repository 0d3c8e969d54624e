/* A CUDA driver without a card, as libcuda.so.1, for tests of what calls the driver.
 *
 * It has the functions that fourbit looks up, and keeps a model of what the real one keeps: contexts
 * and the stack of them that each thread has, memory, advice, where each page of managed memory is,
 * modules. Arguments are checked as strictly as the real one checks them or more so: a misuse is
 * refused and counted (fake_faults), with a line about the last one. Memory that was freed can not
 * be touched any more, and no address is given out twice. No kernel runs: a launch is noted.
 *
 * FAKE_CUDA_DEVICES: how many cards (1). FAKE_CUDA_CARD: bytes of each (64 MiB). FAKE_CUDA_HOST:
 * bytes of the host that may be allocated (1 GiB). FAKE_CUDA_CONCURRENT, FAKE_CUDA_MANAGED: the
 * attributes of cards (1).
 *
 * The functions fake_* at the end are for the tests: to let calls fail, to capture, and to look.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default"))) unsigned

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  CAPTURE_UNSUPPORTED = 900,
};

enum { PAGE = 4096, DEVICES = 8, STACK = 64, OBJECTS = 4096 };
enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

typedef struct {
  unsigned retained;
  int device;
} Context;

typedef struct Memory {
  struct Memory *next;
  uint64_t address;
  size_t bytes;
  int managed;
  int device;
  int preferred, accessed_by; /* cards, or -2 for none */
  unsigned char *on_card;     /* of each page of managed memory */
  uint64_t last_use;
} Memory;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t let_go = PTHREAD_COND_INITIALIZER;
static char held[64]; /* the function whose calls wait, if any */
static int holding;   /* calls that do */
static int initialised;
static Context contexts[DEVICES];
static __thread Context *stack[STACK];
static __thread int depth;
static __thread int capture_mode = GLOBAL;
static Memory *memories;
static uint64_t live_count, live_bytes, uses;
static size_t reserved[DEVICES];
static int capturing = -1, capture_broken; /* the card, or -1 */
static int at_work[DEVICES];
static char objects[OBJECTS]; /* addresses that stand for modules, functions and streams */
static int modules = 1, functions = OBJECTS / 4, streams = OBJECTS / 2;
static unsigned long faults;
static char last_fault[256];
static char *record;
static size_t record_length;

static size_t setting(const char *name, size_t otherwise) {
  const char *value = getenv(name);
  return value ? strtoull(value, NULL, 10) : otherwise;
}

static int device_count(void) { return (int)setting("FAKE_CUDA_DEVICES", 1); }
static size_t card_bytes(void) { return setting("FAKE_CUDA_CARD", 64u << 20); }
static int known_device(int device) { return device >= 0 && device < device_count(); }

/* Notes what the caller should not have done. */
static unsigned fault(unsigned code, const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(last_fault, sizeof last_fault, text, arguments);
  va_end(arguments);
  faults++;
  return code;
}

static void note(const char *text, ...) {
  char line[256];
  va_list arguments;
  va_start(arguments, text);
  int length = vsnprintf(line, sizeof line, text, arguments);
  va_end(arguments);
  char *longer = realloc(record, record_length + length + 2);
  if (!longer) abort();
  memcpy(longer + record_length, line, length);
  record = longer;
  record_length += length;
  record[record_length++] = '\n';
  record[record_length] = 0;
}

/* --- calls, counted, and failing when asked --------------------------------------------------- */

typedef struct {
  const char *name;
  long calls;
  long fail_at;
  unsigned code;
} Call;

static Call calls[64];
static int call_count;

static Call *call_of(const char *name) {
  for (int i = 0; i < call_count; i++)
    if (!strcmp(calls[i].name, name)) return &calls[i];
  if (call_count == sizeof calls / sizeof *calls) abort();
  calls[call_count].name = strdup(name);
  return &calls[call_count++];
}

static unsigned begin(const char *name) {
  Call *call = call_of(name);
  call->calls++;
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 20;
  holding += !strcmp(held, name);
  while (!strcmp(held, name))
    if (pthread_cond_timedwait(&let_go, &lock, &until)) {
      *held = 0;
      return fault(INVALID_VALUE, "%s was never let go", name);
    }
  if (call->calls == call->fail_at) {
    call->fail_at = 0;
    return call->code;
  }
  if (!initialised && strcmp(name, "cuInit"))
    return fault(NOT_INITIALIZED, "%s before cuInit", name);
  return SUCCESS;
}

/* The body of a function, with the lock held and `code` to set. */
#define CALL(name, body)                 \
  {                                      \
    pthread_mutex_lock(&lock);           \
    unsigned code = begin(name);         \
    if (code == SUCCESS) do body while (0); \
    pthread_mutex_unlock(&lock);         \
    return code;                         \
  }
#define FAIL(value) { code = (value); break; }
#define NEEDS_CONTEXT \
  if (!depth) FAIL(fault(INVALID_CONTEXT, "no context is current"))
/* As cudaThreadExchangeStreamCaptureMode tells it of calls that a capture does not see. */
#define UNSAFE_IN_CAPTURE                                              \
  if (capturing >= 0 && capture_mode != RELAXED) {                          \
    capture_broken = 1;                                                \
    FAIL(fault(CAPTURE_UNSUPPORTED, "a call that breaks the capture")) \
  }

static const struct { unsigned code; const char *name, *text; } ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
};

static unsigned told(unsigned code, const char **text, int name) {
  *text = NULL;
  for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
    if (ERRORS[i].code == code) *text = name ? ERRORS[i].name : ERRORS[i].text;
  return *text ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorName(unsigned code, const char **text) { return told(code, text, 1); }
API cuGetErrorString(unsigned code, const char **text) { return told(code, text, 0); }

/* --- cards and contexts ----------------------------------------------------------------------- */

API cuInit(unsigned flags) CALL("cuInit", {
  if (flags) FAIL(fault(INVALID_VALUE, "cuInit with flags"))
  initialised = 1;
})

/* NVRTC asks for a table that is not documented, and goes on without one where there is none. */
API cuGetExportTable(const void **table, const void *id) {
  *table = NULL;
  return NOT_FOUND;
}

API cuDriverGetVersion(int *version) CALL("cuDriverGetVersion", { *version = 13000; })
API cuDeviceGetCount(int *count) CALL("cuDeviceGetCount", { *count = device_count(); })

API cuDeviceGet(int *device, int ordinal) CALL("cuDeviceGet", {
  if (!known_device(ordinal)) FAIL(INVALID_DEVICE)
  *device = ordinal;
})

API cuDeviceGetName(char *name, int length, int device) CALL("cuDeviceGetName", {
  if (!known_device(device)) FAIL(fault(INVALID_DEVICE, "cuDeviceGetName of no card"))
  snprintf(name, length, "Fake card %d", device);
})

API cuDeviceTotalMem_v2(size_t *bytes, int device) CALL("cuDeviceTotalMem_v2", {
  if (!known_device(device)) FAIL(fault(INVALID_DEVICE, "cuDeviceTotalMem of no card"))
  *bytes = card_bytes();
})

API cuDeviceGetAttribute(int *value, int attribute, int device) CALL("cuDeviceGetAttribute", {
  if (!known_device(device)) FAIL(fault(INVALID_DEVICE, "an attribute of no card"))
  switch (attribute) { /* CU_DEVICE_ATTRIBUTE_... */
    case 16: *value = 10; break;        /* MULTIPROCESSOR_COUNT */
    case 75: *value = 9; break;         /* COMPUTE_CAPABILITY_MAJOR */
    case 76: *value = 0; break;         /* COMPUTE_CAPABILITY_MINOR */
    case 83: *value = (int)setting("FAKE_CUDA_MANAGED", 1); break;    /* MANAGED_MEMORY */
    case 89: *value = (int)setting("FAKE_CUDA_CONCURRENT", 1); break; /* CONCURRENT_MANAGED_ACCESS */
    case 97: *value = 227 << 10; break; /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    default: code = fault(INVALID_VALUE, "attribute %d", attribute);
  }
})

API cuDevicePrimaryCtxRetain(Context **context, int device) CALL("cuDevicePrimaryCtxRetain", {
  if (!known_device(device)) FAIL(fault(INVALID_DEVICE, "a context of no card"))
  contexts[device].device = device;
  contexts[device].retained++;
  *context = &contexts[device];
})

API cuCtxGetCurrent(Context **context) CALL("cuCtxGetCurrent", {
  *context = depth ? stack[depth - 1] : NULL;
})

API cuCtxPushCurrent_v2(Context *context) CALL("cuCtxPushCurrent_v2", {
  if (context < contexts || context >= contexts + DEVICES || !context->retained)
    FAIL(fault(INVALID_CONTEXT, "a context that nobody retains is pushed"))
  if (depth == STACK) FAIL(fault(INVALID_CONTEXT, "the stack of contexts is full"))
  stack[depth++] = context;
})

API cuCtxPopCurrent_v2(Context **context) CALL("cuCtxPopCurrent_v2", {
  NEEDS_CONTEXT
  *context = stack[--depth];
})

API cuCtxSynchronize(void) CALL("cuCtxSynchronize", {
  NEEDS_CONTEXT
  /* Whatever the mode: it would wait for a stream that is not at work. */
  if (capturing == stack[depth - 1]->device) {
    capture_broken = 1;
    FAIL(CAPTURE_UNSUPPORTED)
  }
  at_work[stack[depth - 1]->device] = 0;
  note("synchronize %d", stack[depth - 1]->device);
})

API cuThreadExchangeStreamCaptureMode(int *mode) CALL("cuThreadExchangeStreamCaptureMode", {
  if (*mode < GLOBAL || *mode > RELAXED) FAIL(fault(INVALID_VALUE, "capture mode %d", *mode))
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
})

/* --- memory ----------------------------------------------------------------------------------- */

static size_t up(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

static Memory *found(uint64_t address) {
  for (Memory *one = memories; one; one = one->next)
    if (address >= one->address && address - one->address < one->bytes) return one;
  return NULL;
}

/* Managed memory that holds the whole range. */
static Memory *managed_range(uint64_t address, size_t bytes) {
  Memory *memory = found(address);
  if (!memory || !memory->managed || !bytes) return NULL;
  return bytes <= memory->bytes - (address - memory->address) ? memory : NULL;
}

static size_t resident(int device) {
  size_t pages = 0;
  for (Memory *one = memories; one; one = one->next)
    if (one->managed && one->device == device)
      for (size_t page = 0; page < up(one->bytes) / PAGE; page++) pages += one->on_card[page];
  return pages * PAGE;
}

static unsigned allocate(uint64_t *address, size_t bytes, int managed) {
  if (!bytes) return fault(INVALID_VALUE, "0 bytes are allocated");
  size_t host = setting("FAKE_CUDA_HOST", 1u << 30);
  if (bytes > host || live_bytes + bytes > host) return OUT_OF_MEMORY;
  void *place = mmap(NULL, up(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (place == MAP_FAILED) return OUT_OF_MEMORY;
  memset(place, 0xA5, bytes); /* whoever trusts in zeros is to notice */
  Memory *memory = calloc(1, sizeof *memory);
  if (!memory) abort();
  memory->address = (uint64_t)(uintptr_t)place;
  memory->bytes = bytes;
  memory->managed = managed;
  memory->device = stack[depth - 1]->device;
  memory->preferred = memory->accessed_by = -2;
  memory->on_card = calloc(up(bytes) / PAGE, 1);
  memory->next = memories;
  memories = memory;
  live_count++;
  live_bytes += bytes;
  *address = memory->address;
  note("allocate %s %d %zu", managed ? "managed" : "page-locked", memory->device, bytes);
  return SUCCESS;
}

static unsigned release(uint64_t address, int managed) {
  for (Memory **link = &memories; *link; link = &(*link)->next) {
    Memory *memory = *link;
    if (memory->address != address) continue;
    if (memory->managed != managed) return fault(INVALID_VALUE, "freed as the other kind");
    if (memory->managed && memory->device != stack[depth - 1]->device)
      return fault(INVALID_VALUE, "freed in the context of another card");
    if (at_work[memory->device])
      return fault(INVALID_VALUE, "freed while the card may be at work on it");
    note("free %s %d %zu", managed ? "managed" : "page-locked", memory->device, memory->bytes);
    /* The addresses stay taken. */
    if (!mmap((void *)(uintptr_t)address, up(memory->bytes), PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0))
      abort();
    *link = memory->next;
    live_count--;
    live_bytes -= memory->bytes;
    free(memory->on_card);
    free(memory);
    return SUCCESS;
  }
  return fault(INVALID_VALUE, "freed, and never allocated or freed before");
}

API cuMemAllocManaged(uint64_t *address, size_t bytes, unsigned flags) CALL("cuMemAllocManaged", {
  NEEDS_CONTEXT
  UNSAFE_IN_CAPTURE
  if (flags != 1 && flags != 2) FAIL(fault(INVALID_VALUE, "cuMemAllocManaged with %u", flags))
  if (!setting("FAKE_CUDA_MANAGED", 1)) FAIL(801)
  code = allocate(address, bytes, 1);
})

API cuMemHostAlloc(void **address, size_t bytes, unsigned flags) CALL("cuMemHostAlloc", {
  NEEDS_CONTEXT
  UNSAFE_IN_CAPTURE
  if (flags & ~7u) FAIL(fault(INVALID_VALUE, "cuMemHostAlloc with %u", flags))
  if (!(flags & 1)) FAIL(fault(INVALID_VALUE, "not page-locked for all cards"))
  uint64_t place;
  code = allocate(&place, bytes, 0);
  if (code == SUCCESS) *address = (void *)(uintptr_t)place;
})

API cuMemFree_v2(uint64_t address) CALL("cuMemFree_v2", {
  NEEDS_CONTEXT
  UNSAFE_IN_CAPTURE
  code = release(address, 1);
})

API cuMemFreeHost(void *address) CALL("cuMemFreeHost", {
  NEEDS_CONTEXT
  UNSAFE_IN_CAPTURE
  code = release((uint64_t)(uintptr_t)address, 0);
})

API cuMemAdvise(uint64_t address, size_t bytes, int advice, int device) CALL("cuMemAdvise", {
  NEEDS_CONTEXT
  Memory *memory = managed_range(address, bytes);
  if (!memory) FAIL(fault(INVALID_VALUE, "advice on what is no managed memory"))
  if (!known_device(device) && device != -1) FAIL(fault(INVALID_DEVICE, "advice for no card"))
  if (device >= 0 && !setting("FAKE_CUDA_CONCURRENT", 1)) FAIL(INVALID_DEVICE)
  if (advice == 3) memory->preferred = device;
  else if (advice == 5) memory->accessed_by = device;
  else FAIL(fault(INVALID_VALUE, "advice %d", advice))
  note("advise %d %d", advice, device);
})

/* Makes room on a card by moving pages of other memory to the host, the longest unused first. */
static int make_room(int device, size_t bytes, Memory *keep) {
  size_t most = card_bytes() - reserved[device];
  if (bytes > most) return 0;
  while (resident(device) + bytes > most) {
    Memory *oldest = NULL;
    for (Memory *one = memories; one; one = one->next) {
      if (!one->managed || one == keep || one->device != device) continue;
      if (!memchr(one->on_card, 1, up(one->bytes) / PAGE)) continue;
      if (!oldest || one->last_use < oldest->last_use) oldest = one;
    }
    if (!oldest) return 0;
    memset(oldest->on_card, 0, up(oldest->bytes) / PAGE);
    note("evict %d %zu", device, oldest->bytes);
  }
  return 1;
}

API cuMemPrefetchAsync(uint64_t address, size_t bytes, int device, void *stream)
CALL("cuMemPrefetchAsync", {
  NEEDS_CONTEXT
  Memory *memory = managed_range(address, bytes);
  if (!memory) FAIL(fault(INVALID_VALUE, "a prefetch of what is no managed memory"))
  if (!known_device(device) && device != -1) FAIL(fault(INVALID_DEVICE, "a prefetch to no card"))
  if (device >= 0 && !setting("FAKE_CUDA_CONCURRENT", 1)) FAIL(INVALID_DEVICE)
  char *handle = stream;
  if (handle && (handle < objects + OBJECTS / 2 || handle >= objects + streams))
    FAIL(fault(INVALID_HANDLE, "a prefetch in no stream"))
  size_t first = (address - memory->address) / PAGE;
  size_t end = up(address - memory->address + bytes) / PAGE;
  if (device >= 0) {
    size_t missing = 0;
    for (size_t page = first; page < end; page++) missing += !memory->on_card[page];
    if (!make_room(device, missing * PAGE, memory)) FAIL(OUT_OF_MEMORY)
  }
  memset(memory->on_card + first, device >= 0, end - first);
  memory->last_use = ++uses;
  note("prefetch %zu %zu %d %d", (size_t)(address - memory->address), bytes, device,
       handle ? (int)(handle - objects) : 0);
})

API cuMemGetInfo_v2(size_t *free_bytes, size_t *total) CALL("cuMemGetInfo_v2", {
  NEEDS_CONTEXT
  int device = stack[depth - 1]->device;
  *total = card_bytes();
  *free_bytes = *total - reserved[device] - resident(device);
})

/* --- modules and launches --------------------------------------------------------------------- */

API cuModuleLoadData(void **module, const void *image) CALL("cuModuleLoadData", {
  NEEDS_CONTEXT
  UNSAFE_IN_CAPTURE
  if (memcmp(image, "\177ELF", 4) && memcmp(image, "//", 2))
    FAIL(fault(INVALID_IMAGE, "neither machine code nor PTX"))
  if (modules == OBJECTS / 4) abort();
  *module = objects + modules++;
})

API cuModuleGetFunction(void **function, void *module, const char *name)
CALL("cuModuleGetFunction", {
  NEEDS_CONTEXT
  if ((char *)module <= objects || (char *)module >= objects + modules)
    FAIL(fault(INVALID_HANDLE, "no module"))
  if (strncmp(name, "fourbit_", 8)) FAIL(fault(NOT_FOUND, "no function %s", name))
  if (functions == OBJECTS / 2) abort();
  *function = objects + functions++;
})

static int known_function(void *function) {
  return (char *)function >= objects + OBJECTS / 4 && (char *)function < objects + functions;
}

API cuFuncGetAttribute(int *value, int attribute, void *function) CALL("cuFuncGetAttribute", {
  if (!known_function(function)) FAIL(fault(INVALID_HANDLE, "no function"))
  *value = 1024;
})

API cuFuncSetAttribute(void *function, int attribute, int value) CALL("cuFuncSetAttribute", {
  if (!known_function(function)) FAIL(fault(INVALID_HANDLE, "no function"))
  if (value < 0 || value > (227 << 10) - 1024) FAIL(fault(INVALID_VALUE, "shared memory"))
})

API cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                   void **arguments, void **extra)
CALL("cuLaunchKernel", {
  NEEDS_CONTEXT
  if (!known_function(function)) FAIL(fault(INVALID_HANDLE, "no function is launched"))
  if (!x || !y || !z || !block_x || block_x * block_y * block_z > 1024 || !arguments || extra)
    FAIL(fault(INVALID_VALUE, "a launch without blocks, threads or arguments"))
  note("launch %d %u %u %u %u", stack[depth - 1]->device, x, y, z, block_x);
})

/* --- for the tests ---------------------------------------------------------------------------- */

#define TEST(type) __attribute__((visibility("default"))) type

/* Lets the call-th call of a function from now on fail with a code; 0 for none. */
TEST(void) fake_fail(const char *function, long call, unsigned code) {
  pthread_mutex_lock(&lock);
  Call *found = call_of(function);
  found->fail_at = call ? found->calls + call : 0;
  found->code = code;
  pthread_mutex_unlock(&lock);
}

TEST(long) fake_calls(const char *function) {
  pthread_mutex_lock(&lock);
  long count = call_of(function)->calls;
  pthread_mutex_unlock(&lock);
  return count;
}

/* Lets calls of a function wait, "" for none, for at most 20 seconds; then it is a fault. */
TEST(void) fake_hold(const char *function) {
  pthread_mutex_lock(&lock);
  snprintf(held, sizeof held, "%s", function);
  holding = 0;
  pthread_cond_broadcast(&let_go);
  pthread_mutex_unlock(&lock);
}

TEST(int) fake_holding(void) {
  pthread_mutex_lock(&lock);
  int calls_that_wait = holding;
  pthread_mutex_unlock(&lock);
  return calls_that_wait;
}

/* What was done since the last look, a line for each thing. To be freed with fake_let_go. */
TEST(char *) fake_record(void) {
  pthread_mutex_lock(&lock);
  char *text = record ? record : strdup("");
  record = NULL;
  record_length = 0;
  pthread_mutex_unlock(&lock);
  return text;
}

TEST(void) fake_let_go(char *text) { free(text); }

TEST(unsigned long) fake_faults(void) { return faults; }
TEST(const char *) fake_last_fault(void) { return last_fault; }
TEST(uint64_t) fake_live_count(void) { return live_count; }
TEST(uint64_t) fake_live_bytes(void) { return live_bytes; }

/* Of the calling thread. */
TEST(int) fake_depth(void) { return depth; }
TEST(int) fake_mode(void) { return capture_mode; }
/* Puts the thread back to how it started. */
TEST(void) fake_reset_thread(void) {
  depth = 0;
  capture_mode = GLOBAL;
}

/* A stream of any card. */
TEST(void *) fake_stream(void) {
  pthread_mutex_lock(&lock);
  if (streams == OBJECTS) abort();
  void *stream = objects + streams++;
  pthread_mutex_unlock(&lock);
  return stream;
}

/* Starts a capture on a card, which every thread must heed, or ends it for -1. Says whether what
 * was captured till now was broken. */
TEST(int) fake_capture(int device) {
  pthread_mutex_lock(&lock);
  int broken = capture_broken;
  capturing = device;
  capture_broken = 0;
  pthread_mutex_unlock(&lock);
  return broken;
}

/* A card is at work until it is waited for. */
TEST(void) fake_at_work(int device) { at_work[device] = 1; }

/* Memory of a card that somebody else has. */
TEST(void) fake_reserve(int device, size_t bytes) { reserved[device] = bytes; }
TEST(size_t) fake_resident(int device) {
  pthread_mutex_lock(&lock);
  size_t bytes = resident(device);
  pthread_mutex_unlock(&lock);
  return bytes;
}

/* Makes a card's context current for this thread, as torch does. */
TEST(void) fake_use(int device) {
  contexts[device].device = device;
  contexts[device].retained++;
  stack[depth++] = &contexts[device];
}
