#include <torch/csrc/stable/ops.h>

#include "../cpu/nvfp4_write.h"
#include "checks.h"
#include "ops.h"

#if defined(XLAYER_WITH_CUDA)
#include "../kernels/nvfp4_write/launch.h"
#include "stream.h"
#endif

namespace xlayer::api {
namespace {

Nvfp4WriteParams check(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                       const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                       int64_t scale_order, int64_t scale_choice, const std::optional<Tensor>& newest,
                       const std::optional<Tensor>& newest_slots, bool rotated_keys) {
  check_device("key", key, "kv_cache", kv_cache);
  check_device("value", value, "kv_cache", kv_cache);
  check_device("slot_mapping", slot_mapping, "kv_cache", kv_cache);
  check_global_scale("k_scale", k_scale, kv_cache);
  check_global_scale("v_scale", v_scale, kv_cache);
  check_dtype("key", key, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  check_dtype("value", value, {key.scalar_type()});
  check_dtype("slot_mapping", slot_mapping, {ScalarType::Long});
  const Page page = check_kv_cache(kv_cache);
  check_rank("key", key, 3, "(tokens, heads, head_size)");
  check_rank("value", value, 3, "(tokens, heads, head_size)");
  check_rank("slot_mapping", slot_mapping, 1, "(tokens)");
  check_rows("key", key, false);
  check_rows("value", value, false);
  check_dense("slot_mapping", slot_mapping);
  check_size("key", key, 1, page.heads, "the heads of kv_cache");
  check_size("key", key, 2, page.head_size, "the head size of kv_cache");
  check_size("value", value, 0, key.size(0), "the tokens of key");
  check_size("value", value, 1, page.heads, "the heads of kv_cache");
  check_size("value", value, 2, page.head_size, "K and V head sizes must be equal");
  STD_TORCH_CHECK(slot_mapping.size(0) <= key.size(0), "slot_mapping: expected at most ", key.size(0),
                  " entries (the tokens of key), got ", slot_mapping.size(0));

  check_newest_pair("newest_slots", newest_slots, newest);
  if (newest) {
    check_newest("key", key, *newest, page);
    check_device("newest_slots", *newest_slots, "kv_cache", kv_cache);
    check_dtype("newest_slots", *newest_slots, {ScalarType::Long});
    check_rank("newest_slots", *newest_slots, 1, "(tokens)");
    check_dense("newest_slots", *newest_slots);
    check_size("newest_slots", *newest_slots, 0, slot_mapping.size(0), "the tokens of slot_mapping");
  }

  Nvfp4WriteParams p = {};
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_stride_t = key.stride(0);
  p.key_stride_h = key.stride(1);
  p.value_stride_t = value.stride(0);
  p.value_stride_h = value.stride(1);
  p.dtype = float_dtype(key);
  p.cache = static_cast<uint8_t*>(kv_cache.data_ptr());
  p.block_stride = block_stride_of(kv_cache);
  p.page = page;
  p.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  p.num_slots = slot_mapping.size(0);
  if (newest) {
    p.newest = newest->data_ptr();
    p.newest_slots = static_cast<const int64_t*>(newest_slots->data_ptr());
    p.newest_tokens = int(newest->size(3));
  }
  p.k_scale = static_cast<const float*>(k_scale.data_ptr());
  p.v_scale = static_cast<const float*>(v_scale.data_ptr());
  p.v_order = scale_order_of(scale_order, page.head_size);
  p.choice = scale_choice_of(scale_choice);
  p.rotated_keys = rotated_keys;
  return p;
}

}  // namespace

void reshape_and_cache_nvfp4_cpu(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                 const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                 int64_t scale_order, int64_t scale_choice,
                                 const std::optional<Tensor>& newest,
                                 const std::optional<Tensor>& newest_slots, bool rotated_keys) {
  const Nvfp4WriteParams p = check(key, value, kv_cache, slot_mapping, k_scale, v_scale, scale_order,
                                   scale_choice, newest, newest_slots, rotated_keys);
  const int64_t slots = kv_cache.size(0) * p.page.block_size;
  for (int64_t i = 0; i < p.num_slots; ++i) {
    STD_TORCH_CHECK(p.slots[i] >= -1 && p.slots[i] < slots, "slot_mapping: expected -1 or slots below ",
                    slots, ", got ", p.slots[i], " at ", i);
  }
  const int64_t newest_places = newest ? newest->size(0) * p.newest_tokens : 0;
  for (int64_t i = 0; newest && i < p.num_slots; ++i) {
    STD_TORCH_CHECK(p.newest_slots[i] >= -1 && p.newest_slots[i] < newest_places,
                    "newest_slots: expected -1 or places below ", newest_places, ", got ", p.newest_slots[i],
                    " at ", i);
    STD_TORCH_CHECK(p.newest_slots[i] < 0 || p.slots[i] >= 0,
                    "newest_slots: expected -1 for a token that slot_mapping skips, got ", p.newest_slots[i],
                    " at ", i);
  }
  const int64_t grain = ceil_div(4096, int64_t(p.page.heads) * p.page.head_size);
  torch::stable::parallel_for(0, p.num_slots, grain,
                              [&p](int64_t begin, int64_t end) { cpu::nvfp4_write(p, begin, end); });
}

#if defined(XLAYER_WITH_CUDA)
void reshape_and_cache_nvfp4_cuda(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                  const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale,
                                  int64_t scale_order, int64_t scale_choice,
                                  const std::optional<Tensor>& newest,
                                  const std::optional<Tensor>& newest_slots, bool rotated_keys) {
  const Nvfp4WriteParams p = check(key, value, kv_cache, slot_mapping, k_scale, v_scale, scale_order,
                                   scale_choice, newest, newest_slots, rotated_keys);
  if (p.num_slots == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  check_cuda("reshape_and_cache_nvfp4", launch_nvfp4_write(p, current_stream(kv_cache)));
}
#endif

}  // namespace xlayer::api
