// Interface of the CUDA kernels of the selective scan: their parameters, and launchers per precision. A launcher
// enqueues its kernels on `stream`, a cudaStream_t, and returns nullptr or an error message.
#pragma once

#include <cstdint>

#include "selective_scan/params.h"

namespace eaml::selective_scan {

constexpr std::int64_t kMaxStateSize = 256;  // real numbers in the states of a channel; a complex state has two

template <class T>
struct Arrays {
  Inputs<T> values, tangents;  // only a Dual run reads tangents
};

// Time segments of whole chunks, and the arrays in which kernels pass states from segment to segment.
template <class T>
struct TimeSegments {
  std::int64_t count = 1;
  bool local = false;  // compute only the contribution of each segment, from a zero state
  // (batch, count, dstate, num_components, dim). The local kernel writes each segment's contribution to the state after
  // it. carry_kernel replaces that by the state before the segment. Backward, the contribution is to the gradient
  // before the segment, and is replaced by the gradient after it.
  T *states = nullptr, *state_tangents = nullptr;
  T *steps = nullptr, *step_tangents = nullptr;  // (batch, count, dim): the sum of dt
  T* has_reset = nullptr;                        // (batch, count, dim): 1 if the segment has a reset
};

template <class T>
struct ForwardParams {
  ScanParams params;
  Arrays<T> arrays;
  TimeSegments<T> segments;
  Outputs<T> out;
};

// Gradients, in a Dual run their tangents. The gradients of A, B, C, D and delta_bias are partial sums.
template <class T>
struct CudaGradients {
  Out<T> u, delta, z;          // (batch rows, dim, length)
  T* initial_state = nullptr;  // (batch, dim, dstate, num_components)
  T* A = nullptr;              // (batch, segments, dim, dstate, num_components)
  // (batch rows, groups, channel_blocks, length, dstate, num_components) or, invariant, as A
  T* B = nullptr;
  T* C = nullptr;                  // as B
  T* D = nullptr;                  // (batch, segments, dim)
  T* delta_bias = nullptr;         // (batch, segments, dim)
  const T* checkpoints = nullptr;  // (batch rows, saved_chunks, dstate, num_components, dim), of the forward pass
  const T* checkpoint_tangents = nullptr;
};

template <class T>
struct BackwardParams {
  ScanParams params;
  Arrays<T> arrays;
  TimeSegments<T> segments;
  CudaGradients<T> out;
};

// to[i][k] = sum over j of from[i][j][k]. With rows > 0, the inner dimension is (columns, rows, num_components) in
// `from` and is transposed to (rows, columns, num_components) in `to`.
template <class T>
struct SumParams {
  T* to;          // (outer, inner)
  const T* from;  // (outer, middle, inner)
  std::int64_t outer, middle, inner, rows, num_components;
};

// The numbers of blocks of a call. They depend on the params alone, because sums must not depend on the machine.
struct BlockCounts {
  std::int64_t channel_blocks;  // per group of channels
  std::int64_t time_segments;
};

// With `dual`, the kernels run on Duals. If there are several time segments, forward and backward first compute the
// states between them.
#define EAML_DECLARE(T)                                                    \
  const char* forward(const ForwardParams<T>&, bool dual, void* stream);   \
  const char* backward(const BackwardParams<T>&, bool dual, void* stream); \
  const char* step(const ForwardParams<T>&, void* stream);
namespace real_states {
template <class T>
BlockCounts block_counts(const ScanParams& params);
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace real_states
namespace complex_states {
template <class T>
BlockCounts block_counts(const ScanParams& params);
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace complex_states
#undef EAML_DECLARE

const char* sum(const SumParams<float>&, void* stream);
const char* sum(const SumParams<double>&, void* stream);

}  // namespace eaml::selective_scan
