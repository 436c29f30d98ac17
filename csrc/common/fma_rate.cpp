#include "common/fma_rate.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "common/simd.h"

namespace eaml {
namespace {

constexpr int kRounds = 1 << 14, kVectors = 12;  // as many sums side by side as every instruction set has registers for

template <class V>
EAML_INLINE float multiply_adds_(float number) {
  V x[kVectors];
  EAML_UNROLL
  for (int k = 0; k < kVectors; ++k) x[k] = number - V{};
  const V factor = number - V{}, summand = 2 * number - V{};
  for (int i = 0; i < kRounds; ++i) {
    EAML_UNROLL
    for (int k = 0; k < kVectors; ++k) x[k] = x[k] * factor + summand;
  }
  V sum{};
  for (int k = 0; k < kVectors; ++k) sum += x[k];
  return sum[0];
}

template <class V>
EAML_INLINE float read_(const float* from, std::int64_t count) {
  constexpr int kWide = 4, kStep = kWide * Lanes<V>::count;
  V sum[kWide] = {};
  for (std::int64_t i = 0; i + kStep <= count; i += kStep) {
    EAML_UNROLL
    for (int k = 0; k < kWide; ++k) sum[k] += load<V>(from + i + k * Lanes<V>::count);
  }
  return (sum[0] + sum[1] + sum[2] + sum[3])[0];
}

#define EAML_DEFINE(TARGET, BYTES)                                    \
  TARGET int vector_lanes() {                                         \
    return BYTES / sizeof(float);                                     \
  }                                                                   \
  TARGET float multiply_adds(float number) {                          \
    return multiply_adds_<Vec<float, BYTES / sizeof(float)>>(number); \
  }                                                                   \
  TARGET float read(const float* from, std::int64_t count) {          \
    return read_<Vec<float, BYTES / sizeof(float)>>(from, count);     \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE

// Seconds of the fastest of `tries` calls.
template <class Function>
double fastest(int tries, Function function) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int i = 0; i < tries; ++i) {
    const auto start = Clock::now();
    const volatile float keep = function();
    (void)keep;
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

}  // namespace

double fma_rate() {
  volatile float number = 0.5f;
  return double(kRounds) * kVectors * vector_lanes() / fastest(50, [&] { return multiply_adds(number); });
}

double read_rate(std::int64_t bytes) {
  const std::vector<float> x(std::max<std::int64_t>(bytes, 4096) / 4, 1.0f);
  const double size = 4.0 * double(x.size());
  return size / fastest(5 + int(1e9 / size), [&] { return read(x.data(), std::int64_t(x.size())); });
}

}  // namespace eaml
