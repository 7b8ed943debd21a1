#include "kernel.cuh"
#include "launch.h"

namespace xlayer {

int nvfp4_prefix_rows(int head_size) {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes;
  // Not compiled for: asking is an error. Compiled for an sm_90 without `a`: there is nothing in it
  // (kernel.cuh).
  const bool there =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
      major == 9 && minor == 0 &&
      cudaFuncGetAttributes(&attributes, prefix::nvfp4_prefix_kernel) == cudaSuccess &&
      attributes.numRegs >= prefix::LEAST_REGISTERS;
  cudaGetLastError();
  return there && head_size == prefix::D ? prefix::ROWS : 0;
}

cudaError_t launch_nvfp4_prefix(const Nvfp4AttentionParams& p, cudaStream_t stream) {
  const auto kernel = prefix::nvfp4_prefix_kernel;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, prefix::SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const int rows = p.q_len * (p.num_q_heads / p.page.heads);
  const dim3 grid(unsigned((rows + prefix::ROWS - 1) / prefix::ROWS), unsigned(p.page.heads),
                  unsigned(p.num_requests));
  kernel<<<grid, prefix::THREADS, prefix::SHARED_BYTES, stream>>>(p, prefix::per_page(p.page.block_size));
  return cudaGetLastError();
}

}  // namespace xlayer
