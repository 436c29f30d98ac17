// Interface of the CPU kernels: pointers, strides, and two entry points per precision and kind of state.
#pragma once

#include <cstdint>

#include "selective_scan/params.h"

namespace eaml::selective_scan {

// A unit has this many bytes of channels: 256 floats or 128 doubles. The number is fixed, so that sums do not depend on
// the number of threads.
constexpr std::int64_t kUnitBytes = 1024;

// The first state of a partial sum: a multiple of four states, so that groups of states are whole.
inline std::int64_t partial_sum_begin(const ScanParams& s, std::int64_t part) {
  return part == s.num_partial_sums ? s.dstate : part * ((s.dstate / s.num_partial_sums + 3) / 4 * 4);
}

// Gradients, in a Dual run their tangents. Null ones are not written. The caller adds the partial sums of A, B, C, D
// and delta_bias: one per batch row, or one per unit.
template <class T>
struct Gradients {
  Out<T> u, delta, z;                      // (batch, dim, length)
  T* initial_state = nullptr;              // (batch, dim, all_dstate)
  T* A = nullptr;                          // (batch, dim, dstate)
  T* B = nullptr;                          // (batch, units, dstate, length) or, invariant in time, (batch, dim, dstate)
  T* C = nullptr;                          // as B
  T* D = nullptr;                          // (batch, dim)
  T* delta_bias = nullptr;                 // (batch, dim)
  const T* checkpoints = nullptr;          // (batch, chunks - 1, all_dstate, dim): saved by the forward pass
  const T* checkpoint_tangents = nullptr;  // (batch, chunks - 1, all_dstate, dim)
  T* carry = nullptr;          // (batch, all_dstate, dim): gradient of the state before the call's first chunk
  T* carry_tangent = nullptr;  // (batch, all_dstate, dim)
};

// Units of a group, and of a batch row. A call has batch * units(params) independent units.
template <class T>
std::int64_t units_per_group(const ScanParams& params) {
  const std::int64_t width = kUnitBytes / sizeof(T), dim = params.dim / params.groups;
  return (dim + width - 1) / width;
}
template <class T>
std::int64_t units(const ScanParams& params) {
  return units_per_group<T>(params) * params.groups;
}

// The kernels compute the units [begin, end). With tangents they run on Duals.
#define EAML_DECLARE(NUMBER)                                                                                        \
  void forward(const ScanParams&, const Inputs<NUMBER>&, const Inputs<NUMBER>* tangents, const Outputs<NUMBER>&,    \
               std::int64_t begin, std::int64_t end);                                                               \
  void backward(const ScanParams&, const Inputs<NUMBER>&, const Inputs<NUMBER>* tangents, const Gradients<NUMBER>&, \
                std::int64_t begin, std::int64_t end);
namespace real_states {
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace real_states
namespace complex_states {
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace complex_states
#undef EAML_DECLARE

}  // namespace eaml::selective_scan
