#include "common/exp_rate.h"

#include <algorithm>
#include <chrono>

#include "common/math.h"

namespace eaml {
namespace {

constexpr int kRounds = 4096, kVectors = 8;

// The numbers overflow within a few rounds; the instructions take as long.
template <class V>
EAML_INLINE float rounds_() {
  V x[kVectors];
  for (int k = 0; k < kVectors; ++k) x[k] = splat<V>(-0.1f) * float(k);
  for (int i = 0; i < kRounds; ++i) {
    V y[kVectors];
    exp2_(x, y);
    EAML_UNROLL
    for (int k = 0; k < kVectors; ++k) x[k] = y[k];
  }
  float sum = 0;
  for (int k = 0; k < kVectors; ++k) sum += x[k][0];
  return sum;
}

#define EAML_DEFINE(TARGET, BYTES)                       \
  TARGET int lanes() {                                   \
    return BYTES / sizeof(float);                        \
  }                                                      \
  TARGET float rounds() {                                \
    return rounds_<Vec<float, BYTES / sizeof(float)>>(); \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE

}  // namespace

double exp_rate() {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int i = 0; i < 50; ++i) {
    const auto start = Clock::now();
    const volatile float keep = rounds();
    (void)keep;
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return double(kRounds) * kVectors * lanes() / best;
}

}  // namespace eaml
