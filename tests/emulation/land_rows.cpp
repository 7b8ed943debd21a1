// The kernel of land_rows on the CPU: for tests/ops/test_land_rows_emulated.py.
#include "simt.h"

#include "kernels/land_rows/kernel.cuh"

namespace {

template <int BYTES, bool DIGEST>
void run(const xlayer::LandRowsParams& p, int64_t ctas) {
  const int64_t columns = xlayer::ceil_div(p.row_bytes / BYTES, xlayer::LAND_TILE);
  simt::launch({unsigned(ctas), 1, 1}, xlayer::LAND_THREADS, 0,
               [&] { xlayer::land_rows_kernel<BYTES, DIGEST>(p, columns); });
}

}  // namespace

// factors, digests: as in LandRowsParams; the digests are zeros.
extern "C" void run_land_rows(const uint8_t* rows, uint8_t* pool, int64_t pool_stride, int64_t row_bytes,
                              const int64_t* blocks, int64_t num_rows, int64_t num_blocks,
                              const int64_t* factors, int64_t* digests, int64_t wide, int64_t ctas) {
  const xlayer::LandRowsParams p = {rows,     pool,       pool_stride, row_bytes, blocks,
                                    num_rows, num_blocks, factors,     digests};
  if (wide) {
    digests != nullptr ? run<16, true>(p, ctas) : run<16, false>(p, ctas);
  } else {
    digests != nullptr ? run<8, true>(p, ctas) : run<8, false>(p, ctas);
  }
}
