// Fast scores of a tile of queries against a panel of keys. A part of vector_inl.h.
#pragma once

#include <bit>
#include <cstdint>

#include "common/simd.h"
#include "knn/cpu/kernel.h"

namespace eaml::knn {

// A vector that is loaded from any address. The type is a member, because clang ignores the alignment of an alias
// template.
template <class T, int N>
struct UnalignedVector {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Unaligned = typename UnalignedVector<T, N>::type;

constexpr int kRows = 12;  // queries of a tile: with two vectors of keys, accumulators and operands fill 32 registers

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

// sum += the products of two adjacent bfloat16 numbers each, rounded no worse than one after the other. Inputs and
// outputs below the normal numbers are read as zero.
template <class V, class U>
EAML_INLINE void add_pairs(V& sum, const V& keys, const U& query) {
#if defined(__x86_64__)
  EAML_AVX512_ASM("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(query));
#endif
}

// Returns whether this processor multiplies pairs of bfloat16 numbers, at twice the rate of float32.
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

// Queries and keys of a product, and its results.
template <class T>
struct Tile {
  const T* queries;     // [depth][rows]
  const T* panel;       // [depth][kPanel]
  const T* start;       // [kPanel]
  const T* thresholds;  // [rows]
  const T* ahead;       // the next panel, to prefetch
  std::int64_t depth;
  T* scores;            // [rows][kPanel]; only written where a row has hits
  std::uint32_t* hits;  // [rows], a bit per key
};

// Computes R rows from row kFirst on of a tile of kAll rows. R is limited by the registers of the instruction set.
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

// scores[r][l] = start[l] + sum_i queries[i][r] * panel[i][l], and returns whether any is at most its row's threshold.
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

}  // namespace eaml::knn
