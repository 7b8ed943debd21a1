#include <cuda_runtime.h>

#include "launch.h"

#include "kernel.cuh"

namespace xlayer {

cudaError_t launch_newest_step(const NewestStepParams& p, cudaStream_t stream) {
  newest_step_kernel<<<unsigned(p.num_requests) + 1, NEWEST_STEP_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace xlayer
