// The cache writer's kernel and its codec on the CPU: for tests/ops/test_nvfp4_write_emulated.py.
#include "simt.h"

#include "kernels/nvfp4_write/kernel.cuh"

using namespace xlayer;

// Groups [count][16] through the codec's form for the GPU, one thread a group.
// data [count] little-endian words of 16 nibbles, scales [count].
extern "C" void run_encode(const float* groups, int64_t count, float inv, int choice, uint64_t* data,
                           uint8_t* scales) {
  for (int64_t g = 0; g < count; ++g) {
    float x[GROUP];
    std::memcpy(x, groups + g * GROUP, sizeof x);
    const Group group = choice == 0   ? encode_group<ScaleChoice::AMAX_6>(x, inv)
                        : choice == 1 ? encode_group<ScaleChoice::FOUR_OVER_SIX>(x, inv)
                                      : encode_group<ScaleChoice::BEST_OF_9>(x, inv);
    data[g] = group.data;
    scales[g] = group.scale;
  }
}

// All of eight bytes, so that Python can mirror it: tests/reference/emulated.py.
struct WriteArgs {
  const void *key, *value;
  int64_t key_stride_t, key_stride_h, value_stride_t, value_stride_h;
  uint8_t* cache;
  int64_t block_stride, heads, block_size, head_size;
  const int64_t* slots;
  int64_t num_slots;
  const float *k_scale, *v_scale;
  int64_t swizzled, lanes, wide, rotated_keys;
  void* newest;
  const int64_t* newest_slots;
  int64_t newest_tokens;
};

// The kernel, best of 9, for bf16.
extern "C" void run_nvfp4_write(const WriteArgs* a) {
  Nvfp4WriteParams p = {};
  p.key = a->key;
  p.value = a->value;
  p.key_stride_t = a->key_stride_t;
  p.key_stride_h = a->key_stride_h;
  p.value_stride_t = a->value_stride_t;
  p.value_stride_h = a->value_stride_h;
  p.dtype = Dtype::BF16;
  p.cache = a->cache;
  p.block_stride = a->block_stride;
  p.page = {int(a->heads), int(a->block_size), int(a->head_size)};
  p.slots = a->slots;
  p.num_slots = a->num_slots;
  p.k_scale = a->k_scale;
  p.v_scale = a->v_scale;
  p.v_order = a->swizzled ? ScaleOrder::SWIZZLED : ScaleOrder::LINEAR;
  p.choice = ScaleChoice::BEST_OF_9;
  p.rotated_keys = a->rotated_keys != 0;
  p.newest = a->newest;
  p.newest_slots = a->newest_slots;
  p.newest_tokens = int(a->newest_tokens);
  const WriteLaunch launch = write_launch(p, int(a->lanes));
  simt::launch(launch.blocks, WRITE_THREADS, 0, [&] {
    if (a->lanes == 1) {
      nvfp4_write_kernel<__nv_bfloat16, ScaleChoice::BEST_OF_9, 1>(p, launch, a->wide);
    } else {
      nvfp4_write_kernel<__nv_bfloat16, ScaleChoice::BEST_OF_9, 4>(p, launch, a->wide);
    }
  });
}
