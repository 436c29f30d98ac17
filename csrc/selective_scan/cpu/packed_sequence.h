// One sequence of a packed call, as a call on one batch row: the kernels need no case for packed sequences, and the
// bits are those of the sequence alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "selective_scan/cpu/kernel.h"

namespace eaml::selective_scan {

template <class T>
class PackedSequence {
 public:
  ScanParams params;
  int64_t unit;  // of the sequence

  // `unit` counts those of all sequences.
  PackedSequence(const ScanParams& s, int64_t unit_of_call)
      : params(s),
        unit(unit_of_call % units(s)),
        sequence_(unit_of_call / units(s)),
        row_(sequence_ / s.num_sequences) {
    const std::int32_t* const bounds = s.cu_seqlens + sequence_ % s.num_sequences;
    start_ = std::clamp<int64_t>(bounds[0], 0, s.length);
    params.length = std::clamp<int64_t>(bounds[1], start_, s.length) - start_;
    params.batch = params.num_sequences = 1, params.cu_seqlens = nullptr;
    if (params.reset) params.reset += row_ * params.reset_outer + start_ * params.reset_inner;
  }

  Inputs<T> of(Inputs<T> in) const {
    for (In<T>* x : {&in.u, &in.delta, &in.z, &in.grad_y}) shift_steps(*x);
    for (In<T>* x : {&in.A, &in.D, &in.delta_bias}) shift_task(*x);
    params.B_invariant ? shift_task(in.B) : shift_steps(in.B);
    params.C_invariant ? shift_task(in.C) : shift_steps(in.C);
    for (In<T>* x : {&in.initial_state, &in.grad_state}) shift(*x, sequence_ * x->outer);
    return in;
  }

  Outputs<T> of(Outputs<T> out) const {
    shift_steps(out.y), shift(out.last_state, sequence_ * out.last_state.outer);
    for (T** saved : {&out.checkpoints, &out.checkpoint_tangents})
      if (*saved) *saved += first_saved();
    return out;
  }

  Gradients<T> of(Gradients<T> out) const {
    for (Out<T>* x : {&out.u, &out.delta, &out.z}) shift_steps(*x);
    const int64_t channels = sequence_ * params.dim, states = channels * params.dstate * params.num_components;
    const int64_t steps = (row_ * units(params) * params.dstate * params.all_length + start_) * params.num_components;
    if (out.initial_state) out.initial_state += states;
    if (out.A) out.A += states;
    if (out.B) out.B += params.B_invariant ? states : steps;
    if (out.C) out.C += params.C_invariant ? states : steps;
    if (out.D) out.D += channels;
    if (out.delta_bias) out.delta_bias += channels;
    for (const T** saved : {&out.checkpoints, &out.checkpoint_tangents})
      if (*saved) *saved += first_saved();
    return out;
  }

 private:
  int64_t sequence_, row_, start_;

  // The states that sequences save do not overlap, see saved_chunks in op_common.h.
  int64_t first_saved() const {
    return (row_ * params.saved_chunks + start_ / kChunk) * params.dstate * params.num_components * params.dim;
  }

  // Moves an In or Out by `offset` elements.
  template <class Array>
  static void shift(Array& x, int64_t offset) {
    if (x.data && x.half != Half::kNone)
      x.data =
          reinterpret_cast<decltype(x.data)>(reinterpret_cast<std::uintptr_t>(x.data) + offset * sizeof(std::uint16_t));
    else if (x.data)
      x.data += offset;
  }
  template <class Array>
  void shift_steps(Array& x) const {
    shift(x, row_ * x.outer + start_ * x.inner);
  }
  void shift_task(In<T>& x) const { shift(x, sequence_ / x.rows_per_outer * x.outer); }
};

}  // namespace eaml::selective_scan
