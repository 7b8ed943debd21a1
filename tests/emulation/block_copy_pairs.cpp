// What brings pairs to the device, on a fake device: for tests/ops/test_block_copy_pairs.py.
#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>

#include "kernels/block_copy/pairs.cu"

static FakeDevice devices[FAKE_DEVICES];
static std::atomic<int> current{0};
FakeDevice& fake() { return devices[current]; }
int fake_index() { return current; }

namespace xlayer {
namespace {

constexpr int FEW = 448;
constexpr int STREAMS = 3;
FakeStream streams[STREAMS];
std::atomic<long> right, wrong, uploaded, with_launch;  // the first two: pairs; then: launches
std::atomic<bool> launch_fails{false};

bool step_any(std::mt19937& random) {
  const FakeLock lock(fake().mutex);
  std::vector<FakeStream*> all;
  for (FakeStream& s : streams) all.push_back(&s);
  for (FakeStream* s : fake().streams) all.push_back(s);
  std::shuffle(all.begin(), all.end(), random);
  for (FakeStream* s : all) {
    if (fake_step(*s)) return true;
  }
  return false;
}

}  // namespace

bool pairs_fit_launch(const BlockCopyParams& p) { return p.num_pairs <= FEW; }

void write_pairs(const BlockCopyParams& p, CopyPair* pairs) {
  for (int64_t i = 0; i < p.num_pairs; ++i) pairs[i] = {int32_t(p.src_ids[i]), int32_t(p.dst_ids[i])};
}

// Looks at the pairs when the stream gets there.
cudaError_t launch_block_copy(const BlockCopyParams& p, bool, const CopyPair* pairs, cudaStream_t stream) {
  if (launch_fails) return cudaErrorLaunchFailure;
  std::vector<CopyPair> expected(p.num_pairs);
  write_pairs(p, expected.data());
  ++(pairs == nullptr ? with_launch : uploaded);
  fake_push(stream, [=] {
    for (size_t i = 0; i < expected.size(); ++i) {
      const CopyPair& pair = pairs == nullptr ? expected[i] : pairs[i];
      ++(pair.src == expected[i].src && pair.dst == expected[i].dst ? right : wrong);
    }
  });
  return cudaGetLastError();  // as the real one: what others left behind would be taken for its own
}

}  // namespace xlayer

using namespace xlayer;

// A device with nothing on it, and all counts at 0.
extern "C" void reset(int device, int out_of_memory, int failing) {
  current = device;
  for (FakeStream& s : streams) s.steps.clear();
  fake().out_of_memory = out_of_memory;
  launch_fails = failing;
  right = wrong = uploaded = with_launch = 0;
}

// A copy of so many pairs, whose ids only it has. Returns CUDA's error.
extern "C" int submit(int stream, int64_t num_pairs, int64_t first_id) {
  std::vector<int64_t> src(num_pairs), dst(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) src[i] = first_id + i, dst[i] = 1'000'000'000 + first_id + i;
  BlockCopyParams p = {};
  p.src_ids = src.data();
  p.dst_ids = dst.data();
  p.num_pairs = num_pairs;
  return upload_and_launch_block_copy(p, false, &streams[stream]);
}

// Steps of the device in a random order, at most so many.
extern "C" void device_steps(int64_t seed, int64_t most) {
  std::mt19937 random{unsigned(seed)};
  for (int64_t i = 0; i < most && step_any(random); ++i) {
  }
}
// Only what the code under test has on streams of its own.
extern "C" void upload_steps() {
  for (FakeStream* s : fake().streams) {
    while (fake_step(*s)) {
    }
  }
}
extern "C" int caller_step(int stream) { return fake_step(streams[stream]); }

// Copies from several threads at once, beside a device that works.
extern "C" void submit_from_threads(int64_t threads, int64_t copies) {
  std::vector<std::thread> all;
  std::atomic<int64_t> left{threads};
  for (int64_t t = 0; t < threads; ++t) {
    all.emplace_back([=, &left] {
      for (int64_t i = 0; i < copies; ++i)
        submit(int(t % STREAMS), FEW + 1 + i % 50, (t * copies + i) * 1000);
      --left;
    });
  }
  std::mt19937 random{1};
  while (left > 0) {
    if (!step_any(random)) std::this_thread::yield();
  }
  for (std::thread& t : all) t.join();
}

extern "C" int64_t count(int which) {
  const int64_t counts[] = {right, wrong, uploaded, with_launch, fake().slots};
  return counts[which];
}
