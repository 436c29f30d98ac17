// The CUDA causal convolution on tensors. No function synchronises with the GPU and all memory is torch's, so that
// calls can be captured in a CUDA graph.
#include "causal_conv1d/cuda/launch.h"
#include "causal_conv1d/op_common.h"
#include "common/device_guard.h"

namespace eaml::causal_conv1d {
namespace {

template <class T>
void plan_backward(ConvParams<T>& p) {
  const int64_t size = shares_channel(p) ? kSegment<32> : kSegment<1>;
  p.segments = (p.runs.length + size - 1) / size;
}

template <class T>
void run(const ConvParams<T>& params, const Tensor& like) {
  const cuda::DeviceStreamGuard guard(like);
  ConvParams<T> p = params;
  plan_backward(p);
  cuda::check_launch(forward(p, guard.stream()));
}

template <class T>
void run_backward(const ConvParams<T>& p, const Tensor& like, T* grad_weight, T* grad_bias) {
  const cuda::DeviceStreamGuard guard(like);
  cuda::check_launch(backward(p, guard.stream()));
  const SumParams<T> sums{p.partial, grad_weight, grad_bias, p.batch / p.rows_per_task, p.rows_per_task * p.segments,
                          p.dim,     p.width};
  cuda::check_launch(sum(sums, guard.stream()));
}

template <class T>
constexpr Functions<T> kFunctions{run<T>, plan_backward<T>, run_backward<T>};
constexpr Device kDevice{"a CUDA device", cuda::on_device, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, EAML_CUDA_KEY, m) {
  register_ops<kDevice>(m);
}

}  // namespace eaml::causal_conv1d
