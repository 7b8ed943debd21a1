#pragma once

#include <memory>

#include "../kernels/nvfp4_gather/params.h"

namespace xlayer::cpu {

// What every (block scale, nibble) decodes to in one output dtype under one global scale.
class DecodeTable {
 public:
  DecodeTable(float global_scale, Dtype dtype);
  const void* entries() const { return entries_.get(); }  // [256 scales][16 nibbles] of dtype

 private:
  std::unique_ptr<uint32_t[]> entries_;
};

// Gathers output tokens [begin, end). The tables were made from *params.k_scale and *params.v_scale.
void nvfp4_gather(const Nvfp4GatherParams& params, const DecodeTable& k_table, const DecodeTable& v_table,
                  int64_t begin, int64_t end);

}  // namespace xlayer::cpu
