// The ops of the causal convolution on tensors, shared by all devices: each device passes a table of its functions.
//
// Shapes of the tensors; a gradient has the shape of its value:
//   x, y, grad_y: (batch, dim, length), of one dtype
//   weight: ([tasks,] dim, width), bias: ([tasks,] dim), of the opmath type
//   initial_states: (batch, sequences, dim, width - 1), of the dtype of x
//   reset: (batch, length), bool; cu_seqlens: (batch or 1, sequences + 1), int32
#pragma once

#include <tuple>

#include "causal_conv1d/params.h"
#include "common/tensor.h"

namespace eaml::causal_conv1d {

using GradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, weight, bias, initial_states

// Kernels of one device on numbers of T. `like` is a tensor of the call.
template <class T>
struct Functions {
  void (*forward)(const ConvParams<T>& p, const Tensor& like);
  // Sets the segments of time.
  void (*plan_backward)(ConvParams<T>& p);
  // Writes `partial`, then the sums over rows and segments: grad_weight (tasks, dim, width) and grad_bias (tasks, dim).
  void (*backward)(const ConvParams<T>& p, const Tensor& like, T* grad_weight, T* grad_bias);
};

struct Device {
  const char* name;
  bool (*has)(const Tensor& t);
  Functions<float> single_precision;
  Functions<double> double_precision;
};

Tensor causal_conv1d(const Device& device, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor initial_states,
                     OptionalTensor reset, OptionalTensor cu_seqlens, bool silu);
GradientTuple causal_conv1d_backward(const Device& device, Tensor grad_y, Tensor x, Tensor weight, OptionalTensor bias,
                                     OptionalTensor initial_states, OptionalTensor reset, OptionalTensor cu_seqlens,
                                     bool silu);

template <const Device& kDevice>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("causal_conv1d", TORCH_BOX(&DeviceOp<&causal_conv1d>::run<kDevice>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&DeviceOp<&causal_conv1d_backward>::run<kDevice>));
}

}  // namespace eaml::causal_conv1d
