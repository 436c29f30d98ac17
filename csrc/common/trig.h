// Complex numbers from modulus and angle: sine and cosine by polynomials.
#pragma once

#include <cmath>

#include "common/complex.h"

namespace eaml {

// Minimax polynomials of sin(pi r) / r and of cos(pi r) in r^2, for |r| <= 1/2, by Remez's algorithm; the last
// coefficient of the second is exactly 1. Adding `round`, 1.5 * 2^mantissa, leaves an integer in the lowest bits.
template <class T>
struct Turn;
template <>
struct Turn<float> {
  static constexpr float round = 12582912.0f;
  static constexpr int sign = 31, sine_terms = 5, cosine_terms = 6;
  float sine[sine_terms] = {0.0795397833f, -0.599313557f, 2.55025482f, -5.16772032f, 3.14159274f};
  float cosine[cosine_terms] = {-0.0239760354f, 0.234688058f, -1.33516192f, 4.05870533f, -4.93480206f, 1.0f};
  static constexpr float per_radian = 0.318309873f, per_radian_rest = 1.28412765e-8f;  // their sum is 1 / pi
};
template <>
struct Turn<double> {
  static constexpr double round = 6755399441055744.0;
  static constexpr int sign = 63, sine_terms = 9, cosine_terms = 9;
  double sine[sine_terms] = {7.6895922057447072e-7,  -2.1902691848915669e-5, 0.000466299496496898,
                             -0.0073704304398583588, 0.082145886565543808,   -0.59926452931847496,
                             2.550164039877286,      -5.1677127800499694,    3.1415926535897931};
  double cosine[cosine_terms] = {4.1469625105962147e-6, -0.00010456428091577896, 0.0019295554954383318,
                                 -0.025806888607130492, 0.2353306301189913,      -1.3352627688431442,
                                 4.0587121264165038,    -4.9348022005446772,     1.0};
  static constexpr double per_radian = 0.3183098861837907, per_radian_rest = -1.9678676675182486e-17;
};

// An angle in half turns, as the sum of two numbers.
template <class V>
struct HalfTurns {
  V high, low;
};
template <class T>
EAML_INLINE HalfTurns<T> half_turns(T radians) {
  const T high = radians * Turn<T>::per_radian;
  return {high, std::fma(radians, Turn<T>::per_radian, -high) + radians * Turn<T>::per_radian_rest};
}

// modulus * e^(i x angle), each part within two roundings of the modulus where multiply-adds are fused; elsewhere the
// rounding of x * angle comes on top. Beyond 2^18 half turns (2^47 in double precision) the angle is arbitrary but
// finite; an infinite angle gives NaN.
template <int K, class V>
EAML_INLINE void polar(const V (&modulus)[K], V x, const HalfTurns<V> (&angle)[K], Complex<V> (&out)[K]) {
  using E = Turn<element_t<V>>;
  constexpr E turn{};  // static arrays do not exist on a GPU
  using Bits = bits_t<V>;
  V shifted[K], r[K], square[K], sine[K], cosine[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) shifted[k] = x * angle[k].high + E::round;
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    r[k] = x * angle[k].high - (shifted[k] - E::round) + x * angle[k].low;  // the first product is not rounded
    const V least = splat<V>(-0.51f), most = splat<V>(0.51f);
    r[k] = r[k] < least ? least : r[k];
    r[k] = r[k] > most ? most : r[k];
    square[k] = r[k] * r[k], sine[k] = splat<V>(turn.sine[0]), cosine[k] = splat<V>(turn.cosine[0]);
  }
  EAML_UNROLL
  for (int i = 1; i < E::sine_terms; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) sine[k] = sine[k] * square[k] + turn.sine[i];
  }
  EAML_UNROLL
  for (int i = 1; i < E::cosine_terms; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) cosine[k] = cosine[k] * square[k] + turn.cosine[i];
  }
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {  // an odd number of half turns changes the sign
    const Bits odd = __builtin_bit_cast(Bits, shifted[k]) << E::sign;
    const V scale = __builtin_bit_cast(V, __builtin_bit_cast(Bits, modulus[k]) ^ odd);
    out[k] = {scale * cosine[k], scale * (sine[k] * r[k])};
  }
}

}  // namespace eaml
