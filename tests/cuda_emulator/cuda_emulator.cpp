#include "cuda_emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace eaml::cuda::emulator {
namespace {

constexpr int kWarp = 32, kMostWarps = 8;
constexpr std::size_t kStack = 256 << 10;

// A stack and the switch to it. _longjmp is used because swapcontext makes a system call each time. A sanitizer needs
// calls around each switch, and treats a long jump as the end of all frames that it leaves; there swapcontext is used.
class Fiber {
 public:
  Fiber() : stack_(std::make_unique<char[]>(kStack)) {}

  void start(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get(), context_.uc_stack.ss_size = kStack, context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    started_ = false;
  }

#if defined(__SANITIZE_ADDRESS__)
  void enter() {  // called by the scheduler; returns at leave()
    void* mine = nullptr;
    __sanitizer_start_switch_fiber(&mine, stack_.get(), kStack);
    swapcontext(&outside_, &context_);
    __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
  }
  void entered() { __sanitizer_finish_switch_fiber(fake_, &outer_stack_, &outer_size_); }
  void leave() {
    __sanitizer_start_switch_fiber(&fake_, outer_stack_, outer_size_);
    swapcontext(&context_, &outside_);
    entered();
  }

 private:
  void* fake_ = nullptr;
  const void* outer_stack_ = nullptr;
  std::size_t outer_size_ = 0;
  ucontext_t outside_;
#else
  void enter() {
    if (_setjmp(outside_) != 0) return;
    if (started_) _longjmp(inside_, 1);
    started_ = true;
    setcontext(&context_);
  }
  void entered() {}
  void leave() {
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
  }

 private:
  jmp_buf inside_, outside_;
#endif
  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
  bool started_ = false;
};

// A barrier of all threads of a block or of a warp.
struct Gate {
  int members = 0, arrived = 0;
  std::uint32_t passed = 0;  // how often it opened
  std::uint64_t values[2][kWarp];
};

struct Thread {
  Fiber fiber;
  const Gate* waits = nullptr;
  std::uint32_t at = 0;  // the gate's `passed` when the thread arrived
  bool done = false;
};

// The last read or write of a word of shared memory. `block` and `warp` count barriers across all blocks.
struct Access {
  std::uint32_t block = 0, warp = 0;
  int thread = -1;  // kMany: several threads of a warp
};
constexpr int kMany = -2;

struct Machine {
  std::mutex one_at_a_time;
  std::mt19937 random{1};
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<int> order;
  std::vector<std::int64_t> blocks;
  Gate all, warps[kMostWarps], barriers[kMostWarps];  // barriers: of sync_warp, which orders memory
  Gate products[kMostWarps];
  std::uint32_t fragments[kMostWarps][2][kWarp][6];  // operands of a warp's product and of the previous one
  const std::function<void()>* kernel = nullptr;
  std::unique_ptr<char[]> shared;
  std::size_t shared_bytes = 0;
  std::int64_t total_shared_bytes = 0;  // of a block of each launch
  std::vector<Access> written, read;    // per word; per word and warp
  int thread = 0;
  std::int64_t block = 0;
  std::string error;
};
Machine m;

void fail(const std::string& what) {
  if (m.error.empty())
    m.error = "block " + std::to_string(m.block) + ", thread " + std::to_string(m.thread) + ": " + what;
}

// Ends the thread.
[[noreturn]] void give_up() {
  Thread& self = *m.threads[m.thread];
  self.done = true;
  for (;;) self.fiber.leave();
}

void enter() {
  Thread& self = *m.threads[m.thread];
  self.fiber.entered();
  (*m.kernel)();
  self.done = true;
  for (;;) self.fiber.leave();
}

// Waits until all members have arrived.
void pass(Gate& gate) {
  Thread& self = *m.threads[m.thread];
  const int index = m.thread;
  self.waits = &gate, self.at = gate.passed;
  if (++gate.arrived == gate.members) gate.arrived = 0, ++gate.passed;
  self.fiber.leave();
  m.thread = index;
}

void run_block() {
  const int count = static_cast<int>(m.order.size());
  // A separate allocation, so that a sanitizer reports accesses beyond its end. 0xff bytes are NaN in every precision.
  m.shared = std::make_unique<char[]>(m.shared_bytes);
  std::memset(m.shared.get(), 0xff, m.shared_bytes);
  const std::size_t words = m.shared_bytes / 4;
  if (m.written.size() < words) m.written.resize(words), m.read.resize(words * kMostWarps);
  m.all.members = count, m.all.arrived = 0, ++m.all.passed;
  for (int w = 0; w < count / kWarp; ++w)
    for (Gate* gate : {&m.warps[w], &m.barriers[w], &m.products[w]}) gate->members = kWarp, gate->arrived = 0;
  for (int i = 0; i < count; ++i) {
    Thread& t = *m.threads[i];
    t.waits = nullptr, t.done = false;
    t.fiber.start(enter);
  }
  for (int done = 0; done < count && m.error.empty();) {
    bool moved = false;
    std::shuffle(m.order.begin(), m.order.end(), m.random);
    for (const int i : m.order) {
      Thread& t = *m.threads[i];
      if (t.done || (t.waits != nullptr && t.waits->passed == t.at)) continue;
      m.thread = i, moved = true;
      t.fiber.enter();
      done += t.done;
    }
    if (!moved) fail("not all threads reach a barrier or an exchange");
  }
}

Access now() {
  return {m.all.passed, m.barriers[m.thread / kWarp].passed, m.thread};
}

// Returns whether a barrier orders `before` and `after`, or both are accesses of one thread.
bool ordered(const Access& before, const Access& after, int warp) {
  if (before.thread == -1 || before.thread == after.thread || before.block != after.block) return true;
  return warp == after.thread / kWarp && before.warp != after.warp;
}

}  // namespace

const char* run(std::int64_t blocks, int threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
  static thread_local std::string message;
  const std::lock_guard<std::mutex> lock(m.one_at_a_time);
  if (threads % kWarp != 0 || threads > kWarp * kMostWarps) return "a block must have whole warps";
  while (static_cast<int>(m.threads.size()) < threads) m.threads.push_back(std::make_unique<Thread>());
  m.order.resize(threads), std::iota(m.order.begin(), m.order.end(), 0);
  m.blocks.resize(blocks), std::iota(m.blocks.begin(), m.blocks.end(), 0);
  std::shuffle(m.blocks.begin(), m.blocks.end(), m.random);
  m.kernel = &kernel, m.shared_bytes = shared_bytes, m.total_shared_bytes += shared_bytes, m.error.clear();
  for (const std::int64_t block : m.blocks) {
    m.block = block;
    run_block();
    if (m.error.empty()) continue;
    message = m.error;
    return message.c_str();
  }
  return nullptr;
}

int thread() {
  return m.thread;
}
std::int64_t block() {
  return m.block;
}
char* shared_memory() {
  return m.shared.get();
}
void sync_block() {
  pass(m.all);
}
void sync_warp() {
  pass(m.barriers[m.thread / kWarp]);
}

std::uint64_t exchange(std::uint64_t value, int mask) {
  Gate& gate = m.warps[m.thread / kWarp];
  auto& values = gate.values[gate.passed % 2];  // threads may still read the previous exchange
  values[m.thread % kWarp] = value;
  pass(gate);
  return values[(m.thread ^ mask) % kWarp];
}

std::uint32_t ballot(bool yes) {
  Gate& gate = m.warps[m.thread / kWarp];
  auto& values = gate.values[gate.passed % 2];
  values[m.thread % kWarp] = yes;
  pass(gate);
  std::uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= static_cast<std::uint32_t>(values[i]) << i;
  return bits;
}

namespace {

// x as a multiple of 2^exponent, rounded up or down.
double cut(double x, int exponent, bool up) {
  const double multiple = std::ldexp(x, -exponent);
  return std::ldexp(up ? std::ceil(multiple) : std::floor(multiple), exponent);
}

constexpr int kStep = 4, kBits = 24;  // products of a step, bits of a term

// The sum of a step: terms are aligned to the largest and cut, and so is their sum.
double sum_of_step(const double (&terms)[kStep + 1], bool up) {
  double largest = 0, sum = 0;
  for (const double x : terms) largest = std::max(largest, std::abs(x)), sum += x;
  if (!std::isfinite(sum) || largest == 0) return sum;
  sum = 0;
  for (const double x : terms) sum += cut(x, std::ilogb(largest) + 1 - kBits, up);
  return sum == 0 ? 0 : cut(sum, std::ilogb(sum) + 1 - kBits, up);
}

// A half of a pair of bfloat16; subnormal numbers are read as zero.
double half_of(std::uint32_t pair, int k) {
  const std::uint32_t bits = k % 2 == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, 4);
  return std::fpclassify(x) == FP_SUBNORMAL ? 0 : x;
}

}  // namespace

// The least precise products that csrc/knn/error_bounds.h allows. Adjacent entries are rounded in opposite directions.
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const int warp = m.thread / kWarp, lane = m.thread % kWarp;
  Gate& gate = m.products[warp];
  auto& fragments = m.fragments[warp][gate.passed % 2];
  std::copy_n(a, 4, fragments[lane]), std::copy_n(b, 2, fragments[lane] + 4);
  pass(gate);
  for (int j = 0; j < 4; ++j) {
    const int row = lane / 4, column = lane % 4 * 2 + j % 2;
    double sum = c[j];
    for (int first = 0; first < 16; first += kStep) {
      double terms[kStep + 1] = {sum};
      for (int k = first; k < first + kStep; ++k)
        terms[1 + k - first] = half_of(fragments[row * 4 + k % 8 / 2][j / 2 + k / 8 * 2], k) *
                               half_of(fragments[column * 4 + k % 8 / 2][4 + k / 8], k);
      sum = sum_of_step(terms, (row + column) % 2 == 0);
    }
    c[j] = static_cast<float>(sum);
  }
}

void touch(const void* data, std::size_t bytes, bool write) {
  const std::ptrdiff_t from = static_cast<const char*>(data) - m.shared.get();
  if (from < 0 || from + bytes > m.shared_bytes) {
    fail("outside shared memory");
    give_up();
  }
  if (from % std::min<std::size_t>(bytes, 16) != 0) return fail("shared memory is not aligned for this");
  const Access me = now();
  const int my_warp = m.thread / kWarp;
  const int warps = static_cast<int>(m.order.size()) / kWarp;
  for (std::size_t i = from / 4; i < (from + bytes) / 4; ++i) {
    Access &written = m.written[i], *read = &m.read[i * kMostWarps];
    const auto race = [&](const char* before) {
      fail(std::string(write ? "writes" : "reads") + " word " + std::to_string(i) +
           " with no barrier since another thread " + before + " it");
    };
    if (!ordered(written, me, written.thread / kWarp)) return race("wrote");
    if (write) {
      for (int w = 0; w < warps; ++w)
        if (!ordered(read[w], me, w)) return race("read");
      written = me;
    } else {
      Access& mine = read[my_warp];
      const bool same = mine.thread != -1 && mine.block == me.block && mine.warp == me.warp;
      mine = {me.block, me.warp, same && mine.thread != me.thread ? kMany : me.thread};
    }
  }
}

}  // namespace eaml::cuda::emulator

// The sum, over all launches, of the shared memory of a block: two calls that differ in it ran different kernels.
extern "C" __attribute__((visibility("default"))) std::int64_t eaml_total_shared_bytes() {
  return eaml::cuda::emulator::m.total_shared_bytes;
}
