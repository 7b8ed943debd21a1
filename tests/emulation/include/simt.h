// Runs CUDA kernels on a CPU, lane by lane, for tests where no GPU is.
//
// Every thread of a block is a fiber. It runs until it meets the others (a warp's shuffle, vote, matrix
// product; a block's barrier), and goes on when all of them are there. A warp runs on as far as barriers let it
// before another does. So the code of the kernels themselves runs: their addresses, masks, schedules, rings of
// buffers, and a barrier that is missing shows in one of the two orders of warps. What does not show: speed,
// finer races between warps, and what nvcc makes of the code.
//
// Stricter than a GPU: lanes that meet at different operations, a block that waits for ever, or a
// shared-memory access outside of what was asked for end the program with a message. Shared memory starts as
// 0xFF.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

// Fibers do not run at the same time.
inline int atomicMin(int* at, int x) { return std::exchange(*at, min(*at, x)); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long x) {
  return std::exchange(*at, *at + x);
}
inline int atomicMax(int* at, int x) { return std::exchange(*at, max(*at, x)); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

constexpr int WARP = 32, STACK_BYTES = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

// What a group of lanes does together: the last one to arrive does it for all.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  const char* operation = nullptr;
  uint32_t in[WARP][8], out[WARP][4];
};

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

struct Machine {
  std::vector<uint8_t> shared;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::map<std::pair<int, uint32_t>, Meeting> parts;  // of a warp, by their mask
  Meeting block;
  std::map<int, Meeting> barriers;  // of some of the block's threads, by their number
  std::vector<std::vector<std::vector<Copy>>> copies;  // [thread][group]
  bool late_copies = true;  // asynchronous copies happen when they are waited for, else at once
  ucontext_t scheduler;
  int current = 0;
  long progress = 0;
  long round = 0;  // of all warps
  dim3 thread_index, block_index, grid;
  std::function<void()> body;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void yield() {
  Machine& m = machine();
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

// Lets all other warps go on, as far as they can.
inline void let_others() {
  const long round = machine().round;
  ++machine().progress;
  while (machine().round == round) yield();
}

// Meets the other lanes of the group; `together` runs once, when all are there.
template <class F>
void meet(Meeting& meeting, int members, const char* operation, F together) {
  Machine& m = machine();
  if (meeting.arrived == 0) meeting.operation = operation;
  if (std::strcmp(meeting.operation, operation) != 0) fail("lanes meet at different operations");
  const long generation = meeting.generation;
  if (++meeting.arrived == members) {
    together();
    meeting.arrived = 0;
    ++meeting.generation;
    ++m.progress;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline int lane() { return machine().current % WARP; }
inline Meeting& warp() { return machine().warps[machine().current / WARP]; }

inline void entry() {
  Machine& m = machine();
  m.body();
  m.fibers[m.current].done = true;
  ++m.progress;
  yield();
}

// Until all its lanes are done or wait for other warps. Returns how many are not done.
inline int run_warp(int warp) {
  Machine& m = machine();
  int left = 0;
  for (long before = m.progress - 1; m.progress != before;) {
    before = m.progress;
    left = 0;
    for (int t = warp * WARP; t < (warp + 1) * WARP; ++t) {
      if (m.fibers[t].done) continue;
      m.current = t;
      m.thread_index.x = unsigned(t);
      swapcontext(&m.scheduler, &m.fibers[t].context);
      left += !m.fibers[t].done;
    }
  }
  return left;
}

inline void run_block(int threads) {
  Machine& m = machine();
  m.fibers.resize(threads);
  m.warps.assign(threads / WARP, {});
  m.parts.clear();
  m.block = {};
  m.barriers.clear();
  m.copies.assign(threads, {});
  for (Fiber& f : m.fibers) {
    if (!f.stack) f.stack.reset(new char[STACK_BYTES]);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, STACK_BYTES};
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  const int warps = threads / WARP;
  for (int left = threads; left > 0;) {
    const long before = m.progress;
    left = 0;
    ++m.round;
    for (int w = 0; w < warps; ++w) left += run_warp(m.late_copies ? w : warps - 1 - w);
    if (left > 0 && m.progress == before) fail("some threads wait for others that never come");
  }
}

template <class F>
void launch(dim3 grid, int threads, size_t shared_bytes, F kernel) {
  Machine& m = machine();
  m.grid = grid;
  m.body = kernel;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned at = m.late_copies ? i : blocks - 1 - i;  // both orders are seen
    m.shared.assign(shared_bytes + 256, 0xFF);
    m.block_index = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    run_block(threads);
  }
}

// Dynamic shared memory as the kernel sees it: 128-byte aligned.
inline uint8_t* shared_base() {
  uint8_t* p = machine().shared.data();
  return p + (128 - reinterpret_cast<uintptr_t>(p) % 128) % 128;
}
inline uint8_t* shared_at(uint32_t address, int bytes) {
  if (address + size_t(bytes) > machine().shared.size() - 128) fail("shared memory: out of bounds");
  if (address % bytes != 0) fail("shared memory: misaligned");
  return shared_base() + address;
}

// Among the lanes of a mask; the others of the warp may be elsewhere.
inline uint32_t exchange(const char* operation, uint32_t mask, uint32_t mine, int from) {
  Machine& m = machine();
  Meeting& w = mask == ~0u ? warp() : m.parts[{m.current / WARP, mask}];
  const int me = lane();
  if ((mask >> me & 1) == 0 || (mask >> from % WARP & 1) == 0) fail("a shuffle with a lane outside of its mask");
  w.in[me][0] = mine;
  w.in[me][1] = uint32_t(from);
  meet(w, __builtin_popcount(mask), operation, [&w, mask] {
    for (int i = 0; i < WARP; ++i) {
      if ((mask >> i & 1) != 0) w.out[i][0] = w.in[w.in[i][1] % WARP][0];
    }
  });
  return w.out[me][0];
}

}  // namespace simt

#define threadIdx (simt::machine().thread_index)
#define blockIdx (simt::machine().block_index)
#define gridDim (simt::machine().grid)
#define XLAYER_DYNAMIC_SHARED(name) uint8_t* name = simt::shared_base()

inline void __syncthreads() {
  simt::meet(simt::machine().block, int(simt::machine().fibers.size()), "__syncthreads", [] {});
}
inline int __syncthreads_or(int vote) {
  static int any = 0, result = 0;
  any |= vote;
  simt::meet(simt::machine().block, int(simt::machine().fibers.size()), "__syncthreads_or", [] {
    result = any;
    any = 0;
  });
  return result;
}
inline void __syncwarp() {
  simt::meet(simt::warp(), simt::WARP, "__syncwarp", [] {});
}

template <class T>
T __shfl_sync(unsigned lanes, T x, int from) {
  return __builtin_bit_cast(T, simt::exchange("__shfl_sync", lanes, __builtin_bit_cast(uint32_t, x), from));
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
  const uint32_t got =
      simt::exchange("__shfl_xor_sync", lanes, __builtin_bit_cast(uint32_t, x), simt::lane() ^ mask);
  return __builtin_bit_cast(T, got);
}
inline uint64_t __shfl_xor_sync(unsigned lanes, uint64_t x, int mask) {
  const int from = simt::lane() ^ mask;
  const uint64_t low = simt::exchange("__shfl_xor_sync", lanes, uint32_t(x), from);
  return low | uint64_t(simt::exchange("__shfl_xor_sync", lanes, uint32_t(x >> 32), from)) << 32;
}
template <class T>
T __shfl_up_sync(unsigned lanes, T x, int by) {
  const int from = simt::lane() < by ? simt::lane() : simt::lane() - by;
  return __builtin_bit_cast(T, simt::exchange("__shfl_up_sync", lanes, __builtin_bit_cast(uint32_t, x), from));
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  simt::Meeting& w = simt::warp();
  const int me = simt::lane();
  w.in[me][0] = vote;
  simt::meet(w, simt::WARP, "__ballot_sync", [&w] {
    uint32_t all = 0;
    for (int i = 0; i < simt::WARP; ++i) all |= w.in[i][0] << i;
    for (int i = 0; i < simt::WARP; ++i) w.out[i][0] = all;
  });
  return w.out[me][0];
}
inline int __reduce_add_sync(unsigned, int x) {
  simt::Meeting& w = simt::warp();
  w.in[simt::lane()][0] = uint32_t(x);
  simt::meet(w, simt::WARP, "__reduce_add_sync", [&w] {
    w.out[0][0] = 0;
    for (int i = 0; i < simt::WARP; ++i) w.out[0][0] += w.in[i][0];
  });
  return int(w.out[0][0]);
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = select >> (4 * i) & 0xF;
    if (s & 8) simt::fail("__byte_perm: sign replication is not emulated");
    out |= uint32_t(bytes >> (8 * s) & 0xFF) << (8 * i);
  }
  return out;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __fdividef(float a, float b) { return a / b; }
