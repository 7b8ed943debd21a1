#include "nvfp4_gather.h"

#include <algorithm>
#include <type_traits>

#include "float16.h"
#include "words.h"

namespace xlayer::cpu {
namespace {

constexpr int SCALES = 256;
constexpr int NIBBLES = 16;

template <typename T>
void fill_table(float global_scale, T* out) {
  for (int scale = 0; scale < SCALES; ++scale) {
    const float s = e4m3_decode(uint8_t(scale));
    for (int nibble = 0; nibble < NIBBLES; ++nibble) {
      out[scale * NIBBLES + nibble] = from_float<T>(e2m1_decode(uint32_t(nibble)) * s * global_scale);
    }
  }
}

template <typename T>
void gather_token(const Page& page, const uint8_t* page_bytes, bool is_v, int n, ScaleOrder order,
                  const T* table, T* out, int64_t stride_h) {
  for (int h = 0; h < page.heads; ++h) {
    const uint8_t* data = page_bytes + page.data_offset(is_v, h, n);
    const uint8_t* scales = page_bytes + page.scale_base(is_v, h);
    T* head = out + h * stride_h;
    for (int s = 0; s < page.scales(); ++s) {
      const T* values = table + scales[page.scale_index(order, n, s)] * NIBBLES;
      for (int w = 0; w < GROUP / WORD_ELEMENTS; ++w) {
        const uint32_t nibbles = load_word(data + s * (GROUP / 2) + 4 * w);
        for (int i = 0; i < WORD_ELEMENTS; ++i) {
          head[s * GROUP + w * WORD_ELEMENTS + i] = values[nibbles >> (4 * i) & 15];
        }
      }
    }
  }
}

// A token's K that was kept rotated.
template <typename T>
void gather_rotated(const Page& page, const uint8_t* page_bytes, int n, float global_scale, T* out,
                    int64_t stride_h) {
  const int block = rotation_block(page.head_size);
  for (int h = 0; h < page.heads; ++h) {
    const uint8_t* data = page_bytes + page.data_offset(false, h, n);
    const uint8_t* scales = page_bytes + page.scale_base(false, h);
    for (int first = 0; first < page.head_size; first += block) {
      float x[MAX_ROTATION_BLOCK];
      for (int i = 0; i < block; ++i) {
        const int d = first + i;
        const uint32_t nibbles = load_word(data + d / WORD_ELEMENTS * 4);
        const float scale = e4m3_decode(scales[page.scale_index(ScaleOrder::LINEAR, n, d / GROUP)]);
        x[i] = e2m1_decode(nibbles >> (4 * (d % WORD_ELEMENTS)) & 15) * scale * global_scale;
      }
      rotate_block(x, block, rotation_back(block));
      for (int i = 0; i < block; ++i) out[h * stride_h + first + i] = from_float<T>(x[i]);
    }
  }
}

// A token's K or V [H][D] that is not quantised. back: rotated back.
template <typename T, typename S>
void copy_token(const Page& page, const S* from, int64_t from_stride_h, bool back, T* out, int64_t stride_h) {
  const int block = rotation_block(page.head_size);
  for (int h = 0; h < page.heads; ++h) {
    const S* in = from + h * from_stride_h;
    T* head = out + h * stride_h;
    if (back) {
      for (int first = 0; first < page.head_size; first += block) {
        float x[MAX_ROTATION_BLOCK];
        for (int i = 0; i < block; ++i) x[i] = to_float(in[first + i]);
        rotate_block(x, block, rotation_back(block));
        for (int i = 0; i < block; ++i) head[first + i] = from_float<T>(x[i]);
      }
    } else if constexpr (std::is_same_v<T, S>) {
      std::copy(in, in + page.head_size, head);
    } else {
      for (int d = 0; d < page.head_size; ++d) head[d] = from_float<T>(to_float(in[d]));
    }
  }
}

template <typename T, typename S>
void gather(const Nvfp4GatherParams& p, const T* k_table, const T* v_table, int64_t begin, int64_t end) {
  const S* key = static_cast<const S*>(p.key);
  const S* value = static_cast<const S*>(p.value);
  const S* newest = static_cast<const S*>(p.newest);
  // The request of the first token; the following ones are found by walking on.
  int r = int(std::upper_bound(p.cu_seqlens, p.cu_seqlens + p.num_requests + 1, begin) - p.cu_seqlens) - 1;
  for (int64_t t = begin; t < end; ++t) {
    while (t >= p.cu_seqlens[r + 1]) ++r;
    const int64_t position = p.seq_starts[r] + (t - p.cu_seqlens[r]);
    T* k_out = static_cast<T*>(p.k_out) + t * p.k_stride_t;
    T* v_out = static_cast<T*>(p.v_out) + t * p.v_stride_t;
    const TokenSource source = source_of(p, r, position);
    if (source.kind == Source::OWN) {
      copy_token(p.page, key + source.at * p.key_stride_t, p.key_stride_h, false, k_out, p.k_stride_h);
      copy_token(p.page, value + source.at * p.value_stride_t, p.value_stride_h, false, v_out, p.v_stride_h);
      continue;
    }
    if (source.kind == Source::NEWEST) {
      const int64_t stride_h = int64_t(p.newest_tokens) * p.page.head_size;
      const auto at = [&](bool is_v) {
        return newest + newest_offset(p.page, p.newest_tokens, source.row, is_v, 0, source.at);
      };
      copy_token(p.page, at(false), stride_h, p.rotated_keys, k_out, p.k_stride_h);
      copy_token(p.page, at(true), stride_h, false, v_out, p.v_stride_h);
      continue;
    }
    const int64_t block = p.block_table[r * p.block_table_stride + position / p.page.block_size];
    const int n = int(position % p.page.block_size);
    const uint8_t* page = p.cache + block * p.block_stride;
    if (p.rotated_keys) {
      gather_rotated(p.page, page, n, *p.k_scale, k_out, p.k_stride_h);
    } else {
      gather_token(p.page, page, false, n, ScaleOrder::LINEAR, k_table, k_out, p.k_stride_h);
    }
    gather_token(p.page, page, true, n, p.v_order, v_table, v_out, p.v_stride_h);
  }
}

template <typename T, typename S = T>
void gather(const Nvfp4GatherParams& p, const DecodeTable& k, const DecodeTable& v, int64_t begin,
            int64_t end) {
  gather<T, S>(p, static_cast<const T*>(k.entries()), static_cast<const T*>(v.entries()), begin, end);
}

}  // namespace

DecodeTable::DecodeTable(float global_scale, Dtype dtype)
    : entries_(new uint32_t[SCALES * NIBBLES * dtype_bytes(dtype) / sizeof(uint32_t)]) {
  switch (dtype) {
    case Dtype::BF16: fill_table(global_scale, reinterpret_cast<BF16*>(entries_.get())); break;
    case Dtype::F16: fill_table(global_scale, reinterpret_cast<F16*>(entries_.get())); break;
    case Dtype::F32: fill_table(global_scale, reinterpret_cast<float*>(entries_.get())); break;
  }
}

void nvfp4_gather(const Nvfp4GatherParams& params, const DecodeTable& k_table, const DecodeTable& v_table,
                  int64_t begin, int64_t end) {
  switch (params.dtype) {
    case Dtype::BF16: return gather<BF16>(params, k_table, v_table, begin, end);
    case Dtype::F16: return gather<F16>(params, k_table, v_table, begin, end);
    case Dtype::F32:
      switch (params.source_dtype) {
        case Dtype::BF16: return gather<float, BF16>(params, k_table, v_table, begin, end);
        case Dtype::F16: return gather<float, F16>(params, k_table, v_table, begin, end);
        case Dtype::F32: return gather<float>(params, k_table, v_table, begin, end);
      }
  }
}

}  // namespace xlayer::cpu
