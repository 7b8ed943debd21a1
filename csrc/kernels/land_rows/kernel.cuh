// Copies rows into blocks of a pool, and adds up the digest of each from the registers that are stored.
//
// Thread map: a row is cut into tiles of LAND_TILE words of BYTES bytes (64 KiB), the last one may be
// shorter. Tiles are counted column by column, and a thread block has an equal share of them, one behind the
// other:
//
//            tile 0   tile 1   tile 2 of a row
//   row 0   |   0    |   4    |   8    |
//   row 1   |   1    |   5    |   9    |      two thread blocks: tiles 0 to 5, and 6 to 11
//   row 2   |   2    |   6    |   10   |
//   row 3   |   3    |   7    |   11   |
//
// So the factors of a column are loaded once for all its rows, and of the rows' bytes nothing is moved twice:
// they are read once and written once. A thread has LAND_UNROLL words of a tile, LAND_THREADS apart, and all
// its loads in flight before it needs the first. Its sum goes through its warp, and then to the row's digest
// in memory.
//
// Bytes may come into `rows` while this runs. Whatever is read is what is stored and what is digested: each
// word is loaded by one instruction that is not repeated.
#pragma once

#include "../common/ptx.cuh"
#include "params.h"

namespace xlayer {

constexpr int LAND_THREADS = 512;
constexpr int LAND_UNROLL = 8;
constexpr int LAND_TILE = LAND_THREADS * LAND_UNROLL;

template <int BYTES>
struct alignas(BYTES) LandWord {
  uint64_t at[BYTES / 8];
};

// BYTES: 16 where everything is 16-byte aligned, else 8. columns: tiles of a row.
template <int BYTES, bool DIGEST>
__global__ void __launch_bounds__(LAND_THREADS) land_rows_kernel(const LandRowsParams p, int64_t columns) {
  using Word = LandWord<BYTES>;
  const int64_t length = p.row_bytes / BYTES;
  const int64_t tiles = columns * p.num_rows;
  const int64_t end = tiles * (blockIdx.x + 1) / gridDim.x;
  int64_t tile = tiles * blockIdx.x / gridDim.x;
  int64_t column = tile / p.num_rows;
  int64_t row = tile - column * p.num_rows;
  for (; tile < end; ++column, row = 0) {
    const int64_t first = column * LAND_TILE + threadIdx.x;
    Word factors[LAND_UNROLL] = {};
    if constexpr (DIGEST) {
#pragma unroll
      for (int i = 0; i < LAND_UNROLL; ++i) {
        const int64_t at = first + i * LAND_THREADS;
        if (at < length) factors[i] = reinterpret_cast<const Word*>(p.factors)[at];
      }
    }
    for (; row < p.num_rows && tile < end; ++row, ++tile) {
      const uint8_t* from = p.rows + row * p.row_bytes + first * BYTES;
      Word words[LAND_UNROLL] = {};
#pragma unroll
      for (int i = 0; i < LAND_UNROLL; ++i) {
        if (first + i * LAND_THREADS < length) {
          ptx::load_global<BYTES>(from + int64_t(i) * LAND_THREADS * BYTES, words[i].at);
        }
      }
      const int64_t block = p.blocks[row];
      if (block < 0 || block >= p.num_blocks) continue;  // the same for all threads
      uint8_t* to = p.pool + block * p.pool_stride + first * BYTES;
      uint64_t sum = 0;
#pragma unroll
      for (int i = 0; i < LAND_UNROLL; ++i) {
        if (first + i * LAND_THREADS < length) {
          *reinterpret_cast<Word*>(to + int64_t(i) * LAND_THREADS * BYTES) = words[i];
        }
        if constexpr (DIGEST) {
#pragma unroll
          for (int j = 0; j < BYTES / 8; ++j)
            sum += words[i].at[j] * factors[i].at[j];  // past the end: 0 * 0
        }
      }
      if constexpr (DIGEST) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
        if (threadIdx.x % 32 == 0) {
          atomicAdd(reinterpret_cast<unsigned long long*>(p.digests + row),
                    static_cast<unsigned long long>(sum));
        }
      }
    }
  }
}

}  // namespace xlayer
