// 2^t and e^x on a vector of lanes or on one number: no branches, no library calls.
#pragma once

#include <cstdint>

#include "common/simd.h"
#if defined(__CUDACC__) || defined(EAML_CUDA_EMULATOR)
#include "common/cuda_compat.h"
#endif

namespace eaml {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Polynomials and bit layouts of 2^t. `polynomial` approximates 2^r for |r| <= 1/2. AVX-512 reads 2^(j / table size)
// from `table`; `fine` or the square approximates the remaining factor (minimax, exactly 1 at 0).
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float round = 12582912.0f + 127.0f, top = 12582912.0f + 255.0f, bottom = -126.5f, scale = 1.0f;
  // 1.5 * 2^(mantissa - bits): adding it leaves the number of 1 / table size steps in the lowest bits.
  static constexpr float grid = 393216.0f;
  static constexpr int mantissa = 23, terms = 6, bits = 5;
  static constexpr float polynomial[terms] = {1.3264715e-3f, 9.671513e-3f,  5.5507340e-2f,
                                              2.4022242e-1f, 6.9314700e-1f, 1.0f};
  // 2^r = ((r + shift)^2 + offset) / (shift^2 + offset): one fused operation and a sum. `table` includes the divisor.
  static constexpr float shift = 1.442147970f, offset = 2.081305265f;
  alignas(kAlignment) static constexpr float table[1 << bits] = {
      0.240321293f, 0.245583639f, 0.250961214f, 0.256456554f, 0.262072235f, 0.267810851f, 0.273675174f, 0.279667854f,
      0.285791785f, 0.292049825f, 0.298444867f, 0.30497998f,  0.311658174f, 0.318482578f, 0.32545644f,  0.33258301f,
      0.339865625f, 0.347307712f, 0.354912758f, 0.362684339f, 0.370626092f, 0.378741771f, 0.387035131f, 0.395510077f,
      0.404170632f, 0.413020819f, 0.422064781f, 0.431306809f, 0.440751195f, 0.450402379f, 0.460264921f, 0.470343411f};
};

#if defined(__CUDACC__) || defined(EAML_CUDA_EMULATOR)
// The states of a thread whose 2^t is a polynomial on the FMA pipe; the others take the special-function unit. The
// choice is by state and never by step, so that results do not depend on where a call starts. To be tuned on a GPU.
// With any but 0, a decay that states share would have other bits than decays of their own.
constexpr int kPolynomialStates = 0;

// 2^t within 2.5 ulp; below 2^-126 it is 0.
EAML_INLINE float exp2_polynomial(float t) {
  using E = Exp2<float>;
  constexpr float polynomial[E::terms] = {E::polynomial[0], E::polynomial[1], E::polynomial[2],
                                          E::polynomial[3], E::polynomial[4], E::polynomial[5]};
  const float shifted = t + E::round, r = t - (shifted - E::round);
  float p = polynomial[0];
  EAML_UNROLL
  for (int i = 1; i < E::terms; ++i) p = std::fma(p, r, polynomial[i]);
  const float limited = shifted < E::top ? shifted : E::top;
  const std::uint32_t exponent = __builtin_bit_cast(std::uint32_t, limited) << E::mantissa;
  return t < E::bottom ? 0.0f : p * __builtin_bit_cast(float, exponent);
}

// A GPU thread has one number, and an instruction for 2^t.
template <int kPolynomial = kPolynomialStates, int K, class V>
EAML_INLINE void exp2_(const V (&t)[K], V (&out)[K]) {
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    if constexpr (sizeof(V) == 4)
      out[k] = k < kPolynomial ? exp2_polynomial(t[k]) : cuda::exp2(t[k]);
    else
      out[k] = cuda::exp2(t[k]);
  }
}
#else
template <>
struct Exp2<double> {
  static constexpr double round = 6755399441055744.0 + 1023.0, top = 6755399441055744.0 + 2047.0, bottom = -1022.5;
  static constexpr double grid = 422212465065984.0;
  static constexpr double scale = kLn2;  // Taylor of exp on |x| <= ln2/2: the first dropped term is below 5e-18
  static constexpr int mantissa = 52, terms = 14, fine_terms = 6, bits = 4;
  static constexpr double polynomial[terms] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  static constexpr double fine[fine_terms] = {0.00015404211699335224095, 0.0013333820232815162885,
                                              0.0096181291020536239683,  0.05550410865195458609,
                                              0.24022650695910167029,    0.69314718055994688866};
  alignas(kAlignment) static constexpr double table[1 << bits] = {1.0,
                                                                  1.0442737824274138,
                                                                  1.0905077326652577,
                                                                  1.1387886347566916,
                                                                  1.189207115002721,
                                                                  1.241857812073484,
                                                                  1.2968395546510096,
                                                                  1.3542555469368927,
                                                                  1.4142135623730951,
                                                                  1.4768261459394993,
                                                                  1.5422108254079407,
                                                                  1.6104903319492543,
                                                                  1.681792830507429,
                                                                  1.7562521603732995,
                                                                  1.8340080864093424,
                                                                  1.9152065613971474};
};

#if defined(__x86_64__)
// t rounded to a multiple of 1 / table size, subtracted from t; 0 for infinities.
EAML_INLINE Vec<float, 16> remainder(Vec<float, 16> t) {
  Vec<float, 16> r;
  EAML_AVX512_ASM("vreduceps %2, %1, %0" : "=v"(r) : "v"(t), "i"(Exp2<float>::bits << 4));
  return r;
}
EAML_INLINE Vec<double, 8> remainder(Vec<double, 8> t) {
  Vec<double, 8> r;
  EAML_AVX512_ASM("vreducepd %2, %1, %0" : "=v"(r) : "v"(t), "i"(Exp2<double>::bits << 4));
  return r;
}
// Entry of the table (low, high) at the number in the lowest bits of each lane of index (see Exp2::grid).
EAML_INLINE Vec<float, 16> lookup(Vec<float, 16> low, Vec<float, 16> high, Vec<float, 16> index) {
  EAML_AVX512_ASM("vpermi2ps %2, %1, %0" : "+v"(index) : "v"(low), "vm"(high));
  return index;
}
EAML_INLINE Vec<double, 8> lookup(Vec<double, 8> low, Vec<double, 8> high, Vec<double, 8> index) {
  EAML_AVX512_ASM("vpermi2pd %2, %1, %0" : "+v"(index) : "v"(low), "vm"(high));
  return index;
}
// x 2^floor(t)
EAML_INLINE Vec<float, 16> scale_by_power(Vec<float, 16> x, Vec<float, 16> t) {
  Vec<float, 16> scaled;
  EAML_AVX512_ASM("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(x), "v"(t));
  return scaled;
}
EAML_INLINE Vec<double, 8> scale_by_power(Vec<double, 8> x, Vec<double, 8> t) {
  Vec<double, 8> scaled;
  EAML_AVX512_ASM("vscalefpd %2, %1, %0" : "=v"(scaled) : "v"(x), "v"(t));
  return scaled;
}
template <class V>
constexpr bool kTableExp2 = sizeof(V) == 64;
#else
template <class V>
constexpr bool kTableExp2 = false;
#endif

// 2^t within 2.5 ulp (2.2 on AVX-512), exactly 1 at 0, NaN for NaN. Below 2^-126 it is 0, or on AVX-512 a denormal
// number; above 2^127.5 it may be infinite, of either sign, or NaN. K numbers are computed together, because K separate
// dependency chains one after the other would fill the processor's queues.
template <int K, class V>
EAML_INLINE void exp2_(const V (&t)[K], V (&out)[K]) {
  using T = element_t<V>;
  using E = Exp2<T>;
  if constexpr (kTableExp2<V>) {
    const V low = load<V>(E::table), high = load<V>(E::table + Lanes<V>::count);
    V r[K], p[K], base[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) r[k] = remainder(t[k]);
    if constexpr (sizeof(T) == 4) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = r[k] + E::shift;
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * p[k] + E::offset;
    } else {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = splat<V>(E::fine[0]);
      EAML_UNROLL
      for (int i = 1; i < E::fine_terms; ++i) {
        EAML_UNROLL
        for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + E::fine[i];
      }
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + T(1);
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) base[k] = lookup(low, high, t[k] + E::grid);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = scale_by_power(p[k] * base[k], t[k] - r[k]);
  } else {
    // Adding `round` leaves the rounded, biased exponent in the low mantissa bits; a shift makes it 2^n.
    using Bits = bits_t<V>;
    V shifted[K], r[K], p[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) shifted[k] = t[k] + E::round;
    EAML_UNROLL
    for (int k = 0; k < K; ++k) r[k] = (t[k] - (shifted[k] - E::round)) * E::scale, p[k] = splat<V>(E::polynomial[0]);
    EAML_UNROLL
    for (int i = 1; i < E::terms; ++i) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + E::polynomial[i];
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) {
      const Bits top = __builtin_bit_cast(Bits, splat<V>(E::top)), n = __builtin_bit_cast(Bits, shifted[k]);
      const Bits exponent = n < top ? n : top;
      out[k] = t[k] < splat<V>(E::bottom) ? V{} : p[k] * __builtin_bit_cast(V, exponent << E::mantissa);
    }
  }
}
#endif

template <class V>
EAML_INLINE V exp_(V x) {
  const V in[1] = {x * element_t<V>(kLog2e)};
  V out[1];
  exp2_(in, out);
  return out[0];
}

}  // namespace eaml
