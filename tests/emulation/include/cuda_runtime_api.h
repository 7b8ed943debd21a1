// The part of CUDA's streams and events that pairs.cu and engine.cu use, with a device that does nothing by
// itself: a test says which stream takes its next step, so it can do everything as late, or in any order, as
// CUDA allows.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotReady = 600
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaMemcpySrcAccessOrder { cudaMemcpySrcAccessOrderStream = 1 };
constexpr unsigned cudaMemcpyFlagPreferOverlapWithCompute = 1;
struct cudaMemcpyAttributes {
  cudaMemcpySrcAccessOrder srcAccessOrder;
  unsigned flags;
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

struct FakeEvent {
  long recorded = 0, reached = 0;
};
using cudaEvent_t = FakeEvent*;

struct FakeStep {
  std::function<bool()> ready;
  std::function<void()> run;
};
struct FakeStream {
  std::deque<FakeStep> steps;
};
using cudaStream_t = FakeStream*;

#define cudaStreamLegacy ((cudaStream_t)0x1)

// Calls come from several threads.
struct FakeDevice {
  std::recursive_mutex mutex;
  std::vector<FakeStream*> streams;  // that the code under test made
  int slots = 0;                     // allocations of device memory
  bool out_of_memory = false;
  std::vector<size_t> batches;  // copies of each
  size_t batches_until_failure = size_t(-1);
  const char* registration = nullptr;  // where one of host memory ends and the next begins
  cudaError_t last = cudaSuccess;
};
FakeDevice& fake();  // the current one
int fake_index();
constexpr int FAKE_DEVICES = 64;

using FakeLock = std::lock_guard<std::recursive_mutex>;

// False where the stream is empty or waits.
inline bool fake_step(FakeStream& stream) {
  const FakeLock lock(fake().mutex);
  if (stream.steps.empty() || !stream.steps.front().ready()) return false;
  stream.steps.front().run();
  stream.steps.pop_front();
  return true;
}
inline void fake_push(
    FakeStream* stream, std::function<void()> run, std::function<bool()> ready = [] { return true; }) {
  const FakeLock lock(fake().mutex);
  stream->steps.push_back({std::move(ready), std::move(run)});
}

inline cudaError_t fake_error(cudaError_t error) { return fake().last = error; }
inline cudaError_t cudaGetLastError() {
  const FakeLock lock(fake().mutex);
  return std::exchange(fake().last, cudaSuccess);
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = FAKE_DEVICES, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = fake_index(), cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

inline cudaError_t cudaMallocHost(void** at, size_t bytes) { return *at = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaMalloc(void** at, size_t bytes) {
  const FakeLock lock(fake().mutex);
  if (fake().out_of_memory) return fake_error(cudaErrorMemoryAllocation);
  ++fake().slots;
  return *at = std::malloc(bytes), cudaSuccess;
}
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaFreeHost(void* at) { return std::free(at), cudaSuccess; }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const FakeLock lock(fake().mutex);
  return fake().streams.push_back(*stream = new FakeStream), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new FakeEvent, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  const FakeLock lock(fake().mutex);
  return event->reached == event->recorded ? cudaSuccess : fake_error(cudaErrorNotReady);
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const FakeLock lock(fake().mutex);
  const long now = ++event->recorded;
  fake_push(stream, [=] { event->reached = now > event->reached ? now : event->reached; });
  return cudaSuccess;
}
// As CUDA does: for what was recorded last when this is called.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const FakeLock lock(fake().mutex);
  const long now = event->recorded;
  fake_push(stream, [] {}, [=] { return event->reached >= now; });
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  fake_push(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline bool fake_crosses(const void* at, size_t bytes) {
  const char* const begin = static_cast<const char*>(at);
  return begin < fake().registration && fake().registration < begin + bytes;
}
// A batch begins when all of it is there; its copies may be done in any order: here from the last to the
// first. One that would cross from a registration of host memory into the next is refused; those before it
// may be done.
inline cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* sizes,
                                        size_t count, const cudaMemcpyAttributes* attributes,
                                        const size_t* first_of_attributes, size_t num_attributes,
                                        cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || count == 0 || num_attributes != 1 ||
      first_of_attributes[0] != 0 || attributes->srcAccessOrder != cudaMemcpySrcAccessOrderStream) {
    return cudaErrorInvalidValue;
  }
  if (fake().batches.size() == fake().batches_until_failure) return cudaErrorLaunchFailure;
  const size_t asked = count;
  for (size_t i = 0; i < count; ++i) {
    if (fake_crosses(to[i], sizes[i]) || fake_crosses(from[i], sizes[i])) count = i;
  }
  fake().batches.push_back(count);
  const std::vector<void*> tos(to, to + count);
  const std::vector<const void*> froms(from, from + count);
  const std::vector<size_t> bytes(sizes, sizes + count);
  fake_push(stream, [=] {
    for (size_t i = count; i-- > 0;) std::memcpy(tos[i], froms[i], bytes[i]);
  });
  return count == asked ? cudaSuccess : fake_error(cudaErrorInvalidValue);
}
