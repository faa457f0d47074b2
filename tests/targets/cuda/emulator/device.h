// CUDA C++ as the host compiler understands it: built-in variables, memory spaces, and the meaning of each device
// function that kbitc's kernels use. Written from the CUDA C++ Programming Guide and the PTX ISA, not from the kernels.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "machine.h"

#define __global__
#define __device__ static inline
#define __host__
#define __forceinline__
#define __launch_bounds__(...)
#define __restrict__ __restrict
// One block runs at a time, so shared memory is static memory; the section lets the emulator fill it with rubbish.
#define __shared__ static __attribute__((section("kb_shared"), used))
#define threadIdx kb_thread
#define blockIdx kb_block
#define blockDim kb_block_size
#define gridDim kb_grid_size
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF ((double)INFINITY)
#define CUDART_NAN ((double)NAN)
#define KB_WARP_SHUFFLE 1
#define KB_WARP_MMA 2
#define KB_WARP_SYNC 3

#define KB_VECTOR2(T, N) struct alignas(2 * sizeof(T)) N##2 { T x, y; }; \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }
#define KB_VECTOR4(T, N) struct alignas(4 * sizeof(T)) N##4 { T x, y, z, w; }; \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define KB_VECTORS(T, N) KB_VECTOR2(T, N) KB_VECTOR4(T, N)
KB_VECTORS(signed char, char) KB_VECTORS(unsigned char, uchar) KB_VECTORS(short, short)
KB_VECTORS(unsigned short, ushort) KB_VECTORS(int, int) KB_VECTORS(unsigned, uint) KB_VECTORS(float, float)
KB_VECTOR2(int64_t, longlong) KB_VECTOR2(double, double)
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

struct half {
  _Float16 v;
  half() = default;
  template <typename T> half(T x) : v((_Float16)x) {}
  operator float() const { return (float)v; }
};
static inline float __half2float(half x) { return (float)x.v; }
static inline half __float2half_rn(float x) { return half(x); }

static inline void __syncthreads() { kb_sync_block(); }
static inline void __syncwarp(unsigned = ~0u) { kb_sync_warp(KB_WARP_SYNC, {}); }
template <typename T> static inline T kb_take(T value, unsigned lane) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most four words here");
  kb_words given = {};
  memcpy(&given, &value, sizeof(T));
  memcpy(&value, &kb_sync_warp(KB_WARP_SHUFFLE, given)[lane], sizeof(T));
  return value;
}
// A lane outside the segment of `width` lanes keeps its own value (Programming Guide, warp shuffle functions).
template <typename T> static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  unsigned lane = kb_lane(), other = lane ^ mask;
  return kb_take(value, other / width > lane / width ? lane : other);
}
template <typename T> static inline T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  unsigned lane = kb_lane();
  return kb_take(value, lane % width + delta < (unsigned)width ? lane + delta : lane);
}
template <typename T> static inline T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
  unsigned lane = kb_lane();
  return kb_take(value, lane % width >= delta ? lane - delta : lane);
}
template <typename T> static inline T __shfl_sync(unsigned, T value, int from, int width = 32) {
  unsigned lane = kb_lane();
  return kb_take(value, lane / width * width + from % width);
}
static inline unsigned __activemask() { return ~0u; }

static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
  return c;
}
// PTX prmt in its default mode: a selector with bit 3 set repeats the sign of the chosen byte.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned pick = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
static inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
static inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
static inline int __float_as_int(float x) { int r; memcpy(&r, &x, 4); return r; }
#define __expf expf
#define __logf logf
#define __tanhf tanhf
#define __cosf cosf
#define __sinf sinf
#define __powf powf
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T> static inline T __ldg(const T* p) { return *p; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

// PTX ISA, "Matrix fragments for mma.m16n8k16 / .m16n8k32 with .s8": lane = 4 * group + member holds, of A, the rows
// group (registers 0, 2) and group + 8 (1, 3), bytes 4 * member + i of the first and second 16 columns; of B,
// column group, the same bytes; of C, rows group and group + 8, columns 2 * member and 2 * member + 1.
#define KBITC_MMA_S8
static inline void kb_mma_s8(int* c, const unsigned* a, const unsigned* b, int halves) {
  kb_words left = {}, right = {};
  for (int i = 0; i < 2 * halves; ++i) left.w[i] = a[i];
  for (int i = 0; i < halves; ++i) right.w[i] = b[i];
  kb_words rows[32], columns[32];
  memcpy(rows, kb_sync_warp(KB_WARP_MMA, left), sizeof rows);
  memcpy(columns, kb_sync_warp(KB_WARP_MMA, right), sizeof columns);
  unsigned lane = kb_lane(), group = lane / 4, member = lane % 4;
  for (int e = 0; e < 4; ++e)
    for (int half = 0; half < halves; ++half)
      for (int quad = 0; quad < 4; ++quad)
        c[e] = __dp4a(rows[4 * group + quad].w[2 * half + e / 2], columns[4 * (2 * member + e % 2) + quad].w[half], c[e]);
}
static inline void kbitc_mma_s8_k32(int* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  kb_mma_s8(c, a, b, 2);
}
static inline void kbitc_mma_s8_k16(int* c, unsigned a0, unsigned a1, unsigned b0) {
  unsigned a[2] = {a0, a1}, b[1] = {b0};
  kb_mma_s8(c, a, b, 1);
}
