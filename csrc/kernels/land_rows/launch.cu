#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

// One thread block on each SM of a quarter of them. Rows land beside decode steps, which lose the SMs that
// are taken, and come over a link that is a fraction of the memory's speed. By arithmetic, not measured: a
// thread block has 64 KiB in flight, so 33 of an H200's 132 SMs have 2.1 MiB, which at 1 us of latency is 2
// TB/s read and as much written, most of what its memory does. 64 MiB then take 32 us, and 0.6 ms to arrive
// over NVLink.
constexpr int SHARE_OF_SMS = 4;

template <int BYTES, bool DIGEST>
cudaError_t launch(const LandRowsParams& p, int sms, cudaStream_t stream) {
  const int64_t columns = ceil_div(p.row_bytes / BYTES, LAND_TILE);
  const int64_t ctas = std::min<int64_t>(columns * p.num_rows, std::max(1, sms / SHARE_OF_SMS));
  land_rows_kernel<BYTES, DIGEST><<<unsigned(ctas), LAND_THREADS, 0, stream>>>(p, columns);
  return cudaGetLastError();
}

template <int BYTES>
cudaError_t launch(const LandRowsParams& p, int sms, cudaStream_t stream) {
  return p.digests != nullptr ? launch<BYTES, true>(p, sms, stream) : launch<BYTES, false>(p, sms, stream);
}

}  // namespace

cudaError_t launch_land_rows(const LandRowsParams& p, cudaStream_t stream) {
  if (p.digests != nullptr) {
    const cudaError_t error = cudaMemsetAsync(p.digests, 0, size_t(p.num_rows) * sizeof *p.digests, stream);
    if (error != cudaSuccess) return error;
  }
  if (p.row_bytes == 0) return cudaSuccess;
  int device = 0, sms = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess) {
    return error;
  }
  const auto bits = reinterpret_cast<uintptr_t>(p.rows) | reinterpret_cast<uintptr_t>(p.pool) |
                    reinterpret_cast<uintptr_t>(p.factors) | uintptr_t(p.pool_stride) |
                    uintptr_t(p.row_bytes);
  return bits % 16 == 0 ? launch<16>(p, sms, stream) : launch<8>(p, sms, stream);
}

}  // namespace xlayer
