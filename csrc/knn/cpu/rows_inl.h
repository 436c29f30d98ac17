// Vector code on rows of keys: exact sums, packing, conversion, and scores without panels. A part of vector_inl.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/fp16.h"
#include "common/simd.h"
#include "knn/cpu/tile_inl.h"
#include "knn/error_bounds.h"

// Every product is rounded, because sums in double must not depend on whether the processor has fused multiply-adds.
#if defined(__clang__)
#define EAML_NO_CONTRACTION
#define EAML_NO_CONTRACTION_PRAGMA _Pragma("clang fp contract(off)")
#else
#define EAML_NO_CONTRACTION __attribute__((optimize("fp-contract=off")))
#define EAML_NO_CONTRACTION_PRAGMA
#endif

namespace eaml::knn {

// ---- exact sums --------------------------------------------------------------------------------------------------

constexpr int kLanes = 8;  // lanes of an exact sum

// The exact sum over features of (a - b)² or a b, in double. Lane l sums features l, l + 8, ..., then lanes are added
// in pairs.
template <class T, int Bytes, bool kDifference>
EAML_INLINE double exact_sum_(const T* a, const T* b, std::int64_t features) {
  EAML_NO_CONTRACTION_PRAGMA
  constexpr int N = Bytes / sizeof(double), kVectors = kLanes / N;
  using V = Unaligned<double, N>;
  V sum[kVectors] = {};
  double lane[kLanes];
  std::int64_t i = 0;
  for (; i + kLanes <= features; i += kLanes) {
    EAML_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V x = __builtin_convertvector(*reinterpret_cast<const Unaligned<T, N>*>(a + i + v * N), V);
      const V y = __builtin_convertvector(*reinterpret_cast<const Unaligned<T, N>*>(b + i + v * N), V);
      sum[v] += kDifference ? (x - y) * (x - y) : x * y;
    }
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(lane + v * N) = sum[v];
  for (int l = 0; i < features; ++i, ++l) {
    const double x = a[i], y = b[i];
    lane[l] += kDifference ? (x - y) * (x - y) : x * y;
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// ---- packing -----------------------------------------------------------------------------------------------------

// panel[i][l] = keys[l][i] * scale[l] - centre[i] in blocks of 4 × 4, and square[l] = the squared norm of column l
template <class T, int Bytes>
EAML_INLINE void pack_(const T* keys, int count, std::int64_t features, const T* centre, const T* scale, T* panel,
                       T* square) {
  using Four = Unaligned<T, 4>;
  const auto scalar = [&](int l, std::int64_t i) {
    panel[i * kPanel + l] = keys[l * features + i] * scale[l] - centre[i];
  };
  const std::int64_t whole = features / 4 * 4;
  int l = 0;
  for (; l + 4 <= count; l += 4) {
    const T* rows = keys + l * features;
    for (std::int64_t i = 0; i < 4 * features; i += 64 / sizeof(T))
      __builtin_prefetch(rows + kPanel * features + i, 0, 2);
    const T scales[4] = {scale[l], scale[l + 1], scale[l + 2], scale[l + 3]};
    for (std::int64_t i = 0; i < whole; i += 4) {
      const Four middle = *reinterpret_cast<const Four*>(centre + i);
      Four row[4];
      EAML_UNROLL
      for (int r = 0; r < 4; ++r) row[r] = *reinterpret_cast<const Four*>(rows + r * features + i) * scales[r] - middle;
      const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Four b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Four c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Four d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      T* to = panel + i * kPanel + l;
      *reinterpret_cast<Four*>(to) = __builtin_shufflevector(a, c, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + kPanel) = __builtin_shufflevector(a, c, 2, 3, 6, 7);
      *reinterpret_cast<Four*>(to + 2 * kPanel) = __builtin_shufflevector(b, d, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + 3 * kPanel) = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    }
    for (std::int64_t i = whole; i < features; ++i)
      for (int r = 0; r < 4; ++r) scalar(l + r, i);
  }
  for (; l < count; ++l)
    for (std::int64_t i = 0; i < features; ++i) scalar(l, i);

  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  V sum[kPanel / N] = {};
  for (std::int64_t i = 0; i < features; ++i)
    for (int v = 0; v < kPanel / N; ++v) {
      const V x = *reinterpret_cast<const V*>(panel + i * kPanel + v * N);
      sum[v] += x * x;
    }
  for (int v = 0; v < kPanel / N; ++v) *reinterpret_cast<V*>(square + v * N) = sum[v];
}

// Rounds a panel to pairs of bfloat16, [(features + 1) / 2][kPanel][2], and returns the squared norms of the columns'
// rounding errors.
EAML_INLINE void round_(const float* panel, std::int64_t features, std::uint32_t* pairs, float* rounding_square) {
  float sum[kPanel] = {};
  for (std::int64_t i = 0; i < features; i += 2, pairs += kPanel, panel += 2 * kPanel) {
    const bool whole = i + 1 < features;
    for (int l = 0; l < kPanel; ++l) {
      const float a = panel[l], b = whole ? panel[kPanel + l] : 0;
      const std::uint32_t first = to_bfloat16(a), second = to_bfloat16(b);
      const float da = a - __builtin_bit_cast(float, first << 16), db = b - __builtin_bit_cast(float, second << 16);
      pairs[l] = first | second << 16;
      sum[l] += da * da + db * db;
    }
  }
  for (int l = 0; l < kPanel; ++l) rounding_square[l] = sum[l];
}

// total[i] += sign * (row[i] * scale - centre[i])
template <class T, int Bytes>
EAML_INLINE void accumulate_(const T* row, T scale, const T* centre, T sign, std::int64_t features, double* total) {
  for (std::int64_t i = 0; i < features; ++i) total[i] += double(sign * (row[i] * scale - centre[i]));
}

// |row * scale - centre|²
template <class T, int Bytes>
EAML_INLINE double offset_square_(const T* row, T scale, const T* centre, std::int64_t features) {
  constexpr int N = Bytes / sizeof(double);
  using V = Unaligned<double, N>;
  V sum = {};
  std::int64_t i = 0;
  for (; i + N <= features; i += N) {
    const auto x = *reinterpret_cast<const Unaligned<T, N>*>(row + i) * scale;
    const V d = __builtin_convertvector(x - *reinterpret_cast<const Unaligned<T, N>*>(centre + i), V);
    sum += d * d;
  }
  double total = 0;
  for (int l = 0; l < N; ++l) total += sum[l];
  for (; i < features; ++i) total += double(row[i] * scale - centre[i]) * double(row[i] * scale - centre[i]);
  return total;
}

// to[i] = from[i], converted from reduced precision
template <Half kHalf, int Bytes>
EAML_INLINE void convert_row_(const std::uint16_t* from, std::int64_t count, float* to) {
  constexpr int N = Bytes / sizeof(float);
  using V = Unaligned<float, N>;
  std::int64_t i = 0;
  for (; i + N <= count; i += N) *reinterpret_cast<V*>(to + i) = load_half<kHalf, Vec<float, N>>(from + i);
  for (; i < count; ++i) to[i] = load_half<kHalf, float>(from + i);
}

// ---- rows --------------------------------------------------------------------------------------------------------

// The sum of all lanes.
template <class T, int Bytes>
EAML_INLINE T total_(Unaligned<T, Bytes / sizeof(T)> x) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return x[0] + x[1];
  } else {
    using Half = Unaligned<T, Bytes / sizeof(T) / 2>;
    Half half[2];
    std::memcpy(half, &x, sizeof x);
    return total_<T, Bytes / 2>(half[0] + half[1]);
  }
}

// For each of `count` keys |query - key|², or query . key and |key|², in the keys' precision and any order.
template <class T, int Bytes, bool kDifference>
EAML_INLINE void rows_(const T* query, const T* keys, int count, std::int64_t features, T* sum, T* square) {
  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  for (int l = 0; l < count; ++l) {
    const T* key = keys + l * features;
    V sums = {}, squares = {};
    std::int64_t i = 0;
    for (; i + N <= features; i += N) {
      const V x = *reinterpret_cast<const V*>(key + i), q = *reinterpret_cast<const V*>(query + i), d = q - x;
      sums += kDifference ? d * d : q * x;
      if constexpr (!kDifference) squares += x * x;
    }
    T last = 0, last_square = 0;
    for (; i < features; ++i) {
      const T x = key[i], q = query[i];
      last += kDifference ? (q - x) * (q - x) : q * x;
      last_square += x * x;
    }
    sum[l] = total_<T, Bytes>(sums) + last;
    if constexpr (!kDifference) square[l] = total_<T, Bytes>(squares) + last_square;
  }
}

// Returns whether any of a panel's scores is at most the threshold.
template <class T>
EAML_INLINE bool any_below_(const T* scores, T threshold) {
  int any = 0;
  for (int l = 0; l < kPanel; ++l) any |= scores[l] <= threshold;
  return any;
}

}  // namespace eaml::knn
