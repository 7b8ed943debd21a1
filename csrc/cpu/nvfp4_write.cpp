#include "nvfp4_write.h"

#include "float16.h"

namespace xlayer::cpu {
namespace {

// A block of K as it is kept.
template <typename T>
void rotate(const T* in, int block, float* out) {
  for (int i = 0; i < block; ++i) out[i] = to_float(in[i]);
  rotate_block(out, block, KEPT_KEY);
}

// One token's K or V of all heads into its page.
template <typename T, ScaleChoice CHOICE>
void write_token(const Page& page, uint8_t* page_bytes, bool is_v, int n, const T* in, int64_t stride_h,
                 float inv, ScaleOrder order, bool rotated) {
  const int block = rotated ? rotation_block(page.head_size) : GROUP;  // done together
  for (int h = 0; h < page.heads; ++h) {
    uint8_t* data = page_bytes + page.data_offset(is_v, h, n);
    uint8_t* scales = page_bytes + page.scale_base(is_v, h);
    for (int first = 0; first < page.head_size; first += block) {
      float x[MAX_ROTATION_BLOCK];
      const T* from = in + h * stride_h + first;
      if (rotated) rotate(from, block, x);
      for (int i = 0; !rotated && i < block; ++i) x[i] = to_float(from[i]);
      for (int i = 0; i < block; i += GROUP) {
        const int s = (first + i) / GROUP;
        float elements[GROUP];
        std::memcpy(elements, x + i, sizeof elements);
        const Group group = encode_group<CHOICE>(elements, inv);
        std::memcpy(data + s * sizeof group.data, &group.data, sizeof group.data);
        scales[page.scale_index(order, n, s)] = group.scale;
      }
    }
  }
}

// One token's K and V into its place among the newest: K as it is kept, V as it is.
template <typename T>
void write_newest(const Nvfp4WriteParams& p, int64_t slot, const T* key, const T* value) {
  const size_t D = size_t(p.page.head_size);
  const int64_t row = slot / p.newest_tokens, place = slot % p.newest_tokens;
  for (int h = 0; h < p.page.heads; ++h) {
    T* k = static_cast<T*>(p.newest) + newest_offset(p.page, p.newest_tokens, row, false, h, place);
    T* v = static_cast<T*>(p.newest) + newest_offset(p.page, p.newest_tokens, row, true, h, place);
    if (p.rotated_keys) {
      const int block = rotation_block(p.page.head_size);
      for (int first = 0; first < p.page.head_size; first += block) {
        float kept[MAX_ROTATION_BLOCK];
        rotate(key + h * p.key_stride_h + first, block, kept);
        for (int i = 0; i < block; ++i) k[first + i] = from_float<T>(kept[i]);
      }
    } else {
      std::memcpy(k, key + h * p.key_stride_h, D * sizeof(T));
    }
    std::memcpy(v, value + h * p.value_stride_h, D * sizeof(T));
  }
}

template <typename T, ScaleChoice CHOICE>
void write(const Nvfp4WriteParams& p, int64_t begin, int64_t end) {
  const float k_inv = 1.0f / *p.k_scale;
  const float v_inv = 1.0f / *p.v_scale;
  const T* key = static_cast<const T*>(p.key);
  const T* value = static_cast<const T*>(p.value);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = p.slots[t];
    if (slot < 0) continue;
    const int64_t block = slot / p.page.block_size;
    const int n = int(slot % p.page.block_size);
    uint8_t* page = p.cache + block * p.block_stride;
    write_token<T, CHOICE>(p.page, page, false, n, key + t * p.key_stride_t, p.key_stride_h, k_inv,
                           ScaleOrder::LINEAR, p.rotated_keys);
    write_token<T, CHOICE>(p.page, page, true, n, value + t * p.value_stride_t, p.value_stride_h, v_inv,
                           p.v_order, false);
    if (p.newest != nullptr && p.newest_slots[t] >= 0) {
      write_newest(p, p.newest_slots[t], key + t * p.key_stride_t, value + t * p.value_stride_t);
    }
  }
}

template <typename T>
void write(const Nvfp4WriteParams& p, int64_t begin, int64_t end) {
  switch (p.choice) {
    case ScaleChoice::AMAX_6: return write<T, ScaleChoice::AMAX_6>(p, begin, end);
    case ScaleChoice::FOUR_OVER_SIX: return write<T, ScaleChoice::FOUR_OVER_SIX>(p, begin, end);
    case ScaleChoice::BEST_OF_9: return write<T, ScaleChoice::BEST_OF_9>(p, begin, end);
  }
}

}  // namespace

void nvfp4_write(const Nvfp4WriteParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case Dtype::BF16: return write<BF16>(params, begin, end);
    case Dtype::F16: return write<F16>(params, begin, end);
    case Dtype::F32: return write<float>(params, begin, end);
  }
}

}  // namespace xlayer::cpu
