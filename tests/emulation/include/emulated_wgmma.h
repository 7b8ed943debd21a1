// What wgmma.cuh wraps, emulated. See simt.h. Products happen when they are waited for, or at once
// (late_copies).
#pragma once

#include <array>

#include "simt.h"

namespace xlayer::wgmma {

constexpr int WARPGROUP = 128;

struct Product {
  float* d;
  uint64_t a, b;
  uint32_t rows[4];  // a's, where it is in registers
  bool in_registers, adds;
};
struct Warpgroup {
  // [thread][group of products], the last one not committed yet
  std::array<std::vector<std::vector<Product>>, WARPGROUP> asked;
};
inline Warpgroup& warpgroup() {
  static std::map<int, Warpgroup> all;
  return all[simt::machine().current / WARPGROUP];
}
inline int rank() { return simt::machine().current % WARPGROUP; }
template <class F>
void together(const char* operation, F then) {
  simt::meet(simt::machine().barriers[1000 + simt::machine().current / WARPGROUP], WARPGROUP, operation,
             then);
}

// Half `column` of row `row`, by K: rows are 128 bytes, eight of them 1024 to the next eight, chunks
// permuted.
inline double by_k(uint64_t descriptor, int row, int column) {
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at = (uint32_t(descriptor & 0x3FFF) << 4) + row / 8 * stride + row % 8 * 128 + 2 * column;
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, simt::shared_at(at & ~1u, 2), 2);
  return double(__builtin_bit_cast(_Float16, bits));
}
// Half `column` of what is summed at `row`, by MN.
inline double by_mn(uint64_t descriptor, int row, int column) {
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at = (uint32_t(descriptor & 0x3FFF) << 4) + row / 8 * stride + row % 8 * 128 +
                column / 64 * leading + 2 * (column % 64);
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, simt::shared_at(at, 2), 2);
  return double(__builtin_bit_cast(_Float16, bits));
}

inline void do_first(Warpgroup& group) {
  const size_t products = group.asked[0].front().size();
  for (size_t n = 0; n < products; ++n) {
    static double a[64][16], b[16][128];
    for (int t = 0; t < WARPGROUP; ++t) {
      const Product& p = group.asked[t].front()[n];
      if (!p.in_registers) continue;
      const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < 2; ++i) {
          a[row + r % 2 * 8][column + r / 2 * 8 + i] =
              double(__builtin_bit_cast(_Float16, uint16_t(p.rows[r] >> (16 * i))));
        }
      }
    }
    const Product& first = group.asked[0].front()[n];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64 && !first.in_registers; ++row) a[row][k] = by_k(first.a, row, k);
      for (int c = 0; c < 128; ++c) b[k][c] = first.in_registers ? by_mn(first.b, k, c) : by_k(first.b, c, k);
    }
    for (int t = 0; t < WARPGROUP; ++t) {
      const Product& p = group.asked[t].front()[n];
      for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < 4; ++i) {
          const int row = t / 32 * 16 + t % 32 / 4 + i / 2 * 8, c = 8 * j + t % 4 * 2 + i % 2;
          double sum = p.adds ? p.d[4 * j + i] : 0.0;
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][c];
          p.d[4 * j + i] = float(sum);
        }
      }
    }
  }
  for (auto& asked : group.asked) asked.erase(asked.begin());
}

inline void fence() {}
inline std::vector<std::vector<Product>>& mine() {
  auto& asked = warpgroup().asked[rank()];
  if (asked.empty()) asked.emplace_back();
  return asked;
}
// All but the last `left` of the groups that were committed.
inline void finish(const char* operation, size_t left) {
  together(operation, [left, g = &warpgroup()] {
    while (g->asked[0].size() > left + 1) do_first(*g);
  });
}
inline void commit() {
  mine().emplace_back();
  if (!simt::machine().late_copies) finish("wgmma", 0);
}
template <int N>
void wait(float (&)[64]) {
  // Who was told too early that shared memory is free writes it now.
  if (simt::machine().late_copies) simt::let_others();
  finish("wgmma wait", N);
}
inline void multiply(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
  mine().back().push_back({d, a, b, {}, false, adds});
}
inline void multiply_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  mine().back().push_back({d, 0, b, {a[0], a[1], a[2], a[3]}, true, true});
}

struct Barrier {
  uint32_t count, pending, phase, bytes;  // bytes: of copies that are expected, modulo 2^32
  std::vector<simt::Copy> copies;         // late_copies: done by the next who waits
};
inline std::map<uint32_t, Barrier>& barriers() {
  static std::map<uint32_t, Barrier> all;
  return all;
}
inline void barrier_init(uint32_t barrier, uint32_t count) { barriers()[barrier] = {count, count, 0, 0, {}}; }
inline void end_phase(Barrier& b) {
  ++simt::machine().progress;
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}
inline void barrier_arrive(uint32_t barrier) {
  Barrier& b = barriers()[barrier];
  --b.pending;
  end_phase(b);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  barriers()[barrier].bytes += bytes;
  barrier_arrive(barrier);
}
inline void do_copy(Barrier& b, const simt::Copy& copy) {
  for (int i = 0; i < copy.bytes; i += 16) {
    std::memcpy(simt::shared_at(copy.to + i, 16), static_cast<const uint8_t*>(copy.from) + i, 16);
  }
  b.bytes -= copy.bytes;
  end_phase(b);
}
inline void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if ((to | bytes | uintptr_t(from)) % 16 != 0) simt::fail("a bulk copy is not aligned");
  Barrier& b = barriers()[barrier];
  const simt::Copy copy{to, from, int(bytes)};
  if (simt::machine().late_copies) {
    b.copies.push_back(copy);
  } else {
    do_copy(b, copy);
  }
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  Barrier& b = barriers()[barrier];
  for (const simt::Copy& copy : std::exchange(b.copies, {})) do_copy(b, copy);
  while (b.phase == parity) simt::yield();
}
inline void barriers_are_seen() {}
inline void stores_are_seen() {}
template <int>
void give_back_registers() {}
template <int>
void take_registers() {}

}  // namespace xlayer::wgmma
