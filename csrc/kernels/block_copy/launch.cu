#include <algorithm>

#include "kernel.cuh"
#include "launch.h"

namespace xlayer {
namespace {

// Of one launch: the kernel counts in 32 bits, and past the end.
constexpr int64_t MAX_WORDS = int64_t(1) << 30;
constexpr int64_t HOST_CTAS = 12;

// CUDA 13 does not run with a driver before R580.
constexpr int MOST_WITH_LAUNCH = CUDART_VERSION >= 13000 ? COPY_MANY : COPY_FEW;

template <typename WORD, int COUNT>
cudaError_t launch_part(const BlockCopyParams& p, bool touches_host, const CopyPair* uploaded,
                        cudaStream_t stream) {
  LaunchPairs<COUNT> with_launch = {};
  if (uploaded == nullptr) write_pairs(p, with_launch.at);
  const int64_t length = p.piece_bytes / int64_t(sizeof(WORD));
  const int64_t total = p.num_pairs * length;
  const int64_t tiles = ceil_div(total, COPY_TILE);
  const int64_t ctas = touches_host ? std::min(tiles, HOST_CTAS) : tiles;
  block_copy_kernel<WORD, COUNT><<<unsigned(ctas), COPY_THREADS, 0, stream>>>(
      p.src, p.dst, p.src_stride, p.dst_stride, uint32_t(length), uint32_t(total), uploaded, with_launch);
  return cudaGetLastError();
}

template <typename WORD>
cudaError_t launch(const BlockCopyParams& p, bool touches_host, const CopyPair* uploaded,
                   cudaStream_t stream) {
  const int64_t fit = std::max<int64_t>(1, MAX_WORDS / (p.piece_bytes / int64_t(sizeof(WORD))));
  const int64_t step = uploaded != nullptr ? fit : std::min<int64_t>(fit, MOST_WITH_LAUNCH);
  for (int64_t begin = 0; begin < p.num_pairs; begin += step) {
    BlockCopyParams part = p;
    part.src_ids += begin;
    part.dst_ids += begin;
    part.num_pairs = std::min(step, p.num_pairs - begin);
    const CopyPair* const pairs = uploaded == nullptr ? nullptr : uploaded + begin;
    const bool few = pairs != nullptr || part.num_pairs <= COPY_FEW;
    const cudaError_t error = few ? launch_part<WORD, COPY_FEW>(part, touches_host, pairs, stream)
                                  : launch_part<WORD, MOST_WITH_LAUNCH>(part, touches_host, pairs, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

uint8_t* device_address(const uint8_t* host) {
  cudaPointerAttributes attributes = {};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();  // so that nobody takes it for a kernel's
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeHost ? static_cast<uint8_t*>(attributes.devicePointer) : nullptr;
}

bool pairs_fit_launch(const BlockCopyParams& p) { return p.num_pairs <= MOST_WITH_LAUNCH; }

void write_pairs(const BlockCopyParams& p, CopyPair* pairs) {
  for (int64_t i = 0; i < p.num_pairs; ++i) {
    pairs[i] = {int32_t(p.src_ids[i]), int32_t(p.dst_ids[i])};
  }
}

cudaError_t launch_block_copy(const BlockCopyParams& p, bool touches_host, const CopyPair* pairs,
                              cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(p.src) | reinterpret_cast<uintptr_t>(p.dst) |
                    uintptr_t(p.src_stride) | uintptr_t(p.dst_stride) | uintptr_t(p.piece_bytes);
  return bits % 16 == 0 ? launch<uint4>(p, touches_host, pairs, stream)
                        : launch<uint8_t>(p, touches_host, pairs, stream);
}

}  // namespace xlayer
