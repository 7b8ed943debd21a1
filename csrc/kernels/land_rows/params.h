// land_rows: what its implementations are given.
#pragma once

#include "../common/host_device.h"

namespace xlayer {

struct LandRowsParams {
  const uint8_t* rows;    // [num_rows][row_bytes], dense
  uint8_t* pool;          // [num_blocks] rows
  int64_t pool_stride;    // bytes from a row of the pool to the next
  int64_t row_bytes;      // a multiple of 8
  const int64_t* blocks;  // [num_rows] the row of the pool that each goes to; outside of it: none
  int64_t num_rows;
  int64_t num_blocks;
  const int64_t* factors;  // [row_bytes / 8] where there are digests
  int64_t* digests;        // [num_rows] written: the sum of word * factor modulo 2^64, 0 of a row that goes
                           // nowhere; or nullptr
};

}  // namespace xlayer
