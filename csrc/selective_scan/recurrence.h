// One step of the selective scan for one channel and one state, on a vector of lanes, one number, or a Dual of either.
//   h_t = a h_{t-1} + x B,  a = exp(dt A),  x = dt u,  y += C h_t
// The backward step is the only derivation in the library: on duals it is the double backward.
#pragma once

#include "common/math.h"

namespace eaml::selective_scan {

// a = exp(dt A) for K states. A2 = A log2(e) is kept beside A, so that values need no further factor. The tangent of a
// Dual a is that of its logarithm: a product with it then needs one multiplication less.
template <int K, class V>
EAML_INLINE void decay(V dt, const V (&)[K], const V (&A2)[K], V (&a)[K]) {
  V t[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt * A2[n];
  exp2_(t, a);
}
template <int K, class V>
EAML_INLINE void decay(Dual<V> dt, const Dual<V> (&A)[K], const V (&A2)[K], Dual<V> (&a)[K]) {
  V t[K], values[K];
  EAML_UNROLL
  for (int n = 0; n < K; ++n) t[n] = dt.value * A2[n];
  exp2_(t, values);
  EAML_UNROLL
  for (int n = 0; n < K; ++n) a[n] = {values[n], dt.value * A[n].tangent + dt.tangent * A[n].value};
}

// a h
template <class V>
EAML_INLINE V decayed(V a, V h) {
  return a * h;
}
template <class V>
EAML_INLINE Dual<V> decayed(const Dual<V>& a, const Dual<V>& h) {
  const V value = a.value * h.value;
  return {value, a.value * h.tangent + a.tangent * value};
}

// B and C may be one number for all lanes.
template <class S, class M>
EAML_INLINE S advance(S a, S h_prev, S x, M B) {
  return decayed(a, h_prev) + x * B;
}

// What one step sends back for one state; gradients of shared factors are summed by the caller.
template <class S>
struct StepGradient {
  S h_prev;  // dL/dh_{t-1}
  S B;       // dL/dB_t; dL/dC_t is grad_y h_t
  S x;       // dL/dx_t, one state's share
  S dt_A;    // dL/d(dt A), one state's share: times A it goes to dt, times dt to A
};

// `rest` is a h_{t-1}.
template <class S, class M>
EAML_INLINE StepGradient<S> step_backward(S grad_h, S grad_y, S a, S rest, S x, M B, M C) {
  const S g = grad_h + grad_y * C;
  return {decayed(a, g), g * x, g * B, g * rest};
}

}  // namespace eaml::selective_scan
