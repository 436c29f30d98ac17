// row_invariant_linear on tensors: checks, allocation, threads. Other devices have torch's own product.
#include <algorithm>

#include "common/arena.h"
#include "common/check.h"
#include "common/tensor.h"
#include "row_invariant_linear/cpu/kernel.h"

namespace eaml::row_invariant_linear {
namespace {

Tensor to_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

template <class T>
void run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y) {
  constexpr std::int64_t kBlock = 8 * kRows, kGrain = std::int64_t(1) << 16;  // rows of a unit; products of a thread
  static thread_local Arena arena;
  arena.reset();
  Params<T> params{.rows = x.size(0), .inputs = x.size(1), .outputs = weight.size(0)};
  params.x = data<T>(x), params.weight = data<T>(weight), params.bias = bias ? data<T>(*bias) : nullptr;
  params.packed = arena.take<T>(packed_size(params.inputs, params.outputs)), params.y = mutable_data<T>(y);
  pack(params);
  const std::int64_t units = (params.rows + kBlock - 1) / kBlock;
  const std::int64_t grain = 1 + kGrain / (1 + kBlock * params.inputs * params.outputs);
  torch::stable::parallel_for(0, units, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit)
      multiply(params, unit * kBlock, std::min(params.rows, (unit + 1) * kBlock));
  });
}

Tensor row_invariant_linear(Tensor x, Tensor weight, OptionalTensor bias) {
  const ScalarType type = x.scalar_type();
  const bool fits = x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.scalar_type() == type &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type));
  EAML_CHECK(fits && (type == ScalarType::Float || type == ScalarType::Double),
             "row_invariant_linear: x, weight and bias must be (rows, inputs), (outputs, inputs) and (outputs,), all "
             "float32 or float64");
  x = to_contiguous(x), weight = to_contiguous(weight);
  if (bias) bias = to_contiguous(*bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (y.numel() > 0) type == ScalarType::Float ? run<float>(x, weight, bias, y) : run<double>(x, weight, bias, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("row_invariant_linear", TORCH_BOX(&row_invariant_linear));
}

}  // namespace eaml::row_invariant_linear
