#pragma once

#include "../kernels/nvfp4_attention/params.h"

namespace xlayer::cpu {

// Attends for items [begin, end); item i is KV head i % H of request i / H. Sums are in double; the
// schedule and the partial results of params are not used. Items are independent.
void nvfp4_attention(const Nvfp4AttentionParams& params, int64_t begin, int64_t end);

}  // namespace xlayer::cpu
