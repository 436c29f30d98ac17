// Device code of the causal convolution.
//
// A thread computes kSteps steps of a channel at a time, a chunk. It holds their inputs in registers, with those of the
// width - 1 steps before them and, in backward, after them. Sums have the order of the CPU kernels: the bias, then the
// taps from the oldest to the newest.
#pragma once

#include <type_traits>

#include "causal_conv1d/cuda/launch.h"
#include "common/cuda_compat.h"
#include "common/softplus.h"

namespace eaml::causal_conv1d {
namespace {

constexpr int kThreads = 128;
constexpr int kSteps = 8;  // a multiple of the elements of 16 bytes

template <class T, Half kHalf>
EAML_DEVICE T load_element(const T* from, int64_t at) {
  if constexpr (kHalf == Half::kNone)
    return cuda::load(from + at);
  else
    return widen<kHalf, T>(std::uint32_t{cuda::load(reinterpret_cast<const std::uint16_t*>(from) + at)});
}
template <class T, Half kHalf>
EAML_DEVICE void store_element(T* to, int64_t at, T value) {
  if constexpr (kHalf == Half::kNone)
    to[at] = value;
  else
    reinterpret_cast<std::uint16_t*>(to)[at] = static_cast<std::uint16_t>(narrow<kHalf, std::uint32_t>(value));
}

// The row, channel and segment of a thread, and its place among the kLanes threads that share a channel.
struct Place {
  int64_t row, channel, segment;
  int lane;
};
template <int kLanes, class T>
EAML_DEVICE Place place(const ConvParams<T>& p) {
  const int64_t index = (cuda::block() * kThreads + cuda::thread()) / kLanes;
  const int lane = cuda::thread() % kLanes;
  // Adjacent threads have adjacent channels, adjacent warps adjacent segments.
  if constexpr (kLanes == 1) {
    const int64_t rest = index / p.dim;
    return {rest / p.segments, index % p.dim, rest % p.segments, lane};
  } else {
    const int64_t rest = index / p.segments;
    return {rest / p.dim, rest % p.dim, index % p.segments, lane};
  }
}

// to[i] = the element of step `begin` + i, 0 outside of the row. The kSteps steps from begin + kFirst on may be read in
// accesses of 16 bytes.
template <class T, Half kHalf, int kFirst, int kCount>
EAML_DEVICE void load_steps(T (&to)[kCount], const In<T>& x, int64_t offset, int64_t begin, int64_t length,
                            bool aligned) {
  if (aligned && begin + kFirst + kSteps <= length) {
    if constexpr (kHalf == Half::kNone) {
      T row[kSteps];
      cuda::load_row(row, x.data + offset + begin + kFirst);
      EAML_UNROLL
      for (int i = 0; i < kSteps; ++i) to[kFirst + i] = row[i];
    } else {
      std::uint32_t row[kSteps / 2];
      cuda::load_row(row, reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const std::uint16_t*>(x.data) +
                                                                 offset + begin + kFirst));
      EAML_UNROLL
      for (int i = 0; i < kSteps; i += 2)
        to[kFirst + i] = cuda::widen_low<kHalf>(row[i / 2]), to[kFirst + i + 1] = cuda::widen_high<kHalf>(row[i / 2]);
    }
    EAML_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i >= kFirst && i < kFirst + kSteps) continue;
      const int64_t t = begin + i;
      to[i] = t >= 0 && t < length ? load_element<T, kHalf>(x.data, offset + t) : T(0);
    }
    return;
  }
  EAML_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const int64_t t = begin + i;
    to[i] = t >= 0 && t < length ? load_element<T, kHalf>(x.data, offset + t * x.inner) : T(0);
  }
}

template <class T, Half kHalf>
EAML_DEVICE void store_steps(const Out<T>& y, int64_t offset, int64_t begin, int64_t length, bool aligned,
                             const T (&from)[kSteps]) {
  if (aligned && begin + kSteps <= length) {
    if constexpr (kHalf == Half::kNone) {
      cuda::store_row(y.data + offset + begin, from);
    } else {
      std::uint32_t row[kSteps / 2];
      EAML_UNROLL
      for (int i = 0; i < kSteps; i += 2) row[i / 2] = cuda::narrow_pair<kHalf>(from[i], from[i + 1]);
      cuda::store_row(reinterpret_cast<std::uint32_t*>(reinterpret_cast<std::uint16_t*>(y.data) + offset + begin), row);
    }
    return;
  }
  EAML_UNROLL
  for (int i = 0; i < kSteps; ++i)
    if (begin + i < length) store_element<T, kHalf>(y.data, offset + (begin + i) * y.inner, from[i]);
}

// Whether chunks of adjacent steps start at a multiple of 16 bytes in all rows and channels.
template <class X>
EAML_DEVICE bool is_aligned(const X& x, int64_t element_bytes) {
  const int64_t bits =
      reinterpret_cast<std::uintptr_t>(x.data) | (x.outer * element_bytes) | (x.channel * element_bytes);
  return x.inner == 1 && bits % 16 == 0;
}

template <class T, int kWidth>
struct Parameters {
  T weight[kWidth], bias;
};
template <class T, int kWidth>
EAML_DEVICE Parameters<T, kWidth> parameters(const ConvParams<T>& p, const Place& at) {
  Parameters<T, kWidth> w;
  const int64_t channel = at.row / p.rows_per_task * p.dim + at.channel;
  EAML_UNROLL
  for (int k = 0; k < kWidth; ++k) w.weight[k] = cuda::load(p.weight + channel * kWidth + k);
  w.bias = p.bias == nullptr ? T(0) : cuda::load(p.bias + channel);
  return w;
}

// The input `distance` > 0 steps before the run of a step.
template <class T, Half kHalf>
EAML_DEVICE T before_run(const ConvParams<T>& p, const Place& at, const Position& step, int distance) {
  const In<T>& s = p.states;
  if (step.zero || s.data == nullptr) return T(0);
  const int64_t row = at.row * s.outer + step.sequence * s.sequence + at.channel * s.channel;
  return load_element<T, kHalf>(s.data, row + (p.width - 1 - distance) * s.inner);
}

// Replaces the taps before the run of a step; tap[k] is the input width - 1 - k steps before the step.
template <class T, Half kHalf, int kWidth>
EAML_DEVICE void replace_taps(T (&tap)[kWidth], const ConvParams<T>& p, const Place& at, const Position& step) {
  if (step.past == kWidth - 1) return;
  EAML_UNROLL
  for (int k = 0; k < kWidth - 1; ++k) {
    const int distance = kWidth - 1 - k - step.past;
    if (distance > 0) tap[k] = before_run<T, kHalf>(p, at, step, distance);
  }
}

// Whether all steps [begin - width + 1, end) are in the row and in one run, as in most chunks of most calls.
template <int kWidth, class T>
EAML_DEVICE bool in_one_run(const ConvParams<T>& p, int64_t begin, int64_t end) {
  return p.runs.reset == nullptr && p.runs.cu_seqlens == nullptr && begin >= kWidth - 1 && end <= p.runs.length;
}

template <class T, int kWidth>
EAML_DEVICE T filter(const Parameters<T, kWidth>& w, const T (&tap)[kWidth]) {
  T sum = w.bias;
  EAML_UNROLL
  for (int k = 0; k < kWidth; ++k) sum = fused(tap[k], w.weight[k], sum);
  return sum;
}

template <class T, Half kHalf, int kWidth, int kLanes>
EAML_KERNEL(kThreads, sizeof(T) == 4 ? 8 : 4)
forward_kernel(EAML_CONSTANT ConvParams<T> p) {
  const Place at = place<kLanes>(p);
  if (at.row >= p.batch) return;
  const Parameters<T, kWidth> w = parameters<T, kWidth>(p, at);
  const int64_t x_offset = at.row * p.x.outer + at.channel * p.x.channel;
  const int64_t y_offset = at.row * p.y.outer + at.channel * p.y.channel;
  constexpr int64_t kBytes = kHalf == Half::kNone ? sizeof(T) : 2;
  const bool x_aligned = kLanes > 1 && is_aligned(p.x, kBytes), y_aligned = kLanes > 1 && is_aligned(p.y, kBytes);
  const int64_t length = p.runs.length, size = kSegment<kLanes>;
  const int64_t end = size < length - at.segment * size ? (at.segment + 1) * size : length;
  for (int64_t begin = at.segment * size + at.lane * kSteps; begin < end; begin += kLanes * kSteps) {
    T x[kWidth - 1 + kSteps], y[kSteps];
    load_steps<T, kHalf, kWidth - 1>(x, p.x, x_offset, begin - (kWidth - 1), length, x_aligned);
    const auto compute = [&](auto one_run) {
      constexpr bool kOneRun = decltype(one_run)::value;
      Position step{};
      if constexpr (!kOneRun) step = position<kWidth>(p.runs, at.row, begin);
      EAML_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        T tap[kWidth];
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k) tap[k] = x[i + k];
        if constexpr (!kOneRun) {
          if (i > 0 && begin + i < length) advance<kWidth>(p.runs, at.row, step);
          replace_taps<T, kHalf>(tap, p, at, step);
        }
        const T sum = filter(w, tap);
        y[i] = p.silu ? sum * sigmoid(sum) : sum;
      }
    };
    in_one_run<kWidth>(p, begin, begin + kSteps) ? compute(std::true_type()) : compute(std::false_type());
    store_steps<T, kHalf>(p.y, y_offset, begin, length, y_aligned, y);
  }
}

// The gradients of a run's state, at the run's first step. `grad` starts with the gradient of that step's sum, of which
// `later` more belong to the run.
template <class T, Half kHalf, int kWidth>
EAML_DEVICE void store_state_gradients(const ConvParams<T>& p, const Place& at, const Parameters<T, kWidth>& w,
                                       int64_t t, const T* grad, int later) {
  const Position step = position<kWidth>(p.runs, at.row, t);
  if (!starts_from_state(step)) return;
  const Out<T>& s = p.grad_states;
  const int64_t row = at.row * s.outer + step.sequence * s.sequence + at.channel * s.channel;
  EAML_UNROLL
  for (int k = 0; k < kWidth - 1; ++k) {  // the input width - 1 - k steps before the first step
    T sum = T(0);
    EAML_UNROLL
    for (int j = 0; j <= k; ++j)
      if (j <= later) sum = fused(grad[j], w.weight[k - j], sum);
    store_element<T, kHalf>(s.data, row + k * s.inner, sum);
  }
}

template <class T, Half kHalf, int kWidth, int kLanes>
EAML_KERNEL(kThreads, sizeof(T) == 4 ? 5 : 3)
backward_kernel(EAML_CONSTANT ConvParams<T> p) {
  const Place at = place<kLanes>(p);
  if (at.row >= p.batch) return;
  const Parameters<T, kWidth> w = parameters<T, kWidth>(p, at);
  const int64_t x_offset = at.row * p.x.outer + at.channel * p.x.channel;
  const int64_t y_offset = at.row * p.y.outer + at.channel * p.y.channel;
  const int64_t grad_offset = at.row * p.grad_y.outer + at.channel * p.grad_y.channel;
  constexpr int64_t kBytes = kHalf == Half::kNone ? sizeof(T) : 2;
  const bool x_aligned = kLanes > 1 && is_aligned(p.x, kBytes), y_aligned = kLanes > 1 && is_aligned(p.y, kBytes);
  const bool grad_aligned = kLanes > 1 && is_aligned(p.grad_y, kBytes);
  const int64_t length = p.runs.length, size = kSegment<kLanes>;
  const int64_t end = size < length - at.segment * size ? (at.segment + 1) * size : length;
  T sums[kWidth + 1] = {};
  for (int64_t begin = at.segment * size + at.lane * kSteps; begin < end; begin += kLanes * kSteps) {
    constexpr int kSums = kSteps + kWidth - 1;
    T x[kWidth - 1 + kSums], grad[kSums], grad_x[kSteps];
    load_steps<T, kHalf, kWidth - 1>(x, p.x, x_offset, begin - (kWidth - 1), length, x_aligned);
    load_steps<T, kHalf, 0>(grad, p.grad_y, grad_offset, begin, length, grad_aligned);
    const auto compute = [&](auto one_run) {
      constexpr bool kOneRun = decltype(one_run)::value;
      Position step{};
      if constexpr (!kOneRun) step = position<kWidth>(p.runs, at.row, begin);
      int past[kSums];  // -1 after the row
      EAML_UNROLL
      for (int i = 0; i < kSums; ++i) {
        past[i] = kOneRun ? kWidth - 1 : -1;
        T tap[kWidth];
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k) tap[k] = x[i + k];
        if constexpr (!kOneRun) {
          if (begin + i >= length) continue;
          if (i > 0) advance<kWidth>(p.runs, at.row, step);
          past[i] = step.past;
          replace_taps<T, kHalf>(tap, p, at, step);
        }
        if (p.silu) {
          const T sum = filter(w, tap), s = sigmoid(sum);
          grad[i] *= s * (T(1) + sum * (T(1) - s));
        }
        if (i >= kSteps) continue;
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k) sums[k] = fused(grad[i], tap[k], sums[k]);
        sums[kWidth] += grad[i];
      }
      EAML_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        grad_x[i] = T(0);
        int later = 0;
        EAML_UNROLL
        for (int j = 0; j < kWidth; ++j)
          if (past[i + j] >= j) grad_x[i] = fused(grad[i + j], w.weight[kWidth - 1 - j], grad_x[i]), later = j;
        if (!kOneRun && p.grad_states.data != nullptr && past[i] == 0)
          store_state_gradients<T, kHalf>(p, at, w, begin + i, grad + i, later);
      }
    };
    in_one_run<kWidth>(p, begin, begin + kSums) ? compute(std::true_type()) : compute(std::false_type());
    store_steps<T, kHalf>(p.y, y_offset, begin, length, y_aligned, grad_x);
  }
  EAML_UNROLL
  for (int k = 0; k <= kWidth; ++k) {
    EAML_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) sums[k] += cuda::shuffle_xor(sums[k], mask);
    if (at.lane == 0) p.partial[((at.row * p.segments + at.segment) * (kWidth + 1) + k) * p.dim + at.channel] = sums[k];
  }
}

// A block computes kSumColumns sums, each on kSumRows threads, in a fixed order.
constexpr int kSumColumns = 32, kSumRows = 8;
template <class T>
EAML_KERNEL(kSumColumns* kSumRows)
sum_kernel(EAML_CONSTANT SumParams<T> p) {
  const int64_t inner = (p.width + 1) * p.dim, per_task = (inner + kSumColumns - 1) / kSumColumns;
  const int64_t task = cuda::block() / per_task;
  const int column = cuda::thread() % kSumColumns, row = cuda::thread() / kSumColumns;
  const int64_t at = cuda::block() % per_task * kSumColumns + column;
  const cuda::Shared<T> sums{reinterpret_cast<T*>(cuda::shared_memory())};
  T total = T(0);
  if (at < inner)
    for (int64_t j = row; j < p.middle; j += kSumRows) total += p.partial[(task * p.middle + j) * inner + at];
  sums.set(row * kSumColumns + column, total);
  cuda::sync_block();
  if (row > 0 || at >= inner) return;
  for (int r = 1; r < kSumRows; ++r) total += sums.get(r * kSumColumns + column);
  const int64_t channel = at % p.dim, k = at / p.dim;
  if (k < p.width)
    p.grad_weight[(task * p.dim + channel) * p.width + k] = total;
  else if (p.grad_bias != nullptr)
    p.grad_bias[task * p.dim + channel] = total;
}

// ---- host ----

// Calls f(half, width, lanes) with constants.
template <class T, int kWidth, class F>
const char* with_precision(const ConvParams<T>& p, F f) {
  const auto with_lanes = [&](auto half) {
    using Width = std::integral_constant<int, kWidth>;
    return shares_channel(p) ? f(half, Width(), std::integral_constant<int, cuda::kWarp>())
                             : f(half, Width(), std::integral_constant<int, 1>());
  };
  if constexpr (sizeof(T) == 4) {
    if (p.x.half == Half::kBfloat16) return with_lanes(std::integral_constant<Half, Half::kBfloat16>());
    if (p.x.half == Half::kFloat16) return with_lanes(std::integral_constant<Half, Half::kFloat16>());
  }
  return with_lanes(std::integral_constant<Half, Half::kNone>());
}
template <class T, class F>
const char* with_constants(const ConvParams<T>& p, F f) {
  switch (p.width) {
    case 1:
      return with_precision<T, 1>(p, f);
    case 2:
      return with_precision<T, 2>(p, f);
    case 3:
      return with_precision<T, 3>(p, f);
    default:
      return with_precision<T, 4>(p, f);
  }
}

template <class T>
int64_t blocks(const ConvParams<T>& p, int64_t lanes) {
  return (p.batch * p.dim * p.segments * lanes + kThreads - 1) / kThreads;
}

template <class T>
const char* launch_forward(const ConvParams<T>& p, void* stream) {
  return with_constants(p, [&](auto half, auto width, auto lanes) {
    return cuda::launch(forward_kernel<T, half(), width(), lanes()>, blocks(p, lanes()), kThreads, 0, stream, p);
  });
}
template <class T>
const char* launch_backward(const ConvParams<T>& p, void* stream) {
  return with_constants(p, [&](auto half, auto width, auto lanes) {
    return cuda::launch(backward_kernel<T, half(), width(), lanes()>, blocks(p, lanes()), kThreads, 0, stream, p);
  });
}
template <class T>
const char* launch_sum(const SumParams<T>& p, void* stream) {
  const int64_t columns = ((p.width + 1) * p.dim + kSumColumns - 1) / kSumColumns;
  return cuda::launch(sum_kernel<T>, p.tasks * columns, kSumColumns * kSumRows, kSumColumns * kSumRows * sizeof(T),
                      stream, p);
}

}  // namespace

#define EAML_DEFINE(T)                                         \
  const char* forward(const ConvParams<T>& p, void* stream) {  \
    return launch_forward(p, stream);                          \
  }                                                            \
  const char* backward(const ConvParams<T>& p, void* stream) { \
    return launch_backward(p, stream);                         \
  }                                                            \
  const char* sum(const SumParams<T>& p, void* stream) {       \
    return launch_sum(p, stream);                              \
  }

}  // namespace eaml::causal_conv1d
