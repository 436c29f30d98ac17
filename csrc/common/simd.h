// How portable loops become SIMD: plain loops over lanes, compiled once per instruction set and picked at load time.
#pragma once

#include <cstdint>

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
