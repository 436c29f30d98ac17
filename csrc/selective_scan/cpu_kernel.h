// The CPU kernels of the selective scan, seen from outside: pointers, strides and two entry points per precision, for
// real states and for complex ones. A complex number is two in memory, and two of them count one stride each.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace eaml::selective_scan {

// Steps between two saved states. CHUNK in eaml_ext/ops/selective_scan.py is the same number.
constexpr std::int64_t kChunk = 32;
// Bytes of a row of the channels that share one pass over B and C; fixed, so that sums never depend on the number of
// threads.
constexpr std::int64_t kUnitBytes = 1024;

// A strided input; a null pointer reads as zeros. Strides are in elements: batch row or task, channel, step or state.
template <class T>
struct In {
  const T* data = nullptr;
  std::int64_t outer = 0, channel = 0, inner = 0;
  std::int64_t group = 0;           // of B and C; for them `channel` is the stride over states
  std::int64_t rows_per_outer = 1;  // batch rows that share one entry: 1, or batch / tasks
  Half half = Half::kNone;          // of sequences: `data` points to such numbers instead
};

template <class T>
struct Out {
  T* data = nullptr;
  std::int64_t outer = 0, channel = 0, inner = 0;
  Half half = Half::kNone;  // likewise
};

// Inputs of one evaluation; in a Dual run a second set of these carries the tangents.
template <class T>
struct Inputs {
  In<T> u, delta, z;         // (batch, dim, length)
  In<T> A;                   // (tasks, dim, state)
  In<T> B, C;                // (batch, groups, state, length) or, invariant, (tasks, dim, state)
  In<T> D, delta_bias;       // (tasks, dim)
  In<T> initial_state;       // (batch, dim, state)
  In<T> grad_y, grad_state;  // cotangents: (batch, dim, length), (batch, dim, state)
};

struct Shape {
  std::int64_t batch, dim, length, state, groups;
  std::int64_t all_states;      // of the arrays that hold states; a call may do a part of them, `state`
  std::int64_t components = 1;  // of a state: 2 of a complex one
  std::int64_t parts = 1;  // y, and gradients of sequences, are sums over states: first within, then over these parts
  bool B_invariant, C_invariant, softplus, gated;
  const bool* reset;  // (batch, length) or null
  std::int64_t reset_outer, reset_inner;
};

// The first state of a part: whole groups of the kernel's states in flight.
inline std::int64_t part_begin(const Shape& s, std::int64_t part) {
  return part == s.parts ? s.state : part * ((s.state / s.parts + 3) / 4 * 4);
}

// Outputs of the forward pass; of a Dual run, their tangents. Null ones are not written.
template <class T>
struct Outputs {
  Out<T> y;                  // (batch, dim, length)
  Out<T> last_state;         // (batch, dim, state)
  T* checkpoints = nullptr;  // (batch, chunks - 1, all_states, dim): the state each chunk but the first starts from
  T* checkpoint_tangents = nullptr;  // of a Dual run
};

// Gradients; of a Dual run, their tangents. All but the first three are partial sums, reduced by the caller.
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
