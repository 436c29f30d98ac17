// The CUDA kernels of the selective scan, seen from outside: what each is given, and launchers per precision. Launchers
// return nullptr, or what went wrong, and leave the work on the stream, a cudaStream_t.
#pragma once

#include <cstdint>

#include "selective_scan/params.h"

namespace eaml::selective_scan {

constexpr std::int64_t kMostNumbers = 256;  // of the states of a channel: a complex one is two

template <class T>
struct Arrays {
  Inputs<T> values, tangents;  // tangents of a Dual run alone
};

// Time in segments of whole chunks, and what their kernels leave to each other.
template <class T>
struct TimeSegments {
  std::int64_t count = 1;
  bool local = false;  // only find what each segment adds
  // (batch, count, state, part, dim): first that, then the state each segment starts from (the gradient it ends with).
  T *states = nullptr, *state_tangents = nullptr;
  T *steps = nullptr, *step_tangents = nullptr;  // (batch, count, dim): sum of dt
  T* has_reset = nullptr;                        // (batch, count, dim): 1 where a reset stops the carry
};

template <class T>
struct Forward {
  ScanParams params;
  Arrays<T> arrays;
  TimeSegments<T> segments;
  Outputs<T> out;
};

// Gradients; of a Dual run, their tangents. Those of parameters, B and C are partial sums.
template <class T>
struct CudaGradients {
  Out<T> u, delta, z;              // (batch, dim, length)
  T* initial_state = nullptr;      // (batch, dim, state, part)
  T* A = nullptr;                  // (batch, segments, dim, state, part)
  T* B = nullptr;                  // (batch, groups, blocks, length, state, part) or, invariant, as A
  T* C = nullptr;                  // as B
  T* D = nullptr;                  // (batch, segments, dim)
  T* delta_bias = nullptr;         // as D
  const T* checkpoints = nullptr;  // what the forward pass saved
  const T* checkpoint_tangents = nullptr;
};

template <class T>
struct Backward {
  ScanParams params;
  Arrays<T> arrays;
  TimeSegments<T> segments;
  CudaGradients<T> out;
};

// to[i][k] = sum over j of from[i][j][k]; with `rows`, k counts (column, row, part) in `from`, (row, column, part) in
// `to`.
template <class T>
struct Sum {
  T* to;
  const T* from;
  std::int64_t outer, middle, inner, rows, num_components;
};

// How a call is cut into blocks: a function of the params alone, as sums must not depend on the machine.
struct Cut {
  std::int64_t blocks;    // of channels, in a group
  std::int64_t segments;  // of time
};

// `dual`: with tangents. Forward and backward do all that their segments need before.
#define EAML_DECLARE(T)                                              \
  const char* forward(const Forward<T>&, bool dual, void* stream);   \
  const char* backward(const Backward<T>&, bool dual, void* stream); \
  const char* step(const Forward<T>&, void* stream);
namespace real_states {
template <class T>
Cut cut(const ScanParams& params);
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace real_states
namespace complex_states {
template <class T>
Cut cut(const ScanParams& params);
EAML_DECLARE(float)
EAML_DECLARE(double)
}  // namespace complex_states
#undef EAML_DECLARE

const char* sum(const Sum<float>&, void* stream);
const char* sum(const Sum<double>&, void* stream);

}  // namespace eaml::selective_scan
