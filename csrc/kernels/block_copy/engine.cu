#include "engine.h"

#include <algorithm>
#include <vector>

#include "launch.h"

namespace xlayer {
namespace {

#if CUDART_VERSION >= 13000
constexpr int64_t FIRST_BATCH = 64;  // pieces: submitted in about 50 us

// In batches: the engine begins with one when all of it is submitted. The first is short, so that it begins
// early, and the next are in proportion to what it has by then, so that it is not out of work before they are
// submitted; that takes 0.5 to 1 us a piece. Refused by CUDA on the legacy default stream.
cudaError_t submit_batches(const BlockCopyParams& p, cudaStream_t stream) {
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> sizes;
  for (int64_t begin = 0; begin < p.num_pairs;) {
    const int64_t end = std::min(p.num_pairs, begin + std::max(FIRST_BATCH, begin / 4));
    const auto count = size_t(end - begin);
    to.clear();
    from.clear();
    sizes.resize(count, size_t(p.piece_bytes));
    for (int64_t i = begin; i < end; ++i) {
      from.push_back(p.src + p.src_ids[i] * p.src_stride);
      to.push_back(p.dst + p.dst_ids[i] * p.dst_stride);
    }
    size_t first_of_attributes = 0;
    const cudaError_t error = cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), count, &attributes,
                                                   &first_of_attributes, 1, stream);
    if (error != cudaSuccess) return error;
    begin = end;
  }
  return cudaSuccess;
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

cudaError_t submit_block_copy(const BlockCopyParams& p, cudaMemcpyKind kind, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  // Handle 0 is the legacy default stream, which is torch's default. Pageable memory is staged by the
  // driver, piece by piece, in either case.
  const bool pinned = kind == cudaMemcpyDeviceToDevice ||
                      device_address(kind == cudaMemcpyDeviceToHost ? p.dst : p.src) != nullptr;
  if (stream != nullptr && stream != cudaStreamLegacy && pinned) return submit_batches(p, stream);
#endif
  return submit_one_by_one(p, kind, stream);
}

}  // namespace xlayer
