#include "engine.h"

#include <algorithm>
#include <vector>

#include "launch.h"
#include "runs.h"

namespace xlayer {
namespace {

#if CUDART_VERSION >= 13000
constexpr size_t FIRST_BATCH = 64;        // copies: submitted in about 50 us
constexpr int64_t MOST_MERGED = 2 << 20;  // bytes: rows of so many have the link's rate

struct Batch {
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> sizes;

  void add(const BlockCopyParams& p, const CopyRun& run) {
    to.push_back(p.dst + run.dst * p.dst_stride);
    from.push_back(p.src + run.src * p.src_stride);
    sizes.push_back(size_t(run.num_pairs * p.piece_bytes));
  }
  void clear() {
    to.clear();
    from.clear();
    sizes.clear();
  }
  cudaError_t submit(cudaStream_t stream) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first_of_attributes = 0;
    return cudaMemcpyBatchAsync(to.data(), from.data(), sizes.data(), sizes.size(), &attributes,
                                &first_of_attributes, 1, stream);
  }
};

// In batches: the engine begins with one when all of it is submitted. The first is short, so that it begins
// early, and the next are in proportion to what it has by then, so that it is not out of work before they are
// submitted; that takes 0.5 to 1 us a copy. Refused by CUDA on the legacy default stream.
cudaError_t submit_batches(const BlockCopyParams& p, cudaStream_t stream) {
  const int64_t most = std::max<int64_t>(1, MOST_MERGED / p.piece_bytes);
  Batch batch;
  size_t submitted = 0;
  for (int64_t begin = 0, end = 0; begin < p.num_pairs; begin = end) {
    const size_t count = std::max(FIRST_BATCH, submitted / 4);
    batch.clear();
    while (end < p.num_pairs && batch.sizes.size() < count) {
      const CopyRun run = run_from(p, end, std::min(p.num_pairs, end + most));
      batch.add(p, run);
      end += run.num_pairs;
    }
    cudaError_t error = batch.submit(stream);
    if (error == cudaErrorInvalidValue && int64_t(batch.sizes.size()) < end - begin) {
      // CUDA refuses a copy from one registration of host memory into the next, which no piece is. Whatever
      // was taken of the batch may be copied twice.
      cudaGetLastError();
      batch.clear();
      for (int64_t i = begin; i < end; ++i) batch.add(p, run_from(p, i, i + 1));
      error = batch.submit(stream);
    }
    if (error != cudaSuccess) return error;
    submitted += batch.sizes.size();
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
