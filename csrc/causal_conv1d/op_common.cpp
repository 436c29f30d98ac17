// Arguments of the causal convolution: checks, views, allocation. Python checks the arguments in full; the checks here
// keep memory safe.
#include "causal_conv1d/op_common.h"

#include <algorithm>
#include <vector>

#include "common/check.h"

namespace eaml::causal_conv1d {
namespace {

using Sizes = std::vector<int64_t>;

void check(const Device& device, const char* name, const Tensor& t, ScalarType dtype, const Sizes& sizes) {
  EAML_CHECK(device.has(t), "causal_conv1d: ", name, " must be on ", device.name);
  EAML_CHECK(t.scalar_type() == dtype, "causal_conv1d: ", name, " has a wrong dtype");
  const auto have = t.sizes();
  EAML_CHECK(std::equal(have.begin(), have.end(), sizes.begin(), sizes.end()), "causal_conv1d: ", name,
             " has a wrong shape");
}

template <class T>
In<T> sequence(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2), half_of(t.scalar_type())};
}
template <class T>
Out<T> out(const Tensor& t) {
  return {mutable_data<T>(t), t.stride(0), t.stride(1), t.stride(2), half_of(t.scalar_type())};
}

// A call with checked arguments. Its tensors own contiguous copies of parameters.
template <class T>
struct Call {
  ConvParams<T> params;
  Tensor weight;
  OptionalTensor bias, cu_seqlens;
};

template <class T>
Call<T> make_call(const Device& device, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& initial_states, const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                  bool silu) {
  Call<T> call{{}, torch::stable::contiguous(weight), {}, {}};
  ConvParams<T>& p = call.params;
  const ScalarType dtype = x.scalar_type(), full = opmath_type(dtype);
  EAML_CHECK(is_kernel_dtype(dtype), "causal_conv1d: x must be floating-point");
  EAML_CHECK(x.dim() == 3, "causal_conv1d: x has ", x.dim(), " dimensions");
  EAML_CHECK(weight.dim() == 2 || weight.dim() == 3, "causal_conv1d: weight has ", weight.dim(), " dimensions");
  p.batch = x.size(0), p.dim = x.size(1), p.runs.length = x.size(2), p.silu = silu;
  check(device, "x", x, dtype, {p.batch, p.dim, p.runs.length});
  const int64_t width = weight.size(weight.dim() - 1), tasks = weight.dim() == 3 ? weight.size(0) : 1;
  EAML_CHECK(width >= 1 && width <= kMaxWidth, "causal_conv1d: weight has width ", width, ", the kernels take 1 to ",
             kMaxWidth);
  EAML_CHECK(tasks > 0 && p.batch % tasks == 0, "causal_conv1d: weight has ", tasks,
             " tasks, which do not divide the batch of ", p.batch);
  p.width = static_cast<int>(width), p.rows_per_task = std::max<int64_t>(p.batch / tasks, 1);
  check(device, "weight", weight, full, weight.dim() == 3 ? Sizes{tasks, p.dim, width} : Sizes{p.dim, width});
  p.weight = data<T>(call.weight);
  if (bias) {
    check(device, "bias", *bias, full, weight.dim() == 3 ? Sizes{tasks, p.dim} : Sizes{p.dim});
    call.bias = torch::stable::contiguous(*bias), p.bias = data<T>(*call.bias);
  }
  if (reset) {
    check(device, "reset", *reset, ScalarType::Bool, {p.batch, p.runs.length});
    p.runs.reset = data<bool>(*reset), p.runs.reset_outer = reset->stride(0), p.runs.reset_inner = reset->stride(1);
  }
  if (cu_seqlens) {
    EAML_CHECK(cu_seqlens->dim() == 2 && cu_seqlens->size(1) > 0 &&
                   (cu_seqlens->size(0) == 1 || cu_seqlens->size(0) == p.batch),
               "causal_conv1d: cu_seqlens has a wrong shape");
    check(device, "cu_seqlens", *cu_seqlens, ScalarType::Int, {cu_seqlens->size(0), cu_seqlens->size(1)});
    call.cu_seqlens = torch::stable::contiguous(*cu_seqlens);
    p.runs.sequences = cu_seqlens->size(1) - 1;
    // Without sequences there are no steps to place.
    if (p.runs.sequences > 0) p.runs.cu_seqlens = data<std::int32_t>(*call.cu_seqlens);
    p.runs.cu_outer = cu_seqlens->size(0) == 1 ? 0 : cu_seqlens->size(1);
  }
  if (initial_states) {
    const Tensor& s = *initial_states;
    check(device, "initial_states", s, dtype, {p.batch, p.runs.sequences, p.dim, width - 1});
    p.states = {data<T>(s), s.stride(0), s.stride(2), s.stride(3), half_of(dtype), s.stride(1)};
  }
  return call;
}

// Calls f(functions of the device in the precision of x).
template <class F>
auto with_functions(const Device& device, const Tensor& x, F f) {
  return x.scalar_type() == ScalarType::Double ? f(double(), device.double_precision)
                                               : f(float(), device.single_precision);
}

}  // namespace

Tensor causal_conv1d(const Device& device, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor initial_states,
                     OptionalTensor reset, OptionalTensor cu_seqlens, bool silu) {
  return with_functions(device, x, [&](auto number, const auto& functions) {
    using T = decltype(number);
    Call<T> call = make_call<T>(device, x, weight, bias, initial_states, reset, cu_seqlens, silu);
    Tensor y = torch::stable::empty_like(x);
    call.params.x = sequence<T>(x), call.params.y = out<T>(y);
    if (x.numel() > 0) functions.forward(call.params, x);
    return y;
  });
}

GradientTuple causal_conv1d_backward(const Device& device, Tensor grad_y, Tensor x, Tensor weight, OptionalTensor bias,
                                     OptionalTensor initial_states, OptionalTensor reset, OptionalTensor cu_seqlens,
                                     bool silu) {
  return with_functions(device, x, [&](auto number, const auto& functions) {
    using T = decltype(number);
    Call<T> call = make_call<T>(device, x, weight, bias, initial_states, reset, cu_seqlens, silu);
    ConvParams<T>& p = call.params;
    check(device, "grad_y", grad_y, x.scalar_type(), {p.batch, p.dim, p.runs.length});
    Tensor grad_x = torch::stable::empty_like(x), grad_bias = allocate(weight, {0});
    Tensor grad_states = allocate(x, {0});
    // Sequences without steps, and states that a reset drops, have the gradient 0.
    if (initial_states)
      grad_states = torch::stable::new_zeros(x, {p.batch, p.runs.sequences, p.dim, int64_t{p.width} - 1});
    if (x.numel() == 0) {
      const auto zeros = [](const Tensor& like) {
        const auto sizes = like.sizes();
        return torch::stable::new_zeros(like, Sizes(sizes.begin(), sizes.end()));
      };
      return GradientTuple(grad_x, zeros(weight), bias ? zeros(*bias) : grad_bias, grad_states);
    }
    Tensor grad_weight = torch::stable::empty_like(call.weight);
    if (bias) grad_bias = torch::stable::empty_like(*call.bias);
    p.grad_y = sequence<T>(grad_y), p.x = sequence<T>(x), p.y = out<T>(grad_x);
    if (initial_states)
      p.grad_states = {mutable_data<T>(grad_states), grad_states.stride(0),    grad_states.stride(2),
                       grad_states.stride(3),        half_of(x.scalar_type()), grad_states.stride(1)};
    functions.plan_backward(p);
    const Tensor partial = allocate(weight, {p.batch * p.segments * (p.width + 1) * p.dim});
    p.partial = mutable_data<T>(partial);
    functions.backward(p, x, mutable_data<T>(grad_weight), bias ? mutable_data<T>(grad_bias) : nullptr);
    return GradientTuple(grad_x, grad_weight, grad_bias, grad_states);
  });
}

}  // namespace eaml::causal_conv1d
