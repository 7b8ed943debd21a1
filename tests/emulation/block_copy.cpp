// The kernel of copy_blocks on the CPU: for tests/ops/test_block_copy_emulated.py.
#include "simt.h"

#include "kernels/block_copy/kernel.cuh"

namespace {

template <class WORD>
void run(const uint8_t* src, uint8_t* dst, int64_t piece_bytes, int64_t src_stride, int64_t dst_stride,
         const xlayer::CopyPair* pairs, int64_t num_pairs, bool with_launch, int64_t ctas) {
  const auto length = uint32_t(piece_bytes / int64_t(sizeof(WORD)));
  xlayer::FewPairs few;
  std::memset(&few, 0x7F, sizeof few);  // not to be read where the pairs are elsewhere
  if (with_launch) std::copy_n(pairs, num_pairs, few.at);
  simt::launch({unsigned(ctas), 1, 1}, xlayer::COPY_THREADS, 0, [&] {
    xlayer::block_copy_kernel<WORD>(src, dst, src_stride, dst_stride, length, uint32_t(num_pairs) * length,
                                    with_launch ? nullptr : pairs, few);
  });
}

}  // namespace

// pairs: [num_pairs, 2] ids. Returns 1 where that many do not travel with a launch.
extern "C" int run_block_copy(const uint8_t* src, uint8_t* dst, int64_t piece_bytes, int64_t src_stride,
                              int64_t dst_stride, const int32_t* pairs, int64_t num_pairs, int64_t wide,
                              int64_t with_launch, int64_t ctas) {
  if (with_launch && num_pairs > xlayer::COPY_FEW) return 1;
  const auto* at = reinterpret_cast<const xlayer::CopyPair*>(pairs);
  if (wide) {
    run<uint4>(src, dst, piece_bytes, src_stride, dst_stride, at, num_pairs, with_launch, ctas);
  } else {
    run<uint8_t>(src, dst, piece_bytes, src_stride, dst_stride, at, num_pairs, with_launch, ctas);
  }
  return 0;
}
