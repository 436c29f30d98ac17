// Entry points of the CPU kernels for numbers of EAML_NUMBER and real states or, with EAML_COMPLEX, complex states. The
// kernels are compiled once per instruction set; each call chooses the set of this machine.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/arena.h"
#include "common/softplus.h"
#include "common/transpose_lanes.h"
#include "selective_scan/cpu/kernel.h"
#include "selective_scan/recurrence.h"

namespace eaml::selective_scan {
#if defined(EAML_COMPLEX)
namespace complex_states {
template <class S>
using State = Complex<S>;
#else
namespace real_states {
template <class S>
using State = S;
#endif

using std::int64_t;
using Number = EAML_NUMBER;

#define EAML_BODY "selective_scan/cpu/kernel_inl.h"
#include "common/each_isa.h"

void forward(const ScanParams& params, const Inputs<Number>& in, const Inputs<Number>* tangents,
             const Outputs<Number>& out, int64_t begin, int64_t end) {
  EAML_DISPATCH(forward(params, in, tangents, out, begin, end));
}
void backward(const ScanParams& params, const Inputs<Number>& in, const Inputs<Number>* tangents,
              const Gradients<Number>& out, int64_t begin, int64_t end) {
  EAML_DISPATCH(backward(params, in, tangents, out, begin, end));
}

}  // namespace real_states or complex_states
}  // namespace eaml::selective_scan
