// What csrc/kernels/common/ptx.cuh wraps, emulated. See simt.h.
#pragma once

#include <cuda_fp16.h>

#include "simt.h"

namespace xlayer::ptx {

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - simt::shared_base());
}

inline uint32_t load_of_line(uint64_t address) {
  if (address % 4 != 0) simt::fail("ld.global: misaligned");
  return *reinterpret_cast<const uint32_t*>(address);
}

template <int BYTES>
void load_shared(uint32_t at, uint32_t* words) {
  std::memcpy(words, simt::shared_at(at, BYTES), BYTES);
}
inline void store_shared(uint32_t at, const uint32_t (&words)[4]) {
  std::memcpy(simt::shared_at(at, 16), words, 16);
}
inline void store_shared(uint32_t at, uint32_t word) { std::memcpy(simt::shared_at(at, 4), &word, 4); }
inline uint32_t load_shared_u8(uint32_t at) { return *simt::shared_at(at, 1); }
inline uint32_t load_shared_u16(uint32_t at) {
  uint16_t x;
  std::memcpy(&x, simt::shared_at(at, 2), 2);
  return x;
}

template <int BYTES>
void load_global(const void* from, uint64_t* words) {
  if (reinterpret_cast<uintptr_t>(from) % BYTES != 0) simt::fail("ld.global: misaligned");
  std::memcpy(words, from, BYTES);
}

// Wrong by one ulp either way, or right: nobody may rely on more.
inline float rcp_approx(float x) {
  static int calls = 0;
  const float y = 1.0f / x;
  const int off = ++calls % 3 - 1;
  return off == 0 || y == 0 || y - y != 0 ? y : std::nextafter(y, off > 0 ? INFINITY : 0.0f);
}

inline void pin(uint32_t&) {}
// Fails where lanes differ.
inline int uniform(int x) {
  if (simt::exchange("uniform", ~0u, uint32_t(x), 0) != uint32_t(x)) simt::fail("uniform: lanes differ");
  return x;
}

inline std::vector<std::vector<simt::Copy>>& my_copies() {
  auto& groups = simt::machine().copies[simt::machine().current];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void do_copy(const simt::Copy& c) { std::memcpy(simt::shared_at(c.to, c.bytes), c.from, c.bytes); }

template <int BYTES>
void cp_async(uint32_t to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % BYTES != 0) simt::fail("cp.async: misaligned source");
  const simt::Copy copy = {to, from, BYTES};
  if (simt::machine().late_copies) {
    my_copies().back().push_back(copy);
  } else {
    do_copy(copy);
  }
}
inline void cp_async_commit() { my_copies().emplace_back(); }
template <int PENDING>
void cp_async_wait() {
  auto& groups = my_copies();  // the last one is open
  while (groups.size() > size_t(PENDING) + 1) {
    for (const simt::Copy& c : groups.front()) do_copy(c);
    groups.erase(groups.begin());
  }
}

inline _Float16 half_of(uint32_t pair, int i) {
  return __builtin_bit_cast(_Float16, uint16_t(pair >> (16 * i)));
}

inline uint32_t saturated_halves(float low, float high) {
  constexpr float MOST = 65504.0f;
  const auto half = [](float x) {  // a NaN stays one
    return uint32_t(__builtin_bit_cast(uint16_t, _Float16(x > MOST ? MOST : x < -MOST ? -MOST : x)));
  };
  return half(low) | half(high) << 16;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16": lane = 4 g + t holds A rows g and g + 8, columns 2t, 2t + 1
// and 8 on; B column g, rows 2t, 2t + 1 and 8 on; C rows g and g + 8, columns 2t and 2t + 1.
inline void mma_16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                      uint32_t b1) {
  simt::Meeting& w = simt::warp();
  const int me = simt::lane();
  const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
  std::copy(in, in + 6, w.in[me]);
  simt::meet(w, simt::WARP, "mma", [&w] {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < simt::WARP; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) {
          a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + i] = double(half_of(w.in[lane][r], i));
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < 2; ++i) b[2 * t + 8 * r + i][g] = double(half_of(w.in[lane][4 + r], i));
      }
    }
    for (int lane = 0; lane < simt::WARP; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
        w.out[lane][i] = __builtin_bit_cast(uint32_t, float(sum));
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] += __builtin_bit_cast(float, w.out[me][i]);
}

// movmatrix: lane 4 g + t holds row g, columns 2t and 2t + 1, before and after.
inline uint32_t transpose_8x8(uint32_t x) {
  simt::Meeting& w = simt::warp();
  const int me = simt::lane();
  w.in[me][0] = x;
  simt::meet(w, simt::WARP, "movmatrix", [&w] {
    for (int lane = 0; lane < simt::WARP; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint32_t out = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * t + i;  // of the source, whose column is g
        out |= (w.in[4 * row + g / 2][0] >> (16 * (g % 2)) & 0xFFFF) << (16 * i);
      }
      w.out[lane][0] = out;
    }
  });
  return w.out[me][0];
}

inline unsigned thread_index() { return threadIdx.x; }
inline void barrier(int id, int threads) {
  simt::meet(simt::machine().barriers[id], threads, "barrier", [] {});
}
inline bool barrier_or(int id, int threads, bool says) {
  static std::map<int, bool> any, result;
  any[id] |= says;
  simt::meet(simt::machine().barriers[id], threads, "barrier_or", [id] {
    result[id] = any[id];
    any[id] = false;
  });
  return result[id];
}

inline int add_acq_rel(int* counter, int x) {
  const int before = *counter;
  *counter += x;
  return before;
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace xlayer::ptx
