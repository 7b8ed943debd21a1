// The kernel of nvfp4_prefix_attention on the CPU: for tests/ops/test_nvfp4_prefix_emulated.py.
#include <attention_args.h>

#include "kernels/nvfp4_prefix/kernel.cuh"

// Returns 1 for a head size without a kernel.
extern "C" int run_nvfp4_prefix(const Args* a) {
  using namespace xlayer::prefix;
  if (a->head_size != D) return 1;
  const xlayer::Nvfp4AttentionParams p = params_of(a);
  const int rows = p.q_len * (p.num_q_heads / p.page.heads);
  const unsigned tiles = unsigned((rows + ROWS - 1) / ROWS);
  simt::launch({tiles, unsigned(p.page.heads), unsigned(p.num_requests)}, THREADS, SHARED_BYTES,
               [&] { nvfp4_prefix_kernel(p, per_page(p.page.block_size)); });
  return 0;
}
