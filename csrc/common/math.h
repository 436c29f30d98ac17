// Scalar arithmetic of the kernels, written so that a loop over lanes vectorises: no branches, no library calls.
// Dual<T> carries a value and a tangent: a kernel run on duals is its own directional derivative.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace eaml {

template <class T>
struct Dual {
  T value, tangent;
  Dual() = default;
  EAML_INLINE Dual(T v, T t = T(0)) : value(v), tangent(t) {}
};

template <class T>
EAML_INLINE Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class T>
EAML_INLINE Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class T>
EAML_INLINE Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}

template <class S>
struct ScalarOf {
  using type = S;
};
template <class T>
struct ScalarOf<Dual<T>> {
  using type = T;
};
template <class S>
using scalar_t = typename ScalarOf<S>::type;

// What a kernel writes out: the value, or, run on duals, the tangent alone.
template <class T>
EAML_INLINE T output(T x) {
  return x;
}
template <class T>
EAML_INLINE T output(Dual<T> x) {
  return x.tangent;
}

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^t with relative error below 2 ulp, exactly 1 at 0; 0 below the smallest normal number, NaN for NaN, inf or NaN above
// the largest number. Adding `round` leaves the rounded, biased exponent in the low mantissa bits; a shift makes it 2^n.
EAML_INLINE float exp2_(float t) {
  const float round = 12582912.0f + 127.0f;
  const float shifted = t + round;
  const float r = t - (shifted - round);
  float p = 1.3264715e-3f;
  p = p * r + 9.671513e-3f;
  p = p * r + 5.5507340e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314700e-1f;
  p = p * r + 1.0f;
  const std::int32_t top = std::bit_cast<std::int32_t>(12582912.0f + 255.0f);
  std::int32_t n = std::bit_cast<std::int32_t>(shifted);
  n = n < top ? n : top;
  return t < -126.5f ? 0.0f : p * std::bit_cast<float>(n << 23);
}

EAML_INLINE double exp2_(double t) {
  const double round = 6755399441055744.0 + 1023.0;
  const double shifted = t + round;
  const double x = (t - (shifted - round)) * kLn2;
  double p = 1.0 / 6227020800;  // Taylor of exp on |x| <= ln2/2: the first dropped term is below 5e-18
  p = p * x + 1.0 / 479001600;
  p = p * x + 1.0 / 39916800;
  p = p * x + 1.0 / 3628800;
  p = p * x + 1.0 / 362880;
  p = p * x + 1.0 / 40320;
  p = p * x + 1.0 / 5040;
  p = p * x + 1.0 / 720;
  p = p * x + 1.0 / 120;
  p = p * x + 1.0 / 24;
  p = p * x + 1.0 / 6;
  p = p * x + 0.5;
  p = p * x + 1.0;
  p = p * x + 1.0;
  const std::int64_t top = std::bit_cast<std::int64_t>(6755399441055744.0 + 2047.0);
  std::int64_t n = std::bit_cast<std::int64_t>(shifted);
  n = n < top ? n : top;
  return t < -1022.5 ? 0.0 : p * std::bit_cast<double>(n << 52);
}

template <class T>
EAML_INLINE T exp_(T x) {
  return exp2_(x * T(kLog2e));
}

// log(1 + v) for v in [0, 1], as 2 artanh(v / (2 + v)): relative accuracy also where v is tiny.
EAML_INLINE float log1p_unit(float v) {
  const float s = v / (2.0f + v), q = s * s;
  float p = 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return p * s;
}

EAML_INLINE double log1p_unit(double v) {
  const double s = v / (2.0 + v), q = s * s;
  double p = 2.0 / 37;
  EAML_UNROLL
  for (int k = 35; k >= 1; k -= 2) p = p * q + 2.0 / k;
  return p * s;
}

template <class T>
EAML_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp_(-x));
}

template <class T>
EAML_INLINE T softplus(T x) {
  const T tail = log1p_unit(exp_(x < T(0) ? x : -x));
  return (x > T(0) ? x : (x - x)) + tail;  // x - x: zero, but NaN for NaN
}

template <class T>
EAML_INLINE Dual<T> exp2_(Dual<T> x) {
  const T e = exp2_(x.value);
  return {e, e * (T(kLn2) * x.tangent)};
}
template <class T>
EAML_INLINE Dual<T> sigmoid(Dual<T> x) {
  const T s = sigmoid(x.value);
  return {s, s * (T(1) - s) * x.tangent};
}
template <class T>
EAML_INLINE Dual<T> softplus(Dual<T> x) {
  return {softplus(x.value), sigmoid(x.value) * x.tangent};
}

}  // namespace eaml
