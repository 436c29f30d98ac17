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
EAML_INLINE Dual<T> operator+(const Dual<T>& a, const Dual<T>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class T>
EAML_INLINE Dual<T> operator-(const Dual<T>& a, const Dual<T>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class T>
EAML_INLINE Dual<T> operator*(const Dual<T>& a, const Dual<T>& b) {
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
EAML_INLINE T output(const Dual<T>& x) {
  return x.tangent;
}

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Polynomials and bit layouts of 2^t.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  using Int = std::int32_t;
  static constexpr float round = 12582912.0f + 127.0f, top = 12582912.0f + 255.0f, bottom = -126.5f, scale = 1.0f;
  static constexpr int mantissa = 23, terms = 6;
  static constexpr float polynomial[terms] = {1.3264715e-3f, 9.671513e-3f,  5.5507340e-2f,
                                              2.4022242e-1f, 6.9314700e-1f, 1.0f};
};
template <>
struct Exp2<double> {
  using Int = std::int64_t;
  static constexpr double round = 6755399441055744.0 + 1023.0, top = 6755399441055744.0 + 2047.0, bottom = -1022.5;
  static constexpr double scale = kLn2;  // Taylor of exp on |x| <= ln2/2: the first dropped term is below 5e-18
  static constexpr int mantissa = 52, terms = 14;
  static constexpr double polynomial[terms] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
};

// 2^t with relative error below 2 ulp, exactly 1 at 0; 0 below the smallest normal number, NaN for NaN, inf or NaN
// above 2^127.5, where the exponent rounds up. Adding `round` leaves the rounded, biased exponent in the low mantissa
// bits; a shift makes it 2^n. K numbers go side by side: as one chain after the other they would fill the processor's
// queues with waiting work.
template <int K, class T>
EAML_INLINE void exp2_(const T (&t)[K], T (&out)[K]) {
  using E = Exp2<T>;
  using Int = typename E::Int;
  T shifted[K], r[K], p[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) shifted[k] = t[k] + E::round;
  EAML_UNROLL
  for (int k = 0; k < K; ++k) r[k] = (t[k] - (shifted[k] - E::round)) * E::scale, p[k] = E::polynomial[0];
  EAML_UNROLL
  for (int i = 1; i < E::terms; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + E::polynomial[i];
  }
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    const Int top = std::bit_cast<Int>(E::top);
    Int n = std::bit_cast<Int>(shifted[k]);
    n = n < top ? n : top;
    out[k] = t[k] < E::bottom ? T(0) : p[k] * std::bit_cast<T>(n << E::mantissa);
  }
}

EAML_INLINE float exp2_(float t) {
  const float in[1] = {t};
  float out[1];
  exp2_(in, out);
  return out[0];
}
EAML_INLINE double exp2_(double t) {
  const double in[1] = {t};
  double out[1];
  exp2_(in, out);
  return out[0];
}

template <class T>
EAML_INLINE T exp_(T x) {
  return exp2_(x * T(kLog2e));
}

// log(1 + v) for v in [0, 1], with relative accuracy also where v is tiny.
template <int K>
EAML_INLINE void log1p_unit(const float (&v)[K], float (&out)[K]) {
  // log(1 + v) / v, minimax: a division would cost more than this polynomial.
  constexpr float polynomial[] = {-3.24398419e-3f, 1.98512822e-2f,  -5.69592081e-2f, 1.06036231e-1f,  -1.53055742e-1f,
                                  1.96759343e-1f,  -2.49541327e-1f, 3.33299637e-1f,  -4.99999017e-1f, 1.0f};
  float p[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) p[k] = polynomial[0];
  EAML_UNROLL
  for (int i = 1; i < 10; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) p[k] = p[k] * v[k] + polynomial[i];
  }
  EAML_UNROLL
  for (int k = 0; k < K; ++k) out[k] = p[k] * v[k];
}

template <int K>
EAML_INLINE void log1p_unit(const double (&v)[K], double (&out)[K]) {
  double s[K], q[K], p[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) s[k] = v[k] / (2.0 + v[k]), q[k] = s[k] * s[k], p[k] = 2.0 / 37;  // as 2 artanh(s)
  EAML_UNROLL
  for (int i = 1; i < 19; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) p[k] = p[k] * q[k] + 2.0 / (37 - 2 * i);
  }
  EAML_UNROLL
  for (int k = 0; k < K; ++k) out[k] = p[k] * s[k];
}

template <class T>
EAML_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp_(-x));
}

template <class S>
struct Softplus {
  S value, slope;
};

// Softplus and its derivative share one exponential; what is not used costs nothing.
template <int K, class T>
EAML_INLINE void softplus(const T (&x)[K], Softplus<T> (&out)[K]) {
  T t[K], e[K], log[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) t[k] = (x[k] < T(0) ? x[k] : -x[k]) * T(kLog2e);
  exp2_(t, e);
  log1p_unit(e, log);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    const T part = T(1) / (T(1) + e[k]);
    out[k].value = (x[k] > T(0) ? x[k] : T(0)) + log[k];  // of NaN, log is NaN
    out[k].slope = x[k] > T(0) ? part : e[k] * part;
  }
}

template <class T>
EAML_INLINE Dual<T> sigmoid(Dual<T> x) {
  const T s = sigmoid(x.value);
  return {s, s * (T(1) - s) * x.tangent};
}
template <int K, class T>
EAML_INLINE void softplus(const Dual<T> (&x)[K], Softplus<Dual<T>> (&out)[K]) {
  T values[K];
  Softplus<T> s[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) values[k] = x[k].value;
  softplus(values, s);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    out[k].value = {s[k].value, s[k].slope * x[k].tangent};
    out[k].slope = {s[k].slope, s[k].slope * (T(1) - s[k].slope) * x[k].tangent};
  }
}

}  // namespace eaml
