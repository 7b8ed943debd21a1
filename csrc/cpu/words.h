// A page's words on the CPU: from a table, since each is read in every step.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "../kernels/nvfp4/packed.cuh"

namespace xlayer::cpu {

// What a lane's 16 bits are as the upper half of a word of nibbles, whichever lane: its elements in place of those of
// lane 1.
inline const std::array<uint32_t, 1 << 16>& lanes() {
  static const auto table = [] {
    std::array<uint32_t, 1 << 16> nibbles;
    for (uint32_t lane = 0; lane < nibbles.size(); ++lane) nibbles[lane] = unpack(lane);
    return nibbles;
  }();
  return table;
}

// The eight nibbles of the word at p, element 0 the lowest.
inline uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return lanes()[word & 0xFFFFu] | lanes()[word >> 16] << 8;
}

}  // namespace xlayer::cpu
