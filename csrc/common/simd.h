// Vectors and instruction sets. Kernels are templates on a vector type. They are compiled once per instruction set,
// with vectors of its width; a call selects the version for the machine's instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define EAML_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define EAML_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define EAML_UNROLL _Pragma("clang loop unroll(full)")
#else
#error "eaml_ext needs gcc 12 or clang 14, or a later one"
#endif

#if defined(__CUDACC__)
#define EAML_INLINE __host__ __device__ __forceinline__  // shared by CPU and CUDA kernels
#else
#define EAML_INLINE inline __attribute__((always_inline))
#endif
#define EAML_NOINLINE __attribute__((noinline))
#define EAML_PREFETCH(address) __builtin_prefetch(address)
#define EAML_LAMBDA __attribute__((always_inline))  // a lambda that is not inlined misses its caller's instruction set

// The instruction sets that kernels are compiled for. gcc takes the psABI's names, clang a list of features.
#if defined(__clang__)
#define EAML_AVX2 "avx2,fma,bmi,bmi2"
#define EAML_AVX512 EAML_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#else
#define EAML_AVX2 "arch=x86-64-v3"
#define EAML_AVX512 "arch=x86-64-v4"
#endif

// Two ways to compile a kernel once per instruction set. each_isa.h includes a whole file per set: for kernels of many
// functions. EAML_VERSIONS(DEFINE) expands DEFINE(attribute, bytes of a vector) per set, and the loader selects one:
// for plain functions whose callees are all inlined.
#if defined(__x86_64__) && defined(__ELF__) && !defined(EAML_NO_CLONES)
#define EAML_HAS_VERSIONS 1
#define EAML_VERSIONS(DEFINE)                    \
  DEFINE(__attribute__((target("default"))), 16) \
  DEFINE(__attribute__((target(EAML_AVX2))), 32) \
  DEFINE(__attribute__((target(EAML_AVX512))), 64)
#elif defined(__AVX512DQ__)
#define EAML_VERSIONS(DEFINE) DEFINE(, 64)
#elif defined(__AVX__)
#define EAML_VERSIONS(DEFINE) DEFINE(, 32)
#else
#define EAML_VERSIONS(DEFINE) DEFINE(, 16)
#endif

#if defined(__x86_64__) && !defined(__CUDACC__)
// One instruction of AVX-512, in assembler: gcc rejects an intrinsic in a function that is inlined into several
// instruction sets. clang also rejects the operands of such assembler. With clang, the instruction is in a lambda that
// is compiled for AVX-512 and takes no vector by value.
#if defined(__clang__)
#define EAML_AVX512_ASM(...) [&]() __attribute__((target(EAML_AVX512))) { asm(__VA_ARGS__); }()
#else
#define EAML_AVX512_ASM(...) asm(__VA_ARGS__)
#endif
#else
#define EAML_AVX512_ASM(...)
#endif

namespace eaml {

constexpr int kAlignment = 64;  // the widest vector

template <class T, int N>
using Vec __attribute__((vector_size(N * sizeof(T)))) = T;

// Lanes of a vector, or of a single number. The functions below accept both.
template <class V>
struct Lanes {
  using Element = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
  using Int = std::conditional_t<sizeof(Element) <= 4, std::int32_t, std::int64_t>;
  static constexpr int count = sizeof(V) / sizeof(Element);
  using Bits = Vec<Int, count>;
};
template <class T>
  requires std::is_arithmetic_v<T>
struct Lanes<T> {
  using Element = T;
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  static constexpr int count = 1;
};
template <class V>
using element_t = typename Lanes<V>::Element;
template <class V>
using bits_t = typename Lanes<V>::Bits;

template <class V>
EAML_INLINE V load(const element_t<V>* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
EAML_INLINE void store(element_t<V>* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}
// A vector of a constant. A variable must stay a number until an operation with a vector broadcasts it. gcc would build
// its vector lane by lane where it inlines a function that returns one.
template <class V>
EAML_INLINE V splat(element_t<V> constant) {
  return constant - V{};
}

// to[column][row] = from[row][column]; both have adjacent elements in their last dimension. Shuffles of four elements
// are fast on every machine, so one version suffices.
template <class T>
EAML_NOINLINE void transpose(T* to, std::int64_t to_step, const T* from, std::int64_t from_step, std::int64_t rows,
                             std::int64_t columns) {
  using Four __attribute__((vector_size(4 * sizeof(T)))) = T;
  const std::int64_t done_rows = rows / 4 * 4, done_columns = columns / 4 * 4;
  for (std::int64_t r = 0; r < done_rows; r += 4)
    for (std::int64_t c = 0; c < done_columns; c += 4) {
      Four a[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&a[k], from + (r + k) * from_step + c, sizeof(Four));
      const Four low01 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5),
                 low23 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
      const Four high01 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7),
                 high23 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
      a[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5),
      a[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
      a[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
      a[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(to + (c + k) * to_step + r, &a[k], sizeof(Four));
    }
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = r < done_rows ? done_columns : 0; c < columns; ++c)
      to[c * to_step + r] = from[r * from_step + c];
}

enum class SimdLevel { kBaseline, kAvx2, kAvx512, kNative };  // kNative: the compiler's own target alone

// The widest instruction set of EAML_HAS_VERSIONS that this machine has.
inline SimdLevel simd_level() {
#if EAML_HAS_VERSIONS
  static const SimdLevel level = [] {
    __builtin_cpu_init();
#if defined(__clang__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
#else
    const bool avx2 = __builtin_cpu_supports("x86-64-v3"), avx512 = __builtin_cpu_supports("x86-64-v4");
#endif
    return avx512 ? SimdLevel::kAvx512 : avx2 ? SimdLevel::kAvx2 : SimdLevel::kBaseline;
  }();
  return level;
#else
  return SimdLevel::kNative;
#endif
}

// The name of simd_level() in the x86-64 psABI.
inline const char* simd_name() {
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return "x86-64-v4 (AVX-512)";
    case SimdLevel::kAvx2:
      return "x86-64-v3 (AVX2)";
    case SimdLevel::kBaseline:
      return "x86-64 (SSE2)";
    default:
      return "compiler default";
  }
}

// Calls a function of the namespace that each_isa.h made for this machine's instruction set.
#if EAML_HAS_VERSIONS
#define EAML_DISPATCH(CALL)       \
  switch (::eaml::simd_level()) { \
    case SimdLevel::kAvx512:      \
      return avx512::CALL;        \
    case SimdLevel::kAvx2:        \
      return avx2::CALL;          \
    default:                      \
      return baseline::CALL;      \
  }
#else
#define EAML_DISPATCH(CALL) return native::CALL
#endif

}  // namespace eaml
