// How portable loops become SIMD: plain loops over lanes, compiled once per instruction set and picked at load time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#define EAML_IVDEP _Pragma("GCC ivdep")
#define EAML_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define EAML_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#define EAML_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EAML_IVDEP
#define EAML_UNROLL
#endif

#if defined(__GNUC__) || defined(__clang__)
#define EAML_INLINE inline __attribute__((always_inline))
#define EAML_NOINLINE __attribute__((noinline))
#define EAML_PREFETCH(address) __builtin_prefetch(address)
#define EAML_LAMBDA __attribute__((always_inline))  // a lambda that is not inlined misses its caller's instruction set
#else
#define EAML_INLINE inline
#define EAML_NOINLINE
#define EAML_PREFETCH(address) ((void)0)
#define EAML_LAMBDA
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EAML_SHUFFLE __builtin_shufflevector
#endif
#endif

// target_clones needs ELF's ifunc, and (clang) does not apply to templates: put it on plain overloads only.
#if defined(__x86_64__) && defined(__ELF__) && !defined(EAML_NO_CLONES)
#define EAML_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EAML_CLONES
#endif

namespace eaml {

constexpr int kVectorBytes = 64;

// Lanes of one full-width vector of T; narrower machines split it.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// to[column][row] = from[row][column]; both have adjacent elements in their last dimension. Shuffles of four elements
// are fast on every machine, so it needs no clones.
template <class T>
EAML_NOINLINE void transpose(T* to, std::int64_t to_step, const T* from, std::int64_t from_step, std::int64_t rows,
                             std::int64_t columns) {
  std::int64_t done_rows = 0, done_columns = 0;
#ifdef EAML_SHUFFLE
  using Four __attribute__((vector_size(4 * sizeof(T)))) = T;
  done_rows = rows / 4 * 4, done_columns = columns / 4 * 4;
  for (std::int64_t r = 0; r < done_rows; r += 4)
    for (std::int64_t c = 0; c < done_columns; c += 4) {
      Four a[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&a[k], from + (r + k) * from_step + c, sizeof(Four));
      const Four low01 = EAML_SHUFFLE(a[0], a[1], 0, 4, 1, 5), low23 = EAML_SHUFFLE(a[2], a[3], 0, 4, 1, 5);
      const Four high01 = EAML_SHUFFLE(a[0], a[1], 2, 6, 3, 7), high23 = EAML_SHUFFLE(a[2], a[3], 2, 6, 3, 7);
      a[0] = EAML_SHUFFLE(low01, low23, 0, 1, 4, 5), a[1] = EAML_SHUFFLE(low01, low23, 2, 3, 6, 7);
      a[2] = EAML_SHUFFLE(high01, high23, 0, 1, 4, 5), a[3] = EAML_SHUFFLE(high01, high23, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(to + (c + k) * to_step + r, &a[k], sizeof(Four));
    }
#endif
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = r < done_rows ? done_columns : 0; c < columns; ++c)
      to[c * to_step + r] = from[r * from_step + c];
}

// The level that EAML_CLONES picks on this machine, in the names of the x86-64 psABI.
inline const char* simd_level() {
#if defined(__x86_64__) && defined(__ELF__) && !defined(EAML_NO_CLONES)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3 (AVX2)";
  return "x86-64 (SSE2)";
#else
  return "compiler default";
#endif
}

}  // namespace eaml
