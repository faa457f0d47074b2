// A CUDA driver and runtime whose only device is the CPU: the functions that TVM's CUDA runtime takes from libcuda and
// libcudart. A module image is the text "KBITC-EMULATED <path of a host library>"; a thread block runs as fibers that
// switch at barriers and warp functions, so exchanges inside a block happen as on a GPU. x86-64 only.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <map>
#include <string>
#include <vector>
#include "machine.h"

extern "C" {
kb_index kb_thread, kb_block, kb_block_size, kb_grid_size;
void kb_switch(void** save, void* load);
}
asm(R"(
.globl kb_switch
kb_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace {
constexpr size_t kStack = 96 * 1024, kPage = 4096;
enum State { kReady, kAtWarp, kAtBlock, kDone };
struct Fiber {
  char* stack = nullptr;
  void* top = nullptr;
  State state = kDone;
  int kind = 0;
  unsigned turn = 0;
};
struct Kernel {
  void (*call)(void**);
  bool meets;
  char *shared_begin, *shared_end;
  std::string name;
};
std::vector<Fiber> fibers(1024);
kb_words given[32][2][32];
void* scheduler;
unsigned current, threads;
Kernel* running;
void** arguments;
std::map<void*, std::pair<void*, size_t>> allocations;
long launches;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "emulator: %s: %s, block (%u, %u, %u), thread %u of %u\n", running ? running->name.c_str() : "?",
          what, kb_block.x, kb_block.y, kb_block.z, current, threads);
  fflush(stderr);
  _exit(70);
}
void place(unsigned thread) {
  current = thread;
  kb_thread = {thread % kb_block_size.x, thread / kb_block_size.x % kb_block_size.y,
               thread / (kb_block_size.x * kb_block_size.y)};
}
void enter() {
  running->call(arguments);
  fibers[current].state = kDone;
  kb_switch(&fibers[current].top, scheduler);
  abort();
}
void pause(State state) {
  fibers[current].state = state;
  unsigned me = current;
  kb_switch(&fibers[me].top, scheduler);
}
void prepare(Fiber& fiber) {
  if (!fiber.stack)
    fiber.stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void** top = (void**)(fiber.stack + kStack) - 2;
  *top = (void*)enter;
  fiber.top = top - 6;
  fiber.state = kReady;
  fiber.turn = 0;
}
// Let a warp or the block go on when all its living threads wait at the same place.
bool release() {
  bool any = false, all_at_block = true;
  for (unsigned w = 0; w < threads; w += 32) {
    unsigned end = w + 32 < threads ? w + 32 : threads, waiting = 0, living = 0;
    int kind = 0;
    bool same = true;
    for (unsigned t = w; t < end; ++t) {
      living += fibers[t].state != kDone;
      all_at_block &= fibers[t].state == kDone || fibers[t].state == kAtBlock;
      if (fibers[t].state != kAtWarp) continue;
      same &= !waiting || fibers[t].kind == kind;
      kind = fibers[t].kind;
      ++waiting;
    }
    if (!waiting || waiting != living) continue;
    if (living != end - w) fail("a thread of the warp has left before a warp function");
    if (!same) fail("threads of one warp wait in different warp functions");
    for (unsigned t = w; t < end; ++t) fibers[t].state = kReady;
    any = true;
  }
  if (any || !all_at_block) return any;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != kAtBlock) fail("a thread has left before a barrier");
    fibers[t].state = kReady;
  }
  return true;
}
void run_block(bool backward) {
  if (!running->meets) {
    for (unsigned i = 0; i < threads; ++i) { place(backward ? threads - 1 - i : i); running->call(arguments); }
    return;
  }
  for (unsigned t = 0; t < threads; ++t) prepare(fibers[t]);
  for (;;) {
    unsigned done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      unsigned t = backward ? threads - 1 - i : i;
      if (fibers[t].state == kReady) { place(t); kb_switch(&scheduler, fibers[t].top); }
      done += fibers[t].state == kDone;
    }
    if (done == threads) return;
    if (!release()) fail("deadlock: threads wait in different places");
  }
}
void run_grid() {
  const char* order = getenv("KBITC_EMULATOR_ORDER");
  bool backward = order && !strcmp(order, "backward");
  uint64_t count = (uint64_t)kb_grid_size.x * kb_grid_size.y * kb_grid_size.z;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t b = backward ? count - 1 - i : i;
    kb_block = {(unsigned)(b % kb_grid_size.x), (unsigned)(b / kb_grid_size.x % kb_grid_size.y),
                (unsigned)(b / kb_grid_size.x / kb_grid_size.y)};
    memset(running->shared_begin, 0xA5, running->shared_end - running->shared_begin);
    run_block(backward);
  }
}
// Device memory ends at a page that cannot be touched, so that a read past the end is a crash, and starts as NaN.
void* allocate(size_t size) {
  size_t used = (size + 15) / 16 * 16, whole = (used + kPage - 1) / kPage * kPage + kPage;
  if (!used) used = 16, whole = 2 * kPage;
  char* base = (char*)mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  mprotect(base + whole - kPage, kPage, PROT_NONE);
  char* start = base + whole - kPage - used;
  memset(start, 0xFF, used);
  allocations[start] = {base, whole};
  return start;
}
}  // namespace

extern "C" {
void kb_sync_block(void) { pause(kAtBlock); }
unsigned kb_lane(void) { return current % 32; }
const kb_words* kb_sync_warp(int kind, kb_words words) {
  // Two tables in turn: a lane reaches the next but one only after all have read this one.
  Fiber& fiber = fibers[current];
  unsigned warp = current / 32, turn = fiber.turn++ & 1;
  given[warp][turn][current % 32] = words;
  fiber.kind = kind;
  pause(kAtWarp);
  return given[warp][turn];
}
long kb_launches(void) { return launches; }

// ---- driver API
struct LaunchConfig { unsigned gx, gy, gz, bx, by, bz, shared; void *stream, *attributes; unsigned count; };
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* d, int) { *d = 0; return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetAttribute(int* v, int a, int) { *v = a == 75 ? 9 : 0; return 0; }
int cuDeviceGetName(char* name, int n, int) { snprintf(name, n, "kbitc emulator"); return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuGetErrorName(int, const char** s) { *s = "EMULATED_ERROR"; return 0; }
int cuGetErrorString(int, const char** s) { *s = "error of the emulated device"; return 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuModuleLoadData(void** module, const void* image) {
  const char* mark = "KBITC-EMULATED ";
  if (strncmp((const char*)image, mark, strlen(mark))) return 200;
  *module = dlopen((const char*)image + strlen(mark), RTLD_NOW | RTLD_LOCAL);
  if (!*module) fprintf(stderr, "emulator: %s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** f, void* module, const char* name) {
  std::string key = name;
  void* call = dlsym(module, ("kb_call_" + key).c_str());
  if (!call) return 500;
  bool* meets = (bool*)dlsym(module, ("kb_meets_" + key).c_str());
  char** shared = (char**)dlsym(module, "kb_shared_range");
  *f = new Kernel{(void (*)(void**))call, *meets, shared[0], shared[1], key};
  return 0;
}
int cuLaunchKernelEx(const LaunchConfig* c, void* f, void** params, void**) {
  threads = c->bx * c->by * c->bz;
  running = (Kernel*)f;
  if (!threads || threads > 1024 || !c->gx || !c->gy || !c->gz || c->gy > 65535 || c->gz > 65535) {
    fprintf(stderr, "emulator: %s: launch %ux%ux%u of %ux%ux%u\n", running->name.c_str(), c->gx, c->gy, c->gz, c->bx,
            c->by, c->bz);
    return 1;
  }
  arguments = params;
  kb_grid_size = {c->gx, c->gy, c->gz};
  kb_block_size = {c->bx, c->by, c->bz};
  ++launches;
  run_grid();
  return 0;
}

// ---- runtime API
typedef void* Handle;
int cudaGetDeviceCount(int* n) { *n = 1; return 0; }
int cudaGetDevice(int* d) { *d = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(void* p, int) { memset(p, 0, 256); return 0; }
int cudaDeviceGetAttribute(int* v, int a, int) {
  // 1 threads per block, 8 shared bytes, 10 warp size, 16 processors, 75 and 76 compute capability
  *v = a == 1 ? 1024 : a == 8 ? 49152 : a == 10 ? 32 : a == 16 ? 4 : a == 75 ? 9 : 0;
  return 0;
}
int cudaMalloc(void** p, size_t n) { *p = allocate(n); return *p ? 0 : 2; }
int cudaMallocHost(void** p, size_t n) { *p = allocate(n); return *p ? 0 : 2; }
int cudaFree(void* p) {
  auto it = allocations.find(p);
  if (it == allocations.end()) return p ? 1 : 0;
  munmap(it->second.first, it->second.second);
  allocations.erase(it);
  return 0;
}
int cudaFreeHost(void* p) { return cudaFree(p); }
int cudaMemGetInfo(size_t* f, size_t* t) { *f = *t = (size_t)1 << 33; return 0; }
int cudaMemcpyAsync(void* d, const void* s, size_t n, int, Handle) { memmove(d, s, n); return 0; }
int cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, Handle) { memmove(d, s, n); return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
const char* cudaGetErrorName(int) { return "emulated"; }
const char* cudaGetErrorString(int) { return "error of the emulated device"; }
int cudaEventCreate(Handle* e) { *e = e; return 0; }
int cudaEventDestroy(Handle) { return 0; }
int cudaEventElapsedTime(float* ms, Handle, Handle) { *ms = 0; return 0; }
int cudaEventRecord(Handle, Handle) { return 0; }
int cudaEventSynchronize(Handle) { return 0; }
int cudaStreamCreate(Handle* s) { *s = nullptr; return 0; }
int cudaStreamCreateWithFlags(Handle* s, unsigned) { *s = nullptr; return 0; }
int cudaStreamDestroy(Handle) { return 0; }
int cudaStreamSynchronize(Handle) { return 0; }
int cudaStreamWaitEvent(Handle, Handle, unsigned) { return 0; }
int cudaStreamBeginCapture(Handle, int) { return 801; }
int cudaStreamEndCapture(Handle, Handle*) { return 801; }
int cudaGraphDestroy(Handle) { return 801; }
int cudaGraphExecDestroy(Handle) { return 801; }
int cudaGraphInstantiate(Handle*, Handle, unsigned long long) { return 801; }
int cudaGraphLaunch(Handle, Handle) { return 801; }
}
