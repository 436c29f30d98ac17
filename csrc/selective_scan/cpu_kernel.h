// The CPU kernels of the selective scan, seen from outside: pointers, strides and two entry points per precision, for
// real states and for complex ones.
#pragma once

#include <cstdint>

#include "selective_scan/problem.h"

namespace eaml::selective_scan {

// Bytes of a row of the channels that share one pass over B and C; fixed, so that sums never depend on the number of
// threads.
constexpr std::int64_t kUnitBytes = 1024;

// The first state of a part: whole groups of the kernel's states in flight.
inline std::int64_t part_begin(const Shape& s, std::int64_t part) {
  return part == s.parts ? s.state : part * ((s.state / s.parts + 3) / 4 * 4);
}

// Gradients; of a Dual run, their tangents. All but the first three are partial sums, reduced by the caller. Null ones
// are not written.
template <class T>
struct Gradients {
  Out<T> u, delta, z;              // (batch, dim, length)
  T* initial_state = nullptr;      // (batch, dim, all_states)
  T* A = nullptr;                  // (batch, dim, state)
  T* B = nullptr;                  // (batch, unit, state, length) or, invariant, (batch, dim, state)
  T* C = nullptr;                  // likewise
  T* D = nullptr;                  // (batch, dim)
  T* delta_bias = nullptr;         // (batch, dim)
  const T* checkpoints = nullptr;  // what the forward pass saved
  const T* checkpoint_tangents = nullptr;
  T* carry = nullptr;  // (batch, all_states, dim): of the state before the first chunk of the call
  T* carry_tangent = nullptr;
};

// Work is cut into batch * units(shape) independent units; a call does those in [begin, end).
template <class T>
std::int64_t units_per_group(const Shape& shape) {
  const std::int64_t width = kUnitBytes / sizeof(T), dim = shape.dim / shape.groups;
  return (dim + width - 1) / width;
}
template <class T>
std::int64_t units(const Shape& shape) {
  return units_per_group<T>(shape) * shape.groups;
}

// With tangents, everything runs on Duals.
#define EAML_DECLARE(NUMBER)                                                                                   \
  void forward(const Shape&, const Inputs<NUMBER>&, const Inputs<NUMBER>* tangents, const Outputs<NUMBER>&,    \
               std::int64_t begin, std::int64_t end);                                                          \
  void backward(const Shape&, const Inputs<NUMBER>&, const Inputs<NUMBER>* tangents, const Gradients<NUMBER>&, \
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
