// The CUDA stream of torch, and CUDA errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "build_info.h"

namespace xlayer::api {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* what, cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, what, ": expected a GPU of the architectures ",
                  XLAYER_BUILT_ARCHS, " that this build has kernels for, got another; reinstall with ",
                  "VLLM_XLAYER_ARCHS set to that GPU's");
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

}  // namespace xlayer::api
