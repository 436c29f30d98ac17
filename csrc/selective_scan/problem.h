// The problem of a selective scan as every kernel sees it: sizes, and arrays as pointers with strides. A complex
// number is two in memory, and two of them count one stride each.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace eaml::selective_scan {

// Steps between two saved states. CHUNK in eaml_ext/ops/selective_scan.py is the same number.
constexpr std::int64_t kChunk = 32;

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
  const T* carry = nullptr;  // on the CPU, laid out like one saved state: what stands for initial_state or grad_state
};

struct Shape {
  std::int64_t batch, dim, length, state, groups;
  std::int64_t all_states;      // of the arrays that hold states; a call may do a part of them, `state`
  std::int64_t components = 1;  // of a state: 2 of a complex one
  std::int64_t first_chunk = 0, end_chunk = INT64_MAX;  // a call on the CPU may do a part of the length
  std::int64_t parts = 1;  // y, and gradients of sequences, are sums over states: first within, then over these parts
  bool B_invariant, C_invariant, softplus, gated;
  const bool* reset;  // (batch, length) or null
  std::int64_t reset_outer, reset_inner;
};

// Outputs of the forward pass; of a Dual run, their tangents. Null ones are not written.
template <class T>
struct Outputs {
  Out<T> y;                  // (batch, dim, length)
  Out<T> last_state;         // (batch, dim, state)
  T* checkpoints = nullptr;  // (batch, chunks - 1, all_states, dim): the state each chunk but the first starts from
  T* checkpoint_tangents = nullptr;  // of a Dual run
  T* carry = nullptr;                // (batch, all_states, dim): the state after the last chunk of the call
  T* carry_tangent = nullptr;
};

}  // namespace eaml::selective_scan
