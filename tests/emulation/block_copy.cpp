// The kernel of copy_blocks on the CPU: for tests/ops/test_block_copy_emulated.py.
#include "simt.h"

#include "kernels/block_copy/kernel.cuh"

namespace {

template <class WORD, int COUNT>
void run(const uint8_t* src, uint8_t* dst, int64_t piece_bytes, int64_t src_stride, int64_t dst_stride,
         const xlayer::CopyPair* pairs, int64_t num_pairs, bool with_launch, int64_t ctas) {
  const auto length = uint32_t(piece_bytes / int64_t(sizeof(WORD)));
  xlayer::LaunchPairs<COUNT> launched;
  std::memset(&launched, 0x7F, sizeof launched);  // not to be read where the pairs are elsewhere
  if (with_launch) std::copy_n(pairs, num_pairs, launched.at);
  simt::launch({unsigned(ctas), 1, 1}, xlayer::COPY_THREADS, 0, [&] {
    xlayer::block_copy_kernel<WORD, COUNT>(src, dst, src_stride, dst_stride, length,
                                           uint32_t(num_pairs) * length, with_launch ? nullptr : pairs,
                                           launched);
  });
}

}  // namespace

// pairs: [num_pairs, 2] ids. Returns 1 where that many do not travel with a launch.
extern "C" int run_block_copy(const uint8_t* src, uint8_t* dst, int64_t piece_bytes, int64_t src_stride,
                              int64_t dst_stride, const int32_t* pairs, int64_t num_pairs, int64_t wide,
                              int64_t with_launch, int64_t ctas) {
  if (with_launch && num_pairs > xlayer::COPY_MANY) return 1;
  const bool many = with_launch && num_pairs > xlayer::COPY_FEW;
  const auto kernel = wide   ? many ? run<uint4, xlayer::COPY_MANY> : run<uint4, xlayer::COPY_FEW>
                      : many ? run<uint8_t, xlayer::COPY_MANY>
                             : run<uint8_t, xlayer::COPY_FEW>;
  kernel(src, dst, piece_bytes, src_stride, dst_stride, reinterpret_cast<const xlayer::CopyPair*>(pairs),
         num_pairs, with_launch, ctas);
  return 0;
}
