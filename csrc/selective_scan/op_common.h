// The ops of the selective scan on tensors, shared by all devices: each device passes a table of its functions.
//
// Shapes of the tensors; a tangent and a gradient have the shape of their value:
//   u, delta, z, y, grad_y: (batch, dim, length)
//   A: ([tasks,] dim, dstate)
//   B, C: (batch, [groups,] dstate, length) or, invariant in time, ([tasks,] dim, dstate)
//   D, delta_bias: ([tasks,] dim)
//   initial_state, last_state, grad_state: (batch, dim, dstate); packed: (batch * sequences, dim, dstate)
//   reset: (batch, length)
//   cu_seqlens: (sequences + 1,), the same for all batch rows
//   saved: (batch, saved_size), the states at the start of all chunks of each sequence but its first
// A step has u, delta, z, y: (batch, dim), B, C: (batch, [groups,] dstate), and state: (batch, dim, dstate).
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "selective_scan/params.h"

namespace eaml::selective_scan {

using std::int64_t;
using Sizes = std::vector<int64_t>;

// The differentiable arguments of the op, in the order of its schema; also the order of their tangents and gradients.
struct Arguments {
  OptionalTensor u, delta, A, B, C, D, z, delta_bias, initial_state;
};

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor>;  // y, last_state, saved
using StateTuple = std::tuple<Tensor, Tensor>;            // y, last_state
using GradientTuple =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // in the order of Arguments
using BackwardJvpTuple = decltype(std::tuple_cat(StateTuple(), GradientTuple()));

// The functions of one device on numbers of T. `save`: whether forward returns `saved`. `outputs`: whether backward_jvp
// also returns the tangents of y and last_state.
template <class T>
struct Functions {
  ForwardTuple (*forward)(const ScanParams& s, const Arguments& x, bool save);
  GradientTuple (*backward)(const ScanParams& s, const Arguments& x, const Tensor& grad_y,
                            const OptionalTensor& grad_state, const OptionalTensor& saved);
  StateTuple (*jvp)(const ScanParams& s, const Arguments& x, const Arguments& tangents);
  BackwardJvpTuple (*backward_jvp)(const ScanParams& s, const Arguments& x, const Tensor& grad_y,
                                   const OptionalTensor& grad_state, const Arguments& tangents,
                                   const OptionalTensor& grad_y_tangent, const OptionalTensor& grad_state_tangent,
                                   bool outputs);
  StateTuple (*step)(const ScanParams& s, const Tensor& state, const Arguments& x);
};

struct Device {
  const char* name;
  bool (*has)(const Tensor& t);  // whether t is on the device
  Functions<float> single_precision;
  Functions<double> double_precision;
};

// ---- views of tensors ----

Sizes sizes_of(const Tensor& t);
Tensor empty(const Tensor& like, const Sizes& size);

// The number of saved states of a batch row, one for each chunk but the first.
//
// A packed sequence of n steps has at most floor(n / kChunk) of them. If it starts at step c of its row, they begin at
// number floor(c / kChunk). Since floor(c / kChunk) + floor(n / kChunk) <= floor((c + n) / kChunk), they end before the
// next sequence's begin, and floor(length / kChunk) suffice for a row. Saved states that belong to no chunk are zero.
int64_t saved_chunks(const ScanParams& s);
// Numbers of A's dtype in the saved states of a batch row; at least those of one chunk.
int64_t saved_size(const ScanParams& s);

// A view of a (batch, dim, length) or (batch, dim, dstate) tensor, `num_components` real numbers per element.
template <class T>
In<T> sequence(const OptionalTensor& t, int64_t num_components = 1);
template <class T>
Out<T> out(const Tensor& t, int64_t num_components = 1);
// Views of all arguments of a scan, or of a step.
template <class T>
Inputs<T> inputs(const ScanParams& s, const Arguments& x);
template <class T>
Inputs<T> step_inputs(const ScanParams& s, const Tensor& state, const Arguments& x);

// ---- the ops ----

ForwardTuple selective_scan(const Device& device, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                            OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state,
                            OptionalTensor reset, OptionalTensor cu_seqlens, bool delta_softplus, bool B_invariant,
                            bool C_invariant, bool split_invariant, bool save);

StateTuple selective_scan_step(const Device& device, Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                               OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus);

GradientTuple selective_scan_backward(const Device& device, Tensor grad_y, OptionalTensor grad_state, Tensor u,
                                      Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                      OptionalTensor delta_bias, OptionalTensor initial_state, OptionalTensor reset,
                                      OptionalTensor cu_seqlens, bool delta_softplus, bool B_invariant,
                                      bool C_invariant, bool split_invariant, OptionalTensor saved);

StateTuple selective_scan_jvp(const Device& device, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                              OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                              OptionalTensor initial_state, OptionalTensor u_tangent, OptionalTensor delta_tangent,
                              OptionalTensor A_tangent, OptionalTensor B_tangent, OptionalTensor C_tangent,
                              OptionalTensor D_tangent, OptionalTensor z_tangent, OptionalTensor delta_bias_tangent,
                              OptionalTensor initial_state_tangent, OptionalTensor reset, OptionalTensor cu_seqlens,
                              bool delta_softplus, bool B_invariant, bool C_invariant, bool split_invariant);

BackwardJvpTuple selective_scan_backward_jvp(
    const Device& device, Tensor grad_y, OptionalTensor grad_state, OptionalTensor grad_y_tangent,
    OptionalTensor grad_state_tangent, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state, OptionalTensor u_tangent,
    OptionalTensor delta_tangent, OptionalTensor A_tangent, OptionalTensor B_tangent, OptionalTensor C_tangent,
    OptionalTensor D_tangent, OptionalTensor z_tangent, OptionalTensor delta_bias_tangent,
    OptionalTensor initial_state_tangent, OptionalTensor reset, OptionalTensor cu_seqlens, bool delta_softplus,
    bool B_invariant, bool C_invariant, bool split_invariant, bool outputs);

// Registers the ops of a device.
template <const Device& kDevice>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("selective_scan", TORCH_BOX(&DeviceOp<&selective_scan>::run<kDevice>));
  m.impl("selective_scan_step", TORCH_BOX(&DeviceOp<&selective_scan_step>::run<kDevice>));
  m.impl("selective_scan_backward", TORCH_BOX(&DeviceOp<&selective_scan_backward>::run<kDevice>));
  m.impl("selective_scan_jvp", TORCH_BOX(&DeviceOp<&selective_scan_jvp>::run<kDevice>));
  m.impl("selective_scan_backward_jvp", TORCH_BOX(&DeviceOp<&selective_scan_backward_jvp>::run<kDevice>));
}

}  // namespace eaml::selective_scan
