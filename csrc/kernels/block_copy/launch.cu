#include <algorithm>
#include <vector>

#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

template <typename WORD>
cudaError_t launch(const BlockCopyParams& p, cudaStream_t stream) {
  constexpr int64_t BYTES = sizeof(WORD);
  const int64_t length = p.piece_bytes / BYTES;
  for (int64_t begin = 0; begin < p.num_pairs; begin += COPY_PAIRS) {
    const int64_t count = std::min<int64_t>(COPY_PAIRS, p.num_pairs - begin);
    CopyPairs pairs = {};
    std::copy_n(p.src_ids + begin, count, pairs.src);
    std::copy_n(p.dst_ids + begin, count, pairs.dst);
    const dim3 grid(unsigned(ceil_div(length, COPY_TILE)), unsigned(count));
    block_copy_kernel<WORD><<<grid, COPY_THREADS, 0, stream>>>(
        reinterpret_cast<const WORD*>(p.src), reinterpret_cast<WORD*>(p.dst), p.src_stride / BYTES,
        p.dst_stride / BYTES, length, pairs);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#if CUDART_VERSION >= 13000
// One submission for all pairs. Refused by CUDA on the legacy default stream.
cudaError_t submit_batch(const BlockCopyParams& p, cudaStream_t stream) {
  const auto count = size_t(p.num_pairs);
  std::vector<void*> to(count);
  std::vector<const void*> from(count);
  const std::vector<size_t> sizes(count, size_t(p.piece_bytes));
  for (size_t i = 0; i < count; ++i) {
    from[i] = p.src + p.src_ids[i] * p.src_stride;
    to[i] = p.dst + p.dst_ids[i] * p.dst_stride;
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first_of_attributes = 0;
  return cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), count, &attributes, &first_of_attributes,
                              1, stream);
}

bool is_pinned(const void* host) {
  cudaPointerAttributes attributes = {};
  return cudaPointerGetAttributes(&attributes, host) == cudaSuccess &&
         attributes.type != cudaMemoryTypeUnregistered;
}
#endif

cudaError_t submit_one_by_one(const BlockCopyParams& p, cudaMemcpyKind kind, cudaStream_t stream) {
  for (int64_t i = 0; i < p.num_pairs; ++i) {
    const cudaError_t error =
        cudaMemcpyAsync(p.dst + p.dst_ids[i] * p.dst_stride, p.src + p.src_ids[i] * p.src_stride,
                        size_t(p.piece_bytes), kind, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_block_copy(const BlockCopyParams& p, cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(p.src) | reinterpret_cast<uintptr_t>(p.dst) |
                    uintptr_t(p.src_stride) | uintptr_t(p.dst_stride) | uintptr_t(p.piece_bytes);
  return bits % 16 == 0 ? launch<uint4>(p, stream) : launch<uint8_t>(p, stream);
}

cudaError_t submit_block_copy(const BlockCopyParams& p, cudaMemcpyKind kind, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  // Handle 0 is the legacy default stream, which is torch's default. Pageable memory is staged by the
  // driver, piece by piece, in either case.
  const void* host = kind == cudaMemcpyDeviceToHost ? p.dst : p.src;
  if (stream != nullptr && stream != cudaStreamLegacy && is_pinned(host)) return submit_batch(p, stream);
#endif
  return submit_one_by_one(p, kind, stream);
}

}  // namespace xlayer
