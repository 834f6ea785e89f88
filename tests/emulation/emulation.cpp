// The scheduler of the emulation: one block at a time, its lanes as fibres, the next to run drawn at random.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

constexpr size_t kSharedBytes = 232448;  // what a block of an H100 may have
constexpr size_t kGuardBytes = 4096;
alignas(16) double qempo_shared[(kSharedBytes + kGuardBytes) / sizeof(double)];

namespace emulation {

dim3 thread_index, block_index;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in every float type

struct Lane {
  ucontext_t context;
  std::vector<char> stack;
  bool done, waiting;
  Wait kind;
  unsigned mask;
  const char* what;
  int shuffles;
  unsigned char slot[2][8];
};

std::vector<Lane> lanes;
ucontext_t scheduler;
int current, live;
const std::function<void()>* body;
std::string failure;
uint64_t state = 1;
std::map<const void*, size_t> limits;

uint64_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

void fail(const std::string& why) {
  if (failure.empty())
    failure = "block " + std::to_string(block_index.x) + ", thread " + std::to_string(current) + ": " + why;
}

void leave() { swapcontext(&lanes[current].context, &scheduler); }

void entry() {
  (*body)();
  lanes[current].done = true;
  leave();
}

// Whether every lane that `lane` waits for waits for it too. Lanes that have returned count as arrived.
bool released(int n) {
  const Lane& lane = lanes[n];
  const int first = lane.kind == Wait::block ? 0 : n / 32 * 32;
  const int last = lane.kind == Wait::block ? live : min(first + 32, live);
  for (int m = first; m < last; ++m) {
    const Lane& other = lanes[m];
    if (lane.kind == Wait::warp && !(lane.mask >> (m - first) & 1)) continue;
    if (other.done) continue;
    if (!other.waiting) return false;
    if (other.kind != lane.kind || other.mask != lane.mask || std::strcmp(other.what, lane.what) != 0) return false;
  }
  return true;
}

void release(int n) {
  const Wait kind = lanes[n].kind;
  const unsigned mask = lanes[n].mask;
  const int first = kind == Wait::block ? 0 : n / 32 * 32, last = kind == Wait::block ? live : min(first + 32, live);
  for (int m = first; m < last; ++m)
    if (kind == Wait::block || mask >> (m - first) & 1) lanes[m].waiting = false;
}

void start(int n) {
  Lane& lane = lanes[n];
  lane.stack.resize(kStackBytes);
  lane.done = lane.waiting = false;
  lane.shuffles = 0;
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = lane.stack.data();
  lane.context.uc_stack.ss_size = lane.stack.size();
  lane.context.uc_link = nullptr;
  makecontext(&lane.context, entry, 0);
}

void run_block() {
  for (int n = 0; n < live; ++n) start(n);
  std::vector<int> ready;
  while (failure.empty()) {
    ready.clear();
    bool all_done = true;
    for (int n = 0; n < live; ++n) {
      all_done = all_done && lanes[n].done;
      if (!lanes[n].done && !lanes[n].waiting) ready.push_back(n);
    }
    if (all_done) return;
    if (ready.empty()) return fail("deadlock: lanes wait at different barriers, shuffles or masks");
    // A whole round in random order, then the barriers that are complete.
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[draw() % i]);
    for (int n : ready) {
      current = n;
      thread_index = dim3(static_cast<unsigned>(n), 0, 0);
      swapcontext(&scheduler, &lanes[n].context);
      if (!failure.empty()) return;
    }
    for (int n = 0; n < live; ++n)
      // Warps that may go on now and then wait a round, so that they drift apart.
      if (!lanes[n].done && lanes[n].waiting && released(n) && (lanes[n].kind == Wait::block || draw() % 4)) release(n);
    bool moving = false;
    for (int n = 0; n < live; ++n) moving = moving || (!lanes[n].done && !lanes[n].waiting);
    for (int n = 0; n < live && !moving; ++n)
      if (!lanes[n].done && released(n)) release(n), moving = true;
  }
}

}  // namespace

void wait(Wait kind, unsigned mask, const char* what) {
  Lane& lane = lanes[current];
  if (kind == Wait::warp && !(mask >> (current % 32) & 1)) fail(std::string(what) + ": the lane is not in its mask");
  lane.waiting = true, lane.kind = kind, lane.mask = mask, lane.what = what;
  leave();
}

void exchange(unsigned mask, int partner, void* value, size_t bytes) {
  const int self = current, first = current / 32 * 32;
  const int slot = lanes[self].shuffles++ % 2;
  std::memcpy(lanes[self].slot[slot], value, bytes);
  wait(Wait::warp, mask, "shuffle");
  if (partner < 0 || partner > 31 || !(mask >> partner & 1) || first + partner >= live || lanes[first + partner].done)
    return fail("shuffle from a lane that does not take part");
  std::memcpy(value, lanes[first + partner].slot[slot], bytes);
}

void allow_shared(const void* kernel, int bytes) { limits[kernel] = static_cast<size_t>(bytes); }
size_t allowed_shared(const void* kernel) {
  const auto found = limits.find(kernel);
  return found == limits.end() ? 48 * 1024 : found->second;
}
const char* message() { return failure.c_str(); }
void reseed(uint64_t seed) { state = seed * 2 + 1; }

cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  failure.clear();
  body = &kernel;
  live = static_cast<int>(block.x);
  if (lanes.size() < block.x) lanes.resize(block.x);
  std::vector<unsigned> order(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) order[b] = b;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  auto* bytes = reinterpret_cast<unsigned char*>(qempo_shared);
  for (unsigned b : order) {
    block_index = dim3(b, 0, 0);
    std::memset(bytes, kPoison, shared + kGuardBytes);
    run_block();
    for (size_t n = shared; n < shared + kGuardBytes && failure.empty(); ++n)
      if (bytes[n] != kPoison) fail("shared memory written behind its end");
    if (!failure.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulation
