// What the decode kernel is compiled for. To add a head size, add its lines here: CMake makes a file of each
// (they compile side by side), launch.cu lists them, the ops' checks and Python (`build_info()["decode"]`) know
// them.
#pragma once

// Head size, query rows of a head tile / 8, warps of a team, teams of a thread block. Of one head size from few
// rows to many.
#define XLAYER_DECODE_SHAPES(SHAPE) \
  SHAPE(64, 1, 4, 1)                \
  SHAPE(64, 2, 4, 1)                \
  SHAPE(64, 4, 4, 1)                \
  SHAPE(64, 1, 4, 4)                \
  SHAPE(64, 2, 4, 4)                \
  SHAPE(64, 1, 16, 1)               \
  SHAPE(80, 1, 4, 1)                \
  SHAPE(96, 1, 4, 1)                \
  SHAPE(112, 1, 4, 1)               \
  SHAPE(128, 1, 4, 1)               \
  SHAPE(128, 2, 4, 1)               \
  SHAPE(128, 1, 4, 4)               \
  SHAPE(128, 2, 4, 4)               \
  SHAPE(128, 1, 16, 1)              \
  SHAPE(128, 2, 16, 1)              \
  SHAPE(192, 1, 4, 1)               \
  SHAPE(256, 1, 4, 1)               \
  SHAPE(256, 1, 4, 4)

namespace xlayer::attention {

constexpr int MAX_Q_LEN = 8;        // query tokens of a request
constexpr int MAX_GROUP = 16;       // query heads a KV head
constexpr int MAX_HEAD_SIZE = 256;  // also where there is no shape: on the CPU, and dequantised first

}  // namespace xlayer::attention
