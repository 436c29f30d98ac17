// Interface of the CPU kernels: pointers, strides, and two entry points per precision and kind of state.
#pragma once

#include <algorithm>
#include <cstdint>

#include "selective_scan/params.h"

namespace eaml::selective_scan {

// A unit of work is up to `unit_channels` channels of one group and batch row. The gradients of B and C are sums over
// channels: of a unit first, then over units. So the backward pass always takes sum_channels(), a function of dim
// alone. The forward pass has no sum over channels and may take any number.
//
// sum_channels: half of a group, at least 64 and at most 256 floats, as whole vectors of every instruction set.
template <class T>
std::int64_t sum_channels(const ScanParams& params) {
  constexpr std::int64_t kVector = 64 / sizeof(T), kLeast = 256 / sizeof(T), kMost = 1024 / sizeof(T);
  const std::int64_t half = (params.dim / params.groups + 1) / 2;
  return std::clamp((half + kVector - 1) / kVector * kVector, kLeast, kMost);
}

// Gradients, in a Dual run their tangents. Null ones are not written. The caller adds the partial sums of A, B, C, D
// and delta_bias: one per batch row, or one per unit.
template <class T>
struct Gradients {
  Out<T> u, delta, z;                      // (batch, dim, length)
  T* initial_state = nullptr;              // (batch, dim, dstate)
  T* A = nullptr;                          // (batch, dim, dstate)
  T* B = nullptr;                          // (batch, units, dstate, length) or, invariant in time, (batch, dim, dstate)
  T* C = nullptr;                          // as B
  T* D = nullptr;                          // (batch, dim)
  T* delta_bias = nullptr;                 // (batch, dim)
  const T* checkpoints = nullptr;          // (batch, chunks - 1, dstate, dim): saved by the forward pass
  const T* checkpoint_tangents = nullptr;  // (batch, chunks - 1, dstate, dim)
  T* carry = nullptr;                      // (batch, dstate, dim): gradient of the state before the call's first chunk
  T* carry_tangent = nullptr;              // (batch, dstate, dim)
};

// Units of a group, and of a batch row. A call has batch * units(params) independent units.
inline std::int64_t units_per_group(const ScanParams& params) {
  return (params.dim / params.groups + params.unit_channels - 1) / params.unit_channels;
}
inline std::int64_t units(const ScanParams& params) {
  return units_per_group(params) * params.groups;
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
