// The vector code of knn, compiled for every instruction set. Included once, by the file that calls it: a caller that
// does not see the versions would take the slowest.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/fp16.h"
#include "common/simd.h"
#include "knn/cpu/kernel.h"

// Rounds every product: the double sums must not depend on whether the machine has a fused multiply-add.
#if defined(__clang__)
#define EAML_NO_CONTRACTION
#define EAML_NO_CONTRACTION_PRAGMA _Pragma("clang fp contract(off)")
#else
#define EAML_NO_CONTRACTION __attribute__((optimize("fp-contract=off")))
#define EAML_NO_CONTRACTION_PRAGMA
#endif

namespace eaml::knn {

// Loaded from any address, in place. A member, because clang ignores the alignment of an alias template.
template <class T, int N>
struct UnalignedVector {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Unaligned = typename UnalignedVector<T, N>::type;

constexpr int kRows = 12;  // queries of a tile: with two vectors of keys, accumulators and operands fill 32 registers
constexpr int kLanes = 8;  // lanes of an exact sum

// ---- the tile ----------------------------------------------------------------------------------------------------

// One bit per lane where x <= limit.
template <class V>
EAML_INLINE unsigned at_most(const V& x, const element_t<V>& limit) {
  unsigned bits = 0;
#if defined(__x86_64__)
  constexpr bool kFloat = sizeof(element_t<V>) == 4;
  if constexpr (sizeof(V) == 64) {
    if constexpr (kFloat)
      EAML_AVX512_ASM("vcmpps $2, %2%{1to16%}, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(bits) : "v"(x), "m"(limit) : "k1");
    else
      EAML_AVX512_ASM("vcmppd $2, %2%{1to8%}, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(bits) : "v"(x), "m"(limit) : "k1");
  } else {
    const auto below = x <= limit - V{};
    if constexpr (sizeof(V) == 32 && kFloat)
      asm("vmovmskps %1, %0" : "=r"(bits) : "x"(below));
    else if constexpr (sizeof(V) == 32)
      asm("vmovmskpd %1, %0" : "=r"(bits) : "x"(below));
    else if constexpr (kFloat)
      asm("movmskps %1, %0" : "=r"(bits) : "x"(below));
    else
      asm("movmskpd %1, %0" : "=r"(bits) : "x"(below));
  }
#else
  for (int l = 0; l < Lanes<V>::count; ++l) bits |= unsigned(x[l] <= limit) << l;
#endif
  return bits;
}

// sum += a product of bfloat16 numbers and the one of their neighbours, rounded no worse than one by one. Inputs and
// outputs below the normal numbers count as zero.
template <class V, class U>
EAML_INLINE void add_pairs(V& sum, const V& keys, const U& query) {
#if defined(__x86_64__)
  EAML_AVX512_ASM("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(query));
#endif
}

// Whether this machine multiplies bfloat16 numbers, twice as many at once as float32 ones.
inline bool pairs_supported() {
#if defined(__x86_64__) && defined(__ELF__) && (!defined(EAML_NO_CLONES) || defined(__AVX512BF16__))
  static const bool supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
  }();
  return supported;
#else
  return false;
#endif
}

template <class T>
struct Tile {
  const T *queries, *panel, *start, *thresholds, *ahead;
  std::int64_t depth;
  T* scores;            // [rows][kPanel]; written where a row of the block has hits
  std::uint32_t* hits;  // [rows], a bit per key
};

// Rows kFirst ... kFirst + R of a tile of kAll, on as many registers as the set has.
template <class T, int Bytes, bool kPairs, int kFirst, int R, int kAll>
EAML_INLINE std::uint32_t block_(const Tile<T>& t) {
  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  std::uint32_t any = 0;
  std::uint32_t hits[R] = {};
  for (int lane = 0; lane < kPanel; lane += 2 * N) {
    V sum[R][2];
    const T *keys = t.panel + lane, *ahead = t.ahead + lane, *q = t.queries + kFirst;
    EAML_UNROLL
    for (int r = 0; r < R; ++r) {
      sum[r][0] = *reinterpret_cast<const V*>(t.start + lane);
      sum[r][1] = *reinterpret_cast<const V*>(t.start + lane + N);
    }
    for (std::int64_t i = 0; i < t.depth; ++i, keys += kPanel, ahead += kPanel, q += kAll) {
      const V a = *reinterpret_cast<const V*>(keys), b = *reinterpret_cast<const V*>(keys + N);
      if constexpr (kFirst == 0) {
        EAML_UNROLL
        for (int byte = 0; byte < 2 * Bytes; byte += 64) __builtin_prefetch(ahead + byte / sizeof(T), 0, 2);
      }
      if constexpr (kPairs) {
        const auto* pairs = reinterpret_cast<const Unaligned<std::int32_t, 1>*>(q);
        EAML_UNROLL
        for (int r = 0; r < R; ++r) {
          const Vec<std::int32_t, N> pair = pairs[r][0] - Vec<std::int32_t, N>{};
          add_pairs(sum[r][0], a, pair);
          add_pairs(sum[r][1], b, pair);
        }
      } else {
        EAML_UNROLL
        for (int r = 0; r < R; ++r) sum[r][0] += q[r] * a, sum[r][1] += q[r] * b;
      }
    }
    std::uint32_t here = 0;
    EAML_UNROLL
    for (int r = 0; r < R; ++r) {
      const std::uint32_t bits =
          at_most(sum[r][0], t.thresholds[kFirst + r]) | at_most(sum[r][1], t.thresholds[kFirst + r]) << N;
      hits[r] |= bits << lane;
      here |= bits;
    }
    any |= here;
    if (here == 0) continue;
    EAML_UNROLL
    for (int r = 0; r < R; ++r) {
      T* to = t.scores + (kFirst + r) * kPanel + lane;
      *reinterpret_cast<V*>(to) = sum[r][0];
      *reinterpret_cast<V*>(to + N) = sum[r][1];
    }
  }
  EAML_UNROLL
  for (int r = 0; r < R; ++r) t.hits[kFirst + r] = hits[r];
  return any;
}

template <class T, int Bytes, bool kPairs, int R>
EAML_INLINE std::uint32_t rows_of_tile_(const Tile<T>& t) {
  if constexpr (Bytes == 64 || R <= kRows / 2)
    return block_<T, Bytes, kPairs, 0, R, R>(t);
  else
    return block_<T, Bytes, kPairs, 0, R / 2, R>(t) | block_<T, Bytes, kPairs, R / 2, R - R / 2, R>(t);
}

// scores[r][l] = start[l] + sum_i queries[i][r] * panel[i][l], and whether any is at most its row's threshold.
template <class T, int Bytes, bool kPairs>
EAML_INLINE std::uint32_t tile_(int rows, const Tile<T>& t) {
  static_assert(kRows == 12);
  switch (rows) {
    case 1:
      return rows_of_tile_<T, Bytes, kPairs, 1>(t);
    case 2:
      return rows_of_tile_<T, Bytes, kPairs, 2>(t);
    case 3:
      return rows_of_tile_<T, Bytes, kPairs, 3>(t);
    case 4:
      return rows_of_tile_<T, Bytes, kPairs, 4>(t);
    case 5:
      return rows_of_tile_<T, Bytes, kPairs, 5>(t);
    case 6:
      return rows_of_tile_<T, Bytes, kPairs, 6>(t);
    case 7:
      return rows_of_tile_<T, Bytes, kPairs, 7>(t);
    case 8:
      return rows_of_tile_<T, Bytes, kPairs, 8>(t);
    case 9:
      return rows_of_tile_<T, Bytes, kPairs, 9>(t);
    case 10:
      return rows_of_tile_<T, Bytes, kPairs, 10>(t);
    case 11:
      return rows_of_tile_<T, Bytes, kPairs, 11>(t);
    default:
      return rows_of_tile_<T, Bytes, kPairs, 12>(t);
  }
}

// ---- exact sums --------------------------------------------------------------------------------------------------

// The exact sum over features of (a - b)² or a b, in double: lane l sums features l, l + 8, ...; lanes join in pairs.
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

// panel[i][l] = keys[l][i] * scale[l] - centre[i] in blocks of 4 × 4, and the squared norms of the panel's columns
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

// The nearest bfloat16, zero where the machine's products would take it for zero.
EAML_INLINE std::uint32_t to_pairs(float x) {
  const std::uint32_t bits = narrow<Half::kBfloat16, std::uint32_t>(x);
  return (bits & 0x7f80u) == 0 ? 0 : bits;
}

// Rows of features in pairs of bfloat16, [(features + 1) / 2][kPanel][2], and what rounding took from a column,
// squared.
EAML_INLINE void round_(const float* panel, std::int64_t features, std::uint32_t* pairs, float* lost) {
  float sum[kPanel] = {};
  for (std::int64_t i = 0; i < features; i += 2, pairs += kPanel, panel += 2 * kPanel) {
    const bool whole = i + 1 < features;
    for (int l = 0; l < kPanel; ++l) {
      const float a = panel[l], b = whole ? panel[kPanel + l] : 0;
      const std::uint32_t low = to_pairs(a), high = to_pairs(b);
      const float da = a - __builtin_bit_cast(float, low << 16), db = b - __builtin_bit_cast(float, high << 16);
      pairs[l] = low | high << 16;
      sum[l] += da * da + db * db;
    }
  }
  for (int l = 0; l < kPanel; ++l) lost[l] = sum[l];
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

template <Half kHalf, int Bytes>
EAML_INLINE void widen_row_(const std::uint16_t* from, std::int64_t count, float* to) {
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

// For each of `count` keys |query - key|², or query . key and |key|²: in the keys' precision, in any order.
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

// Whether any of a panel's scores may be among the best.
template <class T>
EAML_INLINE bool any_below_(const T* scores, T threshold) {
  int any = 0;
  for (int l = 0; l < kPanel; ++l) any |= scores[l] <= threshold;
  return any;
}

// ---- versions ----------------------------------------------------------------------------------------------------

#define EAML_DEFINE_FOR(T, TARGET, BYTES)                                                                        \
  TARGET std::uint32_t tile(int rows, const Tile<T>& t) {                                                        \
    return tile_<T, BYTES, false>(rows, t);                                                                      \
  }                                                                                                              \
  TARGET void pack(const T* keys, int count, std::int64_t features, const T* centre, const T* scale, T* panel,   \
                   T* square) {                                                                                  \
    pack_<T, BYTES>(keys, count, features, centre, scale, panel, square);                                        \
  }                                                                                                              \
  TARGET void accumulate(const T* row, T scale, const T* centre, T sign, std::int64_t features, double* total) { \
    accumulate_<T, BYTES>(row, scale, centre, sign, features, total);                                            \
  }                                                                                                              \
  TARGET double offset_square(const T* row, T scale, const T* centre, std::int64_t features) {                   \
    return offset_square_<T, BYTES>(row, scale, centre, features);                                               \
  }                                                                                                              \
  TARGET void difference_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum) {         \
    rows_<T, BYTES, true>(query, keys, count, features, sum, nullptr);                                           \
  }                                                                                                              \
  TARGET void product_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum, T* square) { \
    rows_<T, BYTES, false>(query, keys, count, features, sum, square);                                           \
  }                                                                                                              \
  TARGET bool any_below(const T* scores, T threshold) {                                                          \
    return any_below_(scores, threshold);                                                                        \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double square_distance(const T* a, const T* b, std::int64_t features) {             \
    return exact_sum_<T, BYTES, true>(a, b, features);                                                           \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double product(const T* a, const T* b, std::int64_t features) {                     \
    return exact_sum_<T, BYTES, false>(a, b, features);                                                          \
  }
#define EAML_DEFINE(TARGET, BYTES)                                                                        \
  EAML_DEFINE_FOR(float, TARGET, BYTES)                                                                   \
  EAML_DEFINE_FOR(double, TARGET, BYTES)                                                                  \
  TARGET std::uint32_t tile_of_pairs(int rows, const Tile<float>& t) {                                    \
    if constexpr (BYTES == 64) return tile_<float, 64, true>(rows, t);                                    \
    return 0;                                                                                             \
  }                                                                                                       \
  TARGET void round_panel(const float* panel, std::int64_t features, std::uint32_t* pairs, float* lost) { \
    round_(panel, features, pairs, lost);                                                                 \
  }                                                                                                       \
  TARGET void widen_bfloat16(const std::uint16_t* from, std::int64_t count, float* to) {                  \
    widen_row_<Half::kBfloat16, BYTES>(from, count, to);                                                  \
  }                                                                                                       \
  TARGET void widen_float16(const std::uint16_t* from, std::int64_t count, float* to) {                   \
    widen_row_<Half::kFloat16, BYTES>(from, count, to);                                                   \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

}  // namespace eaml::knn
