// bfloat16 and float16 in memory, float32 in registers.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace eaml {

enum class Half : std::uint8_t { kNone, kBfloat16, kFloat16 };

// The functions below accept vectors and single numbers; U is the same number of 32-bit integers.
template <class V>
struct Unsigned {
  using type = Vec<std::uint32_t, Lanes<V>::count>;
  using Narrow = Vec<std::uint16_t, Lanes<V>::count>;
};
template <>
struct Unsigned<float> {
  using type = std::uint32_t;
  using Narrow = std::uint16_t;
};
template <class V>
using unsigned_t = typename Unsigned<V>::type;
template <class V>
using narrow_t = typename Unsigned<V>::Narrow;

template <Half kHalf, class V, class U>
EAML_INLINE V widen(U bits) {
  if constexpr (kHalf == Half::kBfloat16) return __builtin_bit_cast(V, bits << 16);
  const U magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const U finite = __builtin_bit_cast(U, __builtin_bit_cast(V, magnitude) * 0x1p112f);  // exponents differ by 112
  return __builtin_bit_cast(V, (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

// Rounds to nearest, ties to even, as torch does.
template <Half kHalf, class U, class V>
EAML_INLINE U narrow(V x) {
  const U bits = __builtin_bit_cast(U, x), magnitude = bits & 0x7fffffffu;
  if constexpr (kHalf == Half::kBfloat16) {
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return magnitude > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  }
  const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;   // exponent less 112, rounded
  const U sum = __builtin_bit_cast(U, __builtin_bit_cast(V, magnitude) + 0.5f);  // aligns the bits of denormals
  const U denormal = sum - 0x3f000000u;
  const U finite = magnitude < 0x38800000u ? denormal : normal;
  const U large = magnitude > 0x7f800000u ? (magnitude & 0u) + 0x7e00u : (magnitude & 0u) + 0x7c00u;
  return (magnitude >= 0x47800000u ? large : finite) | ((bits >> 16) & 0x8000u);
}

// AVX-512 converts 16 numbers at once; gcc would convert them eight at a time.
template <class V>
#if defined(__x86_64__)
constexpr bool kWideHalf = sizeof(V) == 64 && Lanes<V>::count == 16;
#else
constexpr bool kWideHalf = false;
#endif

template <Half kHalf, class V>
EAML_INLINE V load_half(const std::uint16_t* from) {
  using U = unsigned_t<V>;
  if constexpr (kWideHalf<V>) {
    using Packed = std::uint16_t[16];
    if constexpr (kHalf == Half::kFloat16) {
      V x;
      EAML_AVX512_ASM("vcvtph2ps %1, %0" : "=v"(x) : "m"(*reinterpret_cast<const Packed*>(from)));
      return x;
    } else {
      U bits;
      EAML_AVX512_ASM("vpmovzxwd %1, %0" : "=v"(bits) : "m"(*reinterpret_cast<const Packed*>(from)));
      return widen<kHalf, V>(bits);
    }
  } else if constexpr (Lanes<V>::count == 1) {
    return widen<kHalf, V>(U{*from});
  } else {
    return widen<kHalf, V>(__builtin_convertvector(load<narrow_t<V>>(from), U));
  }
}

template <Half kHalf, class V>
EAML_INLINE void store_half(std::uint16_t* to, V x) {
  using U = unsigned_t<V>;
  if constexpr (kWideHalf<V>) {
    using Packed = std::uint16_t[16];
    if constexpr (kHalf == Half::kFloat16) {
      EAML_AVX512_ASM("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Packed*>(to)) : "v"(x));
    } else {
      const U bits = narrow<kHalf, U>(x);
      EAML_AVX512_ASM("vpmovdw %1, %0" : "=m"(*reinterpret_cast<Packed*>(to)) : "v"(bits));
    }
  } else if constexpr (Lanes<V>::count == 1) {
    *to = static_cast<std::uint16_t>(narrow<kHalf, U>(x));
  } else {
    store(to, __builtin_convertvector(narrow<kHalf, U>(x), narrow_t<V>));
  }
}

}  // namespace eaml
