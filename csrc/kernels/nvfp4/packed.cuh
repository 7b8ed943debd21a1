// How a page keeps e2m1 data: so that a GPU without FP4 instructions makes halves of it with few others.
//
// A word of 32 bits has eight elements, in two lanes of 16 bits: lane 0 the elements 0, 1, 4 and 5, in places
// 0 to 3, lane 1 the elements 2, 3, 6 and 7. A lane's bits, s a sign and xyz the other three of e2m1:
//
//   bit    15  14  13  12   11  10   9    8   7   6    5   4   3    2   1   0
//   place  s0  s1  s2  s3   x0  y0  z0   x3  y3  z3   x2  y2  z2   x1  y1  z1
//
// with s1, x1, y1, z1 changed (exclusive or) by bits 6, 10, 9, 8, and s2, x2, y2, z2 by bits 9, 9, 8, 7.
//
// A half needs an element's sign in bit 15 and the rest in bits 11 to 9 (dequantise.cuh). So place 0 is a
// mask, place 3 a shift by 3 and a mask; places 1 and 2 are two shifts, whose exclusive or is masked, an
// instruction. What that brings along from other places is what was put in. All shifts are to the left: nvcc
// makes multiplications of them, for a pipe that has time. And nothing goes from a lane to the other: V's
// tokens are exchanged by lanes before they become halves.
#pragma once

#include "../common/host_device.h"

namespace xlayer {

constexpr int WORD_ELEMENTS = 8;

// Where bits are before they are changed, of a word's element 0 to 7: its lane's first bit, its place.
XLAYER_HD int lane_of(int element) { return element / 2 % 2 * 16; }
XLAYER_HD int place_of(int element) { return element / 4 * 2 + element % 2; }
XLAYER_HD int sign_bit(int place) { return 15 - place; }
XLAYER_HD int code_bit(int place) { return place == 0 ? 9 : 3 * (place - 1); }

// Changes places 1 and 2, or changes them back.
XLAYER_HD uint32_t change(uint32_t w) {
  return w ^ ((w >> 8) & 0x00070007u) ^ ((w << 8) & 0x40004000u) ^ ((w >> 4) & 0x00380038u) ^
         ((w << 4) & 0x20002000u);
}

// All signs of a word.
constexpr uint32_t SIGNS = 0xF000F000u;

// 2 to the power of how far to shift. In attention not known at compile time: nvcc then leaves the left shifts
// multiplications, which run beside the logic pipe. That one is full there.
struct Shifts {
  uint32_t by_1 = 2, by_2 = 4, by_3 = 8, by_6 = 64, by_9 = 512;
};

// Nibbles (sign in bit 3), element 0 the lowest, to a word of a page, and back.
XLAYER_HD uint32_t pack(uint32_t nibbles) {
  uint32_t w = 0;
  for (int i = 0; i < WORD_ELEMENTS; ++i) {
    const uint32_t nibble = nibbles >> (4 * i);
    w |= (nibble & 7u) << (lane_of(i) + code_bit(place_of(i)));
    w |= (nibble >> 3 & 1u) << (lane_of(i) + sign_bit(place_of(i)));
  }
  return change(w);
}
XLAYER_HD uint32_t unpack(uint32_t word) {
  const uint32_t w = change(word);
  uint32_t nibbles = 0;
  for (int i = 0; i < WORD_ELEMENTS; ++i) {
    const uint32_t code = w >> (lane_of(i) + code_bit(place_of(i))) & 7u;
    const uint32_t sign = w >> (lane_of(i) + sign_bit(place_of(i))) & 1u;
    nibbles |= (code | sign << 3) << (4 * i);
  }
  return nibbles;
}

}  // namespace xlayer
