// The CPU kernels of the causal convolution on tensors: threads, and sums over rows.
#include <algorithm>
#include <vector>

#include "causal_conv1d/cpu/kernel.h"
#include "causal_conv1d/op_common.h"

namespace eaml::causal_conv1d {
namespace {

bool on_device(const Tensor& t) {
  return t.is_cpu();
}

// Calls f(begin, end) on threads, each with enough units to pay for its start.
template <class T, class F>
void parallel_units(const ConvParams<T>& p, F f) {
  constexpr int64_t kElements = 1 << 15;
  const int64_t unit = std::min(p.runs.length, kSegment) * std::min<int64_t>(p.dim, kUnitBytes / sizeof(T));
  torch::stable::parallel_for(0, units(p), std::max<int64_t>(kElements / unit, 1), f);
}

template <class T>
void plan_backward(ConvParams<T>& p) {
  p.segments = (p.runs.length + kSegment - 1) / kSegment;
}

template <class T>
void run(const ConvParams<T>& params, const Tensor&) {
  ConvParams<T> p = params;
  plan_backward(p);
  parallel_units(p, [&](int64_t begin, int64_t end) { forward(p, begin, end); });
}

// The sums over the rows and segments of each task, in order and in double precision.
template <class T>
void reduce(const ConvParams<T>& p, T* grad_weight, T* grad_bias) {
  const int64_t per_task = p.rows_per_task * p.segments, size = (p.width + 1) * p.dim;
  std::vector<double> sums(size);
  for (int64_t task = 0; task < p.batch / p.rows_per_task; ++task) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t i = task * per_task; i < (task + 1) * per_task; ++i)
      for (int64_t k = 0; k < size; ++k) sums[k] += p.partial[i * size + k];
    for (int64_t c = 0; c < p.dim; ++c) {
      for (int k = 0; k < p.width; ++k) grad_weight[(task * p.dim + c) * p.width + k] = T(sums[k * p.dim + c]);
      if (grad_bias) grad_bias[task * p.dim + c] = T(sums[p.width * p.dim + c]);
    }
  }
}

template <class T>
void run_backward(const ConvParams<T>& p, const Tensor&, T* grad_weight, T* grad_bias) {
  parallel_units(p, [&](int64_t begin, int64_t end) { backward(p, begin, end); });
  reduce(p, grad_weight, grad_bias);
}

template <class T>
constexpr Functions<T> kFunctions{run<T>, plan_backward<T>, run_backward<T>};
constexpr Device kDevice{"the CPU", on_device, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  register_ops<kDevice>(m);
}

}  // namespace eaml::causal_conv1d
