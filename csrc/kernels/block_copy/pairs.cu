// Brings pairs that do not fit a launch to the device, on a stream of its own.
//
// On the caller's stream the upload would add a round to the copy engine and back to the time of every copy.
// On another stream it is over before the caller's has got there, wherever that one still has work.
//
// The memory is kept here and not torch's. torch hands out again what was freed on the caller's stream, for
// that stream's next use: an earlier kernel may still read it when another stream writes to it. A slot here
// is written again only once the device has done the last copy of its pairs, which the host asks for and does
// not wait for. Nothing is freed, since that would wait for the device: SLOTS bounds it.
#include "pairs.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "launch.h"

namespace xlayer {
namespace {

constexpr int64_t SLOT_PAIRS = 1 << 16;  // 512 KiB; more pairs take several slots and launches
constexpr size_t SLOTS = 32;             // a device

struct Slot {
  CopyPair* host = nullptr;
  CopyPair* device = nullptr;
  cudaEvent_t event = nullptr;  // recorded behind the upload, then behind the kernel
  bool taken = true;            // by a thread; for ever after an error, as nobody knows what still reads it

  Slot() = default;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() {
    if (event != nullptr) cudaEventDestroy(event);
    if (device != nullptr) cudaFree(device);
    if (host != nullptr) cudaFreeHost(host);
  }
  bool allocate() {
    const size_t bytes = SLOT_PAIRS * sizeof(CopyPair);
    return cudaMallocHost(reinterpret_cast<void**>(&host), bytes) == cudaSuccess &&
           cudaMalloc(reinterpret_cast<void**>(&device), bytes) == cudaSuccess &&
           cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess;
  }
};

struct Uploads {
  std::mutex mutex;  // of what is below
  cudaStream_t stream = nullptr;
  std::vector<std::unique_ptr<Slot>> slots;
};

// While another thread captures a graph, asking for an event or for memory would end its capture.
struct BesideCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Of the current device; nullptr where CUDA does not tell. Never destroyed: CUDA may be gone by then.
Uploads* current_uploads() {
  static Uploads* const all = [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? new Uploads[count] : nullptr;
  }();
  int device = 0;
  return all != nullptr && cudaGetDevice(&device) == cudaSuccess ? &all[device] : nullptr;
}

Slot* find_slot(Uploads& uploads) {
  for (const auto& slot : uploads.slots) {
    if (!slot->taken && cudaEventQuery(slot->event) == cudaSuccess) return slot.get();
  }
  if (uploads.slots.size() == SLOTS) return nullptr;
  if (uploads.stream == nullptr &&
      cudaStreamCreateWithFlags(&uploads.stream, cudaStreamNonBlocking) != cudaSuccess) {
    return nullptr;
  }
  auto slot = std::make_unique<Slot>();
  if (!slot->allocate()) return nullptr;
  return uploads.slots.emplace_back(std::move(slot)).get();
}

// A slot that no copy uses, or nullptr. What went wrong is not told: the copy does without, and an error that
// stays is the launch's too.
Slot* take_slot(Uploads& uploads) {
  const std::lock_guard<std::mutex> lock(uploads.mutex);
  const BesideCapture beside;
  Slot* slot = find_slot(uploads);
  if (slot != nullptr) slot->taken = true;
  cudaGetLastError();  // also a slot's "not ready": so that nobody takes it for a kernel's
  return slot;
}

cudaError_t upload_and_launch(const BlockCopyParams& p, bool touches_host, Uploads* uploads,
                              cudaStream_t stream) {
  Slot* slot = uploads != nullptr && !pairs_fit_launch(p) ? take_slot(*uploads) : nullptr;
  if (slot == nullptr) return launch_block_copy(p, touches_host, nullptr, stream);
  write_pairs(p, slot->host);
  const size_t bytes = size_t(p.num_pairs) * sizeof(CopyPair);
  cudaError_t error =
      cudaMemcpyAsync(slot->device, slot->host, bytes, cudaMemcpyHostToDevice, uploads->stream);
  if (error == cudaSuccess) error = cudaEventRecord(slot->event, uploads->stream);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(stream, slot->event, 0);
  if (error == cudaSuccess) error = launch_block_copy(p, touches_host, slot->device, stream);
  if (error == cudaSuccess) error = cudaEventRecord(slot->event, stream);
  if (error == cudaSuccess) {
    const std::lock_guard<std::mutex> lock(uploads->mutex);
    slot->taken = false;
  }
  return error;
}

}  // namespace

cudaError_t upload_and_launch_block_copy(const BlockCopyParams& p, bool touches_host, cudaStream_t stream) {
  Uploads* const uploads = current_uploads();
  for (int64_t begin = 0; begin < p.num_pairs; begin += SLOT_PAIRS) {
    BlockCopyParams part = p;
    part.src_ids += begin;
    part.dst_ids += begin;
    part.num_pairs = std::min(SLOT_PAIRS, p.num_pairs - begin);
    const cudaError_t error = upload_and_launch(part, touches_host, uploads, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace xlayer
