// One step of the selective scan for one channel and one state, on any scalar: a float, a double, or a Dual of either.
//   h_t = a h_{t-1} + x B,  a = 2^(dt A2),  x = dt u,  y += C h_t        (A2 = A log2(e))
// The backward step is the only derivation in the library: on duals it is the double backward.
#pragma once

#include "common/math.h"

namespace eaml::selective_scan {

template <class S>
EAML_INLINE S decay(S dt, S A2) {
  return exp2_(dt * A2);
}

template <class S>
EAML_INLINE S advance(S a, S h_prev, S x, S B) {
  return a * h_prev + x * B;
}

// What one step sends back for one state; gradients of shared factors are summed by the caller.
template <class S>
struct StepGradient {
  S h_prev;  // dL/dh_{t-1}
  S C;       // dL/dC_t
  S B;       // dL/dB_t
  S x;       // dL/dx_t, one state's share
  S dt_A2;   // dL/d(dt A2) / ln 2, one state's share: times A2 it goes to dt, times dt to A
};

template <class S>
EAML_INLINE StepGradient<S> step_backward(S grad_h, S grad_y, S a, S h_prev, S h, S x, S B, S C) {
  const S g = grad_h + grad_y * C;
  const S ga = g * a;
  return {ga, grad_y * h, g * x, g * B, ga * h_prev};
}

}  // namespace eaml::selective_scan
