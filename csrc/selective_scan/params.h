// Parameters of the scan kernels: sizes, and arrays as pointers with strides. Strides count real numbers, so the next
// complex number is two further.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::selective_scan {

// Steps between two saved states. CHUNK_SIZE in eaml_ext/ops/selective_scan is the same number.
constexpr std::int64_t kChunk = 32;

// A strided input; a null pointer reads as zeros. Strides: batch row or task (outer), channel, step or state (inner).
template <class T>
struct In {
  const T* data = nullptr;
  std::int64_t outer = 0, channel = 0, inner = 0;
  std::int64_t group = 0;           // of B and C, whose `channel` is the stride over states
  std::int64_t rows_per_outer = 1;  // batch rows that share one entry: 1, or batch / tasks
  Half half = Half::kNone;          // reduced precision of a sequence, to which `data` then points
};

template <class T>
struct Out {
  T* data = nullptr;
  std::int64_t outer = 0, channel = 0, inner = 0;
  Half half = Half::kNone;  // as in In
};

// Inputs of one evaluation. A Dual run has a second set, the tangents.
template <class T>
struct Inputs {
  In<T> u, delta, z;         // (batch, dim, length)
  In<T> A;                   // (tasks, dim, dstate)
  In<T> B, C;                // (batch, groups, dstate, length) or, invariant in time, (tasks, dim, dstate)
  In<T> D, delta_bias;       // (tasks, dim)
  In<T> initial_state;       // (batch, dim, dstate)
  In<T> grad_y, grad_state;  // (batch, dim, length), (batch, dim, dstate): cotangents
  const T* carry = nullptr;  // (batch, all_dstate, dim): on the CPU, replaces initial_state or grad_state
};

struct ScanParams {
  std::int64_t batch, dim, length, dstate, groups;
  std::int64_t all_dstate;          // states in the arrays; a call on the CPU may compute dstate of them
  std::int64_t num_components = 1;  // real numbers per state: 2 if complex
  std::int64_t first_chunk = 0, end_chunk = INT64_MAX;  // CPU: the chunks that a call computes
  // Sums over states are computed as this many partial sums, which are then added; so are gradients of sequences.
  std::int64_t num_partial_sums = 1;
  bool B_invariant, C_invariant, softplus, gated;
  const bool* reset;  // (batch, length) or null
  std::int64_t reset_outer, reset_inner;
};

// Outputs of the forward pass, in a Dual run their tangents. Null ones are not written.
template <class T>
struct Outputs {
  Out<T> y;                  // (batch, dim, length)
  Out<T> last_state;         // (batch, dim, dstate)
  T* checkpoints = nullptr;  // (batch, chunks - 1, all_dstate, dim): the state at the start of each chunk but the first
  T* checkpoint_tangents = nullptr;  // (batch, chunks - 1, all_dstate, dim)
  T* carry = nullptr;                // (batch, all_dstate, dim): the state after the call's last chunk
  T* carry_tangent = nullptr;        // (batch, all_dstate, dim)
};

}  // namespace eaml::selective_scan
