// Parameters of the causal convolution's kernels: sizes, arrays as pointers with strides, and runs of steps.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::causal_conv1d {

using std::int64_t;

constexpr int kMaxWidth = 4;

// A strided input (batch, dim, length). A null pointer reads as zeros.
template <class T>
struct In {
  const T* data = nullptr;
  int64_t outer = 0, channel = 0, inner = 0;  // strides over batch rows, channels and steps
  Half half = Half::kNone;                    // if not kNone, `data` points to 16-bit numbers of this type
  int64_t sequence = 0;                       // stride over sequences, in states
};

template <class T>
struct Out {
  T* data = nullptr;
  int64_t outer = 0, channel = 0, inner = 0;
  Half half = Half::kNone;
  int64_t sequence = 0;
};

// A run is the steps between two resets or of one packed sequence. Inputs before a run are zeros after a reset, else
// the state of its sequence. Without either the row is one run, of sequence 0.
struct Runs {
  int64_t length = 0, sequences = 1;
  const bool* reset = nullptr;  // (batch, length)
  int64_t reset_outer = 0, reset_inner = 0;
  const std::int32_t* cu_seqlens = nullptr;  // (batch or 1, sequences + 1), contiguous
  int64_t cu_outer = 0;
};

template <class T>
struct ConvParams {
  int64_t batch = 0, dim = 0;
  int64_t rows_per_task = 1;  // batch rows that share weight and bias
  int width = 0;
  bool silu = false;
  Runs runs;
  In<T> x, grad_y;
  const T* weight = nullptr;  // (tasks, dim, width), contiguous, the tap of the newest input last
  const T* bias = nullptr;    // (tasks, dim), contiguous
  In<T> states;               // (batch, sequences, dim, width - 1), the newest input last
  Out<T> y;                   // or the gradient of x
  Out<T> grad_states;         // as states
  T* partial = nullptr;       // (batch, segments, width + 1, dim): partial sums of the gradients of weight and bias
  int64_t segments = 1;       // of time; the number depends on length and strides alone
};

// A step, and its place in its run.
struct Position {
  int64_t t;
  int64_t sequence;
  int past;   // steps of the run before t, at most width - 1
  bool zero;  // whether a reset started the run
};

EAML_INLINE bool is_reset(const Runs& runs, int64_t row, int64_t t) {
  return runs.reset != nullptr && runs.reset[row * runs.reset_outer + t * runs.reset_inner];
}

// The position of step t < length. Values of cu_seqlens that are invalid give a position in the row, so that accesses
// stay in bounds.
template <int kWidth>
EAML_INLINE Position position(const Runs& runs, int64_t row, int64_t t) {
  Position at{t, 0, 0, false};
  int64_t start = 0;
  if (runs.cu_seqlens != nullptr) {
    const std::int32_t* const cu = runs.cu_seqlens + row * runs.cu_outer;
    int64_t above = runs.sequences;  // the last sequence that starts at t or before is in [at.sequence, above)
    while (above - at.sequence > 1) {
      const int64_t middle = (at.sequence + above) / 2;
      (cu[middle] <= t ? at.sequence : above) = middle;
    }
    start = cu[at.sequence] < 0 ? 0 : cu[at.sequence];
  }
  while (at.past < kWidth - 1 && t - at.past > start && !is_reset(runs, row, t - at.past)) ++at.past;
  at.zero = is_reset(runs, row, t - at.past);
  return at;
}

// Moves to the next step, which must be in the row.
template <int kWidth>
EAML_INLINE void advance(const Runs& runs, int64_t row, Position& at) {
  ++at.t;
  at.past += at.past < kWidth - 1;
  if (is_reset(runs, row, at.t)) at.past = 0, at.zero = true;
  if (runs.cu_seqlens == nullptr) return;
  const std::int32_t* const cu = runs.cu_seqlens + row * runs.cu_outer;
  while (at.sequence + 1 < runs.sequences && cu[at.sequence + 1] <= at.t) ++at.sequence, at.past = 0, at.zero = false;
}

// Whether the run of a first step continues a state.
EAML_INLINE bool starts_from_state(const Position& at) {
  return at.past == 0 && !at.zero;
}

}  // namespace eaml::causal_conv1d
