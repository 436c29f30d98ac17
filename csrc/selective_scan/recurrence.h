// One step of the selective scan for one channel and one state, on a vector of lanes, one number, or a Dual of either:
//
//   h_t = a h_{t-1} + x B,  a = exp(dt A),  x = dt u,  y += C h_t
//
// step_backward is the only derivation of the gradients: on Duals it gives the double backward. A, B, C, a and h may be
// Complex: y then adds twice the real part of C h_t, and gradients are dL/dRe + i dL/dIm.
#pragma once

#include "common/complex.h"
#include "common/exp2.h"
#include "common/trig.h"

namespace eaml::selective_scan {

// A complex state represents itself and its conjugate, so sums over states count twice.
template <class Z>
EAML_INLINE real_t<Z> conjugate_pair_sum(real_t<Z> sum) {
  if constexpr (kNumComponents<Z> == 2) return sum + sum;
  return sum;
}

// A, prepared for exp(dt A) = 2^(dt log2): `log2` is A log2(e). For a complex A, `log2` has the real part and `angle`
// the imaginary part, in half turns.
template <class Z>
struct Rate {
  vector_t<Z> log2;
};
template <class S>
struct Rate<Complex<S>> {
  vector_t<S> log2;
  HalfTurns<vector_t<S>> angle;
};

// a = exp(dt A) for K states. A Dual a holds the tangent of log(a) = dt A in place of its own tangent. Products with
// such an a, computed by `decayed`, need one multiplication less.
template <int K, class V>
EAML_INLINE void decay(V dt, const V (&)[K], const Rate<V> (&rate)[K], V (&a)[K]) {
  V t[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt * rate[n].log2;
  exp2_(t, a);
}
// Sets all a to `shared`, the exp(dt A) that the states have in common.
template <int K, class V>
EAML_INLINE void share_decay(V shared, V, const V (&)[K], V (&a)[K]) {
  EAML_UNROLL
  for (int n = 0; n < K; ++n) a[n] = shared;
}
template <class V>
EAML_INLINE Dual<V> with_log_tangent(V value, Dual<V> dt, const Dual<V>& A) {
  return {value, dt.value * A.tangent + dt.tangent * A.value};
}
template <int K, class V>
EAML_INLINE void share_decay(V shared, Dual<V> dt, const Dual<V> (&A)[K], Dual<V> (&a)[K]) {
  EAML_UNROLL
  for (int n = 0; n < K; ++n) a[n] = with_log_tangent(shared, dt, A[n]);
}
template <int K, class V>
EAML_INLINE void decay(Dual<V> dt, const Dual<V> (&A)[K], const Rate<Dual<V>> (&rate)[K], Dual<V> (&a)[K]) {
  V t[K], values[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt.value * rate[n].log2;
  exp2_(t, values);
  EAML_UNROLL
  for (int n = 0; n < K; ++n) a[n] = with_log_tangent(values[n], dt, A[n]);
}

// a = exp(dt A) for a step size that is also given as dt log2(e).
template <int K, class S>
EAML_INLINE void decay(S dt, vector_t<S> dt_log2, const S (&A)[K], S (&a)[K]) {
  vector_t<S> t[K], values[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt_log2 * value_of(A[n]);
  exp2_(t, values);
  EAML_UNROLL
  for (int n = 0; n < K; ++n) {
    if constexpr (kIsDual<S>)
      a[n] = with_log_tangent(values[n], dt, A[n]);
    else
      a[n] = values[n];
  }
}

template <int K, class V, class S>
EAML_INLINE void decay(V dt, const Rate<Complex<S>> (&rate)[K], Complex<V> (&a)[K]) {
  V t[K], modulus[K];
  HalfTurns<V> angle[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt * rate[n].log2, angle[n] = rate[n].angle;
  exp2_(t, modulus);
  polar(modulus, dt, angle, a);
}
template <int K, class V>
EAML_INLINE void decay(V dt, const Complex<V> (&)[K], const Rate<Complex<V>> (&rate)[K], Complex<V> (&a)[K]) {
  decay(dt, rate, a);
}
template <int K, class V>
EAML_INLINE void decay(Dual<V> dt, const Complex<Dual<V>> (&A)[K], const Rate<Complex<Dual<V>>> (&rate)[K],
                       Complex<Dual<V>> (&a)[K]) {
  Complex<V> values[K];
  decay(dt.value, rate, values);
  EAML_UNROLL
  for (int n = 0; n < K; ++n) {
    const Complex<V> log_tangent = output(dt * A[n]);
    a[n] = {{values[n].re, log_tangent.re}, {values[n].im, log_tangent.im}};
  }
}

// a h, for an a that `decay` computed.
template <class V>
EAML_INLINE V decayed(const V& a, const V& h) {
  return a * h;
}
template <class V>
EAML_INLINE Dual<V> decayed(const Dual<V>& a, const Dual<V>& h) {
  const V value = a.value * h.value;
  return {value, a.value * h.tangent + a.tangent * value};
}
template <class V>
EAML_INLINE Complex<Dual<V>> decayed(const Complex<Dual<V>>& a, const Complex<Dual<V>>& h) {
  const Complex<V> factor{a.re.value, a.im.value}, value = factor * Complex<V>{h.re.value, h.im.value};
  const Complex<V> tangent = factor * output(h) + output(a) * value;
  return {{value.re, tangent.re}, {value.im, tangent.im}};
}

// h_t. B may be one number for all lanes.
template <class Z, class S, class M>
EAML_INLINE Z advance(Z a, Z h_prev, S x, M B) {
  return decayed(a, h_prev) + x * B;
}

// sum + Re(h C), with a term of y_t.
template <class S, class Z, class M>
EAML_INLINE S add_product(S sum, const Z& h, const M& C) {
  return sum + real(h * C);
}

#if defined(__CUDACC__) || defined(EAML_CUDA_EMULATOR)
// Fused operations are explicit, so that all CUDA kernels compute the same bits, also as the values of real duals.
EAML_INLINE float advance(float a, float h_prev, float x, float B) {
  return std::fma(a, h_prev, x * B);
}
EAML_INLINE double advance(double a, double h_prev, double x, double B) {
  return std::fma(a, h_prev, x * B);
}
template <class V>
EAML_INLINE Dual<V> advance(const Dual<V>& a, const Dual<V>& h_prev, const Dual<V>& x, const Dual<V>& B) {
  const V tangent = a.value * h_prev.tangent + a.tangent * (a.value * h_prev.value);
  return {advance(a.value, h_prev.value, x.value, B.value), tangent + x.value * B.tangent + x.tangent * B.value};
}
template <class V>
  requires std::is_floating_point_v<V>
EAML_INLINE Complex<V> advance(const Complex<V>& a, const Complex<V>& h_prev, V x, const Complex<V>& B) {
  return {std::fma(a.re, h_prev.re, std::fma(-a.im, h_prev.im, x * B.re)),
          std::fma(a.re, h_prev.im, std::fma(a.im, h_prev.re, x * B.im))};
}
EAML_INLINE float add_product(float sum, float h, float C) {
  return std::fma(h, C, sum);
}
EAML_INLINE double add_product(double sum, double h, double C) {
  return std::fma(h, C, sum);
}
template <class V>
  requires std::is_floating_point_v<V>
EAML_INLINE V add_product(V sum, const Complex<V>& h, const Complex<V>& C) {
  return std::fma(h.re, C.re, std::fma(-h.im, C.im, sum));
}
template <class V>
EAML_INLINE Dual<V> add_product(const Dual<V>& sum, const Dual<V>& h, const Dual<V>& C) {
  return {add_product(sum.value, h.value, C.value), sum.tangent + h.value * C.tangent + h.tangent * C.value};
}
#endif

// Gradients of one step for one state. The caller sums them over the states, channels and steps that share a factor.
template <class Z, class S>
struct StepGradient {
  Z h_prev;  // dL/dh_{t-1}
  Z B;       // dL/dB_t; dL/dC_t is grad_y times the conjugate of h_t
  S x;       // term of dL/dx_t
  Z dt_A;    // term of dL/d(dt A); times conj(A) a term of dL/d(dt), times dt a term of dL/dA
};

// Adjoint of one step. grad_h is dL/dh_t without the term of y_t; `state` is h_{t-1} or, with kDecayed, a h_{t-1}.
template <bool kDecayed = true, class Z, class S, class M>
EAML_INLINE StepGradient<Z, S> step_backward(Z grad_h, S grad_y, Z a, Z state, S x, M B, M C) {
  const Z g = grad_h + times_conjugate(grad_y, C), g_prev = decayed(conjugate(a), g);
  return {g_prev, g * x, real(times_conjugate(g, B)), times_conjugate(kDecayed ? g : g_prev, state)};
}

}  // namespace eaml::selective_scan
