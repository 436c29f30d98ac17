// Softplus and sigmoid with their derivatives, on vectors of lanes, numbers and duals.
#pragma once

#include "common/dual.h"
#include "common/exp2.h"

namespace eaml {

// a b + c. On CUDA the fused operation is explicit, so that all kernels compute the same bits.
template <class V>
EAML_INLINE V fused(V a, V b, V c) {
#if defined(__CUDACC__) || defined(EAML_CUDA_EMULATOR)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// log(1 + v) + c for v in [0, 1], with relative accuracy also where c is 0 and v is tiny.
template <int K, class V>
EAML_INLINE void add_log1p(const V (&v)[K], const V (&c)[K], V (&out)[K]) {
  V p[K];
  if constexpr (sizeof(element_t<V>) == 4) {
    // log(1 + v) / v, minimax: a division would cost more than this polynomial.
    constexpr float polynomial[] = {-3.24398419e-3f, 1.98512822e-2f,  -5.69592081e-2f, 1.06036231e-1f,  -1.53055742e-1f,
                                    1.96759343e-1f,  -2.49541327e-1f, 3.33299637e-1f,  -4.99999017e-1f, 1.0f};
    EAML_UNROLL
    for (int k = 0; k < K; ++k) p[k] = splat<V>(polynomial[0]);
    EAML_UNROLL
    for (int i = 1; i < 10; ++i) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * v[k] + polynomial[i];
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = fused(p[k], v[k], c[k]);
  } else {
    V s[K], q[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) s[k] = v[k] / (2.0 + v[k]), q[k] = s[k] * s[k], p[k] = splat<V>(2.0 / 37);
    EAML_UNROLL
    for (int i = 1; i < 19; ++i) {  // the series of 2 artanh(s)
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * q[k] + 2.0 / (37 - 2 * i);
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = fused(p[k], s[k], c[k]);
  }
}

// 1 / x for x >= 1. On GPUs the error is up to 2 ulp, because a rounded division takes a dozen instructions.
template <class V>
EAML_INLINE V reciprocal(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 4) return __fdividef(1.0f, x);
#endif
  return element_t<V>(1) / x;
}

template <class V>
EAML_INLINE V sigmoid(V x) {
  return reciprocal(element_t<V>(1) + exp_(-x));
}

template <class S>
struct Softplus {
  S value, slope;
};

// Softplus and its derivative share one exponential. The compiler removes the one that is not used.
template <int K, class V>
EAML_INLINE void softplus(const V (&x)[K], Softplus<V> (&out)[K]) {
  using T = element_t<V>;
  V t[K], e[K], positive[K], value[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) t[k] = (x[k] < V{} ? x[k] : -x[k]) * T(kLog2e);
  exp2_(t, e);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) positive[k] = x[k] > V{} ? x[k] : V{};
  add_log1p(e, positive, value);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    const V part = reciprocal(T(1) + e[k]);
    out[k].value = value[k];  // NaN if x is, by the logarithm
    out[k].slope = x[k] > V{} ? part : e[k] * part;
  }
}

template <class V>
EAML_INLINE Dual<V> sigmoid(Dual<V> x) {
  const V s = sigmoid(x.value);
  return {s, s * (element_t<V>(1) - s) * x.tangent};
}
template <int K, class V>
EAML_INLINE void softplus(const Dual<V> (&x)[K], Softplus<Dual<V>> (&out)[K]) {
  V values[K];
  Softplus<V> s[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) values[k] = x[k].value;
  softplus(values, s);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    out[k].value = {s[k].value, s[k].slope * x[k].tangent};
    out[k].slope = {s[k].slope, s[k].slope * (element_t<V>(1) - s[k].slope) * x[k].tangent};
  }
}

}  // namespace eaml
