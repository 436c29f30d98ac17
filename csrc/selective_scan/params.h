// Parameters of the scan kernels: sizes, and arrays as pointers with strides. Strides count real numbers:
// adjacent complex numbers are 2 apart.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::selective_scan {

// Steps between two saved states. CHUNK_SIZE in eaml_ext/ops/selective_scan is the same number.
constexpr std::int64_t kChunk = 32;

// A strided input. A null pointer reads as zeros.
template <class T>
struct In {
  const T* data = nullptr;
  std::int64_t outer = 0;           // stride over batch rows or tasks
  std::int64_t channel = 0;         // stride over channels; over states in a B or C that varies in time
  std::int64_t inner = 0;           // stride over steps or states
  std::int64_t group = 0;           // stride over groups, in a B or C that varies in time
  std::int64_t rows_per_outer = 1;  // batch rows that share one entry: 1, or batch / tasks
  Half half = Half::kNone;          // if not kNone, `data` points to 16-bit numbers of this type
};

template <class T>
struct Out {
  T* data = nullptr;
  std::int64_t outer = 0, channel = 0, inner = 0;  // strides and precision as in In
  Half half = Half::kNone;
};

// Inputs of one call; `batch` is that of ScanParams for the states, else the number of batch rows. A call on dual
// numbers, a Dual run, has a second set: the tangents.
template <class T>
struct Inputs {
  In<T> u, delta, z;         // (batch, dim, length)
  In<T> A;                   // (tasks, dim, dstate)
  In<T> B, C;                // (batch, groups, dstate, length) or, invariant in time, (tasks, dim, dstate)
  In<T> D, delta_bias;       // (tasks, dim)
  In<T> initial_state;       // (batch, dim, dstate)
  In<T> grad_y, grad_state;  // (batch, dim, length), (batch, dim, dstate): cotangents
  const T* carry = nullptr;  // (batch, dstate, dim): on the CPU, replaces initial_state or grad_state
};

struct ScanParams {
  std::int64_t batch, dim, length, dstate, groups;
  std::int64_t num_components = 1;                      // real numbers per state: 2 if complex
  std::int64_t unit_channels = 0;                       // CPU: the most channels of a unit, see cpu/kernel.h
  std::int64_t all_length = 0;                          // CPU: the steps of a row in the gradients of B and C
  std::int64_t first_chunk = 0, end_chunk = INT64_MAX;  // CPU: the chunks that a call computes
  bool B_invariant, C_invariant, softplus, gated;
  bool split_invariant = false;           // CUDA: no time segments; the CPU's results never depend on them
  const bool* reset;                      // (batch rows, length) or null
  std::int64_t reset_outer, reset_inner;  // strides over batch rows and steps
  // Packed sequences: `batch` counts sequences, num_sequences for each batch row, and `length` the steps of a batch
  // row. Sequence r has the steps from cu_seqlens[r % num_sequences] to cu_seqlens[r % num_sequences + 1] - 1 of batch
  // row r / num_sequences. Kernels limit these values to 0 ... length, because nothing checks them on a GPU.
  const std::int32_t* cu_seqlens = nullptr;  // (num_sequences + 1,) or null
  std::int64_t num_sequences = 1;
  std::int64_t saved_chunks = 0;  // saved states of a batch row, see op_common.h
};

// Outputs of the forward pass. Null ones are not written. A Dual run writes the tangents of y and last_state in place
// of their values.
template <class T>
struct Outputs {
  Out<T> y;                  // (batch, dim, length)
  Out<T> last_state;         // (batch, dim, dstate)
  T* checkpoints = nullptr;  // (batch, chunks - 1, dstate, dim): the state at the start of each chunk but the first
  T* checkpoint_tangents = nullptr;  // (batch, chunks - 1, dstate, dim)
  T* carry = nullptr;                // (batch, dstate, dim): the state after the call's last chunk
  T* carry_tangent = nullptr;        // (batch, dstate, dim)
};

}  // namespace eaml::selective_scan
