// The CPU kernels as templates on a vector of lanes. kernel_versions.h includes this file once per instruction set. One
// file per precision, EAML_NUMBER, instantiates it for real states; another, with EAML_COMPLEX, for complex states.
//
// Lanes are channels, so there is no horizontal sum per step and the exponential runs at full vector width. A unit of
// work is some channels of one batch row, in blocks of one vector. The scan goes through time in chunks: inputs of a
// chunk are staged as [step][lane] tiles, and a group of states stays in registers through the chunk. Backward goes
// from the last chunk to the first. It recomputes the states of a chunk from the state at its start, which the forward
// pass saved.
//
// Every sum has one order, whatever the batch, the length, the chunk and the threads. y and the gradients of u, delta
// and z are sums over the states in ascending order. The gradients of B and C are sums over channels, see kernel.h.
//
// EAML_SHARED marks functions that run once per chunk. They are called, not inlined: inlining would triple the time of
// compilation. Loops over time have no branches on options, because the options are template parameters.

namespace EAML_ISA {
namespace {

using Vector = Vec<Number, EAML_VECTOR_BYTES / sizeof(Number)>;

// clang-format off: each file uses those before it
#include "selective_scan/cpu/layout_inl.h"
#include "selective_scan/cpu/staging_inl.h"
#include "selective_scan/cpu/reduce_inl.h"
#include "selective_scan/cpu/unit_inl.h"
#include "selective_scan/cpu/forward_inl.h"
#include "selective_scan/cpu/step_inl.h"
#include "selective_scan/cpu/backward_inl.h"
// clang-format on

template <class Z>
EAML_SHARED void run_forward(const ScanParams& params, const Source<real_t<Z>>& source, const Outputs<number_t<Z>>& out,
                             int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    if constexpr (std::is_same_v<Z, vector_t<Z>> && kLanes<Z> % 4 == 0) {
      const UnitIndex at = unit_index(params, index);
      if (one_step<Z>(params, at, source.values, out)) {
        step_unit<Z>(arena, params, source.values, out, at);
        continue;
      }
    }
    forward_unit<Z>(arena, params, source, out, index);
  }
}

template <class Z>
EAML_SHARED void run_backward(const ScanParams& params, const Source<real_t<Z>>& source,
                              const Gradients<number_t<Z>>& out, int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    backward_unit<Z>(arena, params, source, out, index);
  }
}

}  // namespace

EAML_ENTRY void forward(const ScanParams& params, const Inputs<Number>& in, const Inputs<Number>* tangents,
                        const Outputs<Number>& out, int64_t begin, int64_t end) {
  if (tangents)
    run_forward<State<Dual<Vector>>>(params, {in, tangents}, out, begin, end);
  else
    run_forward<State<Vector>>(params, {in, nullptr}, out, begin, end);
}
EAML_ENTRY void backward(const ScanParams& params, const Inputs<Number>& in, const Inputs<Number>* tangents,
                         const Gradients<Number>& out, int64_t begin, int64_t end) {
  if (tangents)
    run_backward<State<Dual<Vector>>>(params, {in, tangents}, out, begin, end);
  else
    run_backward<State<Vector>>(params, {in, nullptr}, out, begin, end);
}

}  // namespace EAML_ISA
