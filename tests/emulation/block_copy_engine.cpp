// What a copy engine is given, on a fake device: for tests/ops/test_block_copy_engine.py.
#include <cuda_runtime_api.h>

#include "kernels/block_copy/engine.cu"

static FakeDevice device;
FakeDevice& fake() { return device; }
int fake_index() { return 0; }

static bool pinned;
uint8_t* xlayer::device_address(const uint8_t* host) { return pinned ? const_cast<uint8_t*>(host) : nullptr; }

static FakeStream stream;

// Submits a copy to the host and returns CUDA's error; nothing is copied before `device_steps`. registration:
// in dst, or nullptr.
extern "C" int submit(const uint8_t* src, uint8_t* dst, int64_t src_stride, int64_t dst_stride, int64_t bytes,
                      const int64_t* src_ids, const int64_t* dst_ids, int64_t num_pairs, int is_pinned,
                      int64_t batches_until_failure, const char* registration) {
  pinned = is_pinned;
  stream.steps.clear();
  device.batches.clear();
  device.batches_until_failure = size_t(batches_until_failure);
  device.registration = registration;
  cudaGetLastError();
  const xlayer::BlockCopyParams params = {src,   dst,     src_stride, dst_stride,
                                          bytes, src_ids, dst_ids,    num_pairs};
  return xlayer::submit_block_copy(params, cudaMemcpyDeviceToHost, &stream);
}

extern "C" int64_t device_steps() {
  int64_t steps = 0;
  while (fake_step(stream)) ++steps;
  return steps;
}

extern "C" int last_error() { return cudaGetLastError(); }

extern "C" int64_t batches(int64_t* sizes) {
  std::copy(device.batches.begin(), device.batches.end(), sizes);
  return int64_t(device.batches.size());
}
