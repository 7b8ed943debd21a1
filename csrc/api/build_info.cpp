#include "build_info.h"

#include "../kernels/nvfp4_attention/config.cuh"
#include "../kernels/nvfp4_attention/shapes.h"
#include "ops.h"

namespace xlayer::api {
namespace {

template <class C>
std::string decode_shape() {
  return "{\"head_size\": " + std::to_string(C::D) + ", \"rows\": " + std::to_string(C::TILE_ROWS) +
         ", \"warps\": " + std::to_string(C::WARPS) + ", \"teams\": " + std::to_string(C::TEAMS) +
         ", \"shared_bytes\": " + std::to_string(C::SHARED_BYTES) + "}";
}

}  // namespace

std::string build_info() {
  std::string shapes;
#define XLAYER_SHAPE_TEXT(D, NT, WARPS, TEAMS) \
  if (!shapes.empty()) shapes += ", ";         \
  shapes += decode_shape<attention::Config<D, NT, WARPS, TEAMS>>();
  XLAYER_DECODE_SHAPES(XLAYER_SHAPE_TEXT)
#undef XLAYER_SHAPE_TEXT
  std::string info = XLAYER_BUILD_INFO;
  info.pop_back();  // its closing brace
  return info + ", \"decode\": {\"max_q_len\": " + std::to_string(attention::MAX_Q_LEN) +
         ", \"max_group\": " + std::to_string(attention::MAX_GROUP) +
         ", \"max_head_size\": " + std::to_string(attention::MAX_HEAD_SIZE) + ", \"shapes\": [" + shapes +
         "]}}";
}

}  // namespace xlayer::api
