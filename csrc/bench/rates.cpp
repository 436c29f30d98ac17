// Rates of one thread that benchmarks compare kernels with. benchmarks/common.py compiles and loads this file; it is
// not part of the package.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/exp2.h"
#include "common/simd.h"

namespace eaml::rates {

constexpr int kExpRounds = 4096, kExpVectors = 8;

// The numbers overflow within a few rounds, which does not change the time of the instructions.
template <class V>
EAML_INLINE float exponentials_() {
  V x[kExpVectors];
  for (int k = 0; k < kExpVectors; ++k) x[k] = splat<V>(-0.1f) * float(k);
  for (int i = 0; i < kExpRounds; ++i) {
    V y[kExpVectors];
    exp2_(x, y);
    EAML_UNROLL
    for (int k = 0; k < kExpVectors; ++k) x[k] = y[k];
  }
  float sum = 0;
  for (int k = 0; k < kExpVectors; ++k) sum += x[k][0];
  return sum;
}

constexpr int kRounds = 1 << 14, kVectors = 12;  // sums: every instruction set has registers for them

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

// Sums an array in kStreams parts side by side.
template <class V, int kStreams>
EAML_INLINE float read_(const float* from, std::int64_t count) {
  constexpr int kWide = 4, kStep = kWide * Lanes<V>::count;
  const std::int64_t part = count / kStreams;
  V sum[kWide] = {};
  for (std::int64_t i = 0; i + kStep <= part; i += kStep) {
    EAML_UNROLL
    for (int stream = 0; stream < kStreams; ++stream) {
      EAML_UNROLL
      for (int k = 0; k < kWide; ++k) sum[k] += load<V>(from + stream * part + i + k * Lanes<V>::count);
    }
  }
  return (sum[0] + sum[1] + sum[2] + sum[3])[0];
}

#define EAML_DEFINE(TARGET, BYTES)                                    \
  TARGET float exponentials() {                                       \
    return exponentials_<Vec<float, BYTES / sizeof(float)>>();        \
  }                                                                   \
  TARGET int vector_lanes() {                                         \
    return BYTES / sizeof(float);                                     \
  }                                                                   \
  TARGET float multiply_adds(float number) {                          \
    return multiply_adds_<Vec<float, BYTES / sizeof(float)>>(number); \
  }                                                                   \
  TARGET float read(const float* from, std::int64_t count) {          \
    return read_<Vec<float, BYTES / sizeof(float)>, 1>(from, count);  \
  }                                                                   \
  TARGET float read4(const float* from, std::int64_t count) {         \
    return read_<Vec<float, BYTES / sizeof(float)>, 4>(from, count);  \
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

double best_exp_rate() {
  return double(kExpRounds) * kExpVectors * vector_lanes() / fastest(50, [] { return exponentials(); });
}
double best_fma_rate() {
  volatile float number = 0.5f;
  return double(kRounds) * kVectors * vector_lanes() / fastest(50, [&] { return multiply_adds(number); });
}
double best_read_rate(std::int64_t bytes) {
  const std::vector<float> x(std::max<std::int64_t>(bytes, 4096) / 4, 1.0f);
  const double size = 4.0 * double(x.size());
  return size / fastest(5 + int(1e9 / size), [&] { return read(x.data(), std::int64_t(x.size())); });
}

// Reads every array once; each thread reads its share of each, in order or in four parts side by side.
void read_arrays(const float* const* arrays, const std::int64_t* counts, std::int64_t size, int threads,
                 bool in_parts) {
  const auto read_share = [=](int thread) {
    volatile float keep = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t begin = counts[i] * thread / threads, end = counts[i] * (thread + 1) / threads;
      const float* const from = arrays[i] + begin;
      keep = keep + (in_parts ? read4(from, end - begin) : read(from, end - begin));
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(read_share, thread);
  read_share(0);
  for (std::thread& other : others) other.join();
}

}  // namespace eaml::rates

#define EAML_EXPORT extern "C" __attribute__((visibility("default")))

// float32 exponentials per second, in registers.
EAML_EXPORT double exp_rate() {
  return eaml::rates::best_exp_rate();
}
// float32 multiply-adds per second, in registers.
EAML_EXPORT double fma_rate() {
  return eaml::rates::best_fma_rate();
}
// Bytes per second of reading an array of `bytes` repeatedly.
EAML_EXPORT double read_rate(std::int64_t bytes) {
  return eaml::rates::best_read_rate(bytes);
}
// Reads `size` arrays of counts[i] float32 numbers once, on threads.
EAML_EXPORT void read_arrays(const float* const* arrays, const std::int64_t* counts, std::int64_t size, int threads,
                             bool in_parts) {
  eaml::rates::read_arrays(arrays, counts, size, threads, in_parts);
}
