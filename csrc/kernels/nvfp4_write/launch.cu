#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

template <typename T, ScaleChoice CHOICE>
cudaError_t launch(const Nvfp4WriteParams& p, cudaStream_t stream) {
  const int groups = 2 * p.page.heads * p.page.scales();
  const int tokens_per_block = groups >= WRITE_THREADS ? 1 : WRITE_THREADS / groups;
  const auto aligned = [](const void* base, int64_t stride_t, int64_t stride_h) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_t * int64_t(sizeof(T)) % 16 == 0 &&
           stride_h * int64_t(sizeof(T)) % 16 == 0;
  };
  const bool wide =
      aligned(p.key, p.key_stride_t, p.key_stride_h) && aligned(p.value, p.value_stride_t, p.value_stride_h);
  const dim3 grid(unsigned(ceil_div(p.num_slots, tokens_per_block)),
                  unsigned(ceil_div(groups * tokens_per_block, WRITE_THREADS)));
  nvfp4_write_kernel<T, CHOICE><<<grid, WRITE_THREADS, 0, stream>>>(p, tokens_per_block, wide);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Nvfp4WriteParams& p, cudaStream_t stream) {
  switch (p.choice) {
    case ScaleChoice::AMAX_6: return launch<T, ScaleChoice::AMAX_6>(p, stream);
    case ScaleChoice::FOUR_OVER_SIX: return launch<T, ScaleChoice::FOUR_OVER_SIX>(p, stream);
    case ScaleChoice::BEST_OF_9: return launch<T, ScaleChoice::BEST_OF_9>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_nvfp4_write(const Nvfp4WriteParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case Dtype::BF16: return launch<__nv_bfloat16>(params, stream);
    case Dtype::F16: return launch<__half>(params, stream);
    case Dtype::F32: return launch<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace xlayer
