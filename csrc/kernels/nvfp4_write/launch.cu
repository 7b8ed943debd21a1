#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

// Up to here four threads a group: with one, half of a large GPU's schedulers would have no warp.
constexpr int64_t FEW_GROUPS = 8192;

template <typename T, ScaleChoice CHOICE, int LANES>
cudaError_t launch(const Nvfp4WriteParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* base, int64_t stride_t, int64_t stride_h) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_t * int64_t(sizeof(T)) % 16 == 0 &&
           stride_h * int64_t(sizeof(T)) % 16 == 0;
  };
  const bool wide =
      aligned(p.key, p.key_stride_t, p.key_stride_h) && aligned(p.value, p.value_stride_t, p.value_stride_h);
  const WriteLaunch launch = write_launch(p, LANES);
  nvfp4_write_kernel<T, CHOICE, LANES><<<launch.blocks, WRITE_THREADS, 0, stream>>>(p, launch, wide);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Nvfp4WriteParams& p, cudaStream_t stream) {
  switch (p.choice) {
    case ScaleChoice::AMAX_6: return launch<T, ScaleChoice::AMAX_6, 1>(p, stream);
    case ScaleChoice::FOUR_OVER_SIX: return launch<T, ScaleChoice::FOUR_OVER_SIX, 1>(p, stream);
    case ScaleChoice::BEST_OF_9:
      return p.num_slots * 2 * p.page.heads * p.page.scales() <= FEW_GROUPS
                 ? launch<T, ScaleChoice::BEST_OF_9, 4>(p, stream)
                 : launch<T, ScaleChoice::BEST_OF_9, 1>(p, stream);
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
