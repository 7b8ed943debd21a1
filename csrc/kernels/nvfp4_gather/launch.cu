#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

template <typename T, typename S>
cudaError_t launch(const Nvfp4GatherParams& p, cudaStream_t stream) {
  const auto kernel = gather_kernel<T, S>(p);
  int device = 0, sms = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, GATHER_THREADS, 0);
  }
  if (error != cudaSuccess) return error;
  const GatherPlan plan = gather_plan(p, sms * blocks);
  const dim3 grid(unsigned(ceil_div(p.num_tokens, plan.tokens())), unsigned(plan.rounds));
  kernel<<<grid, plan.threads, 0, stream>>>(p, plan, own_is_wide(p));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_nvfp4_gather(const Nvfp4GatherParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case Dtype::BF16: return launch<__nv_bfloat16, __nv_bfloat16>(params, stream);
    case Dtype::F16: return launch<__half, __half>(params, stream);
    case Dtype::F32:
      switch (params.source_dtype) {
        case Dtype::BF16: return launch<float, __nv_bfloat16>(params, stream);
        case Dtype::F16: return launch<float, __half>(params, stream);
        case Dtype::F32: return launch<float, float>(params, stream);
      }
  }
  return cudaErrorInvalidValue;
}

}  // namespace xlayer
