// The part of CUDA's streams and events that pairs.cu uses, with a device that does nothing by itself: a test
// says which stream takes its next step, so it can do everything as late, or in any order, as CUDA allows.
#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotReady = 600
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
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

// Calls come from several threads.
struct FakeDevice {
  std::recursive_mutex mutex;
  std::vector<FakeStream*> streams;  // that the code under test made
  int slots = 0;                     // allocations of device memory
  bool out_of_memory = false;
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
