// row_invariant_linear on tensors: checks, allocation, threads. Other devices have torch's own product.
#include <algorithm>

#include "common/arena.h"
#include "common/check.h"
#include "common/half_arrays.h"
#include "common/tensor.h"
#include "row_invariant_linear/cpu/kernel.h"

namespace eaml::row_invariant_linear {
namespace {

template <class T>
void run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y) {
  static thread_local Arena arena;
  arena.reset();
  Params<T> params{.rows = x.size(0), .inputs = x.size(1), .outputs = weight.size(0)};
  params.half = half_of(x.scalar_type());
  params.x = data<T>(x), params.weight = data<T>(weight), params.bias = bias ? data<T>(*bias) : nullptr;
  params.y = mutable_data<T>(y);
  if constexpr (sizeof(T) == 4)
    if (params.half != Half::kNone) {
      const auto widened = [&](const Tensor& t) {
        float* const to = arena.take<float>(t.numel());
        widen_array(to, t.const_data_ptr(), params.half, t.numel());
        return to;
      };
      params.x = widened(x), params.bias = bias ? widened(*bias) : nullptr, params.y = arena.take<float>(y.numel());
      linear(arena, params);
      return narrow_array(y.mutable_data_ptr(), params.y, params.half, y.numel());
    }
  linear(arena, params);
}

Tensor row_invariant_linear(Tensor x, Tensor weight, OptionalTensor bias) {
  const ScalarType type = x.scalar_type();
  const bool fits = x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.scalar_type() == type &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type));
  EAML_CHECK(fits && is_kernel_dtype(type),
             "row_invariant_linear: x, weight and bias must be (rows, inputs), (outputs, inputs) and (outputs,), all "
             "of one dtype: float32, float64, bfloat16 or float16");
  x = to_contiguous(x), weight = to_contiguous(weight);
  if (bias) bias = to_contiguous(*bias);
  Tensor y = allocate(x, {x.size(0), weight.size(0)});
  if (y.numel() > 0) type == ScalarType::Double ? run<double>(x, weight, bias, y) : run<float>(x, weight, bias, y);
  return y;
}

}  // namespace

template <class T>
void linear(Arena& arena, Params<T> params) {
  constexpr std::int64_t kBlock = 8 * kRows, kGrain = std::int64_t(1) << 16;  // rows of a unit; products of a thread
  const std::int64_t inputs = params.inputs, outputs = params.outputs;
  const auto for_each = [](std::int64_t count, std::int64_t products, auto f) {
    torch::stable::parallel_for(0, count, 1 + kGrain / (1 + products), f);
  };
  if (params.rows <= kFewRows)
    return for_each((outputs + kPanel - 1) / kPanel, kPanel * inputs * params.rows,
                    [&](std::int64_t begin, std::int64_t end) { multiply_in_place(params, begin, end); });
  if constexpr (sizeof(T) == 4)
    if (params.half != Half::kNone) {
      float* const widened = arena.take<float>(inputs * outputs);
      widen_array(widened, params.weight, params.half, inputs * outputs);
      params.weight = widened, params.half = Half::kNone;
    }
  params.packed = arena.take<T>(packed_size(inputs, outputs));
  pack(params);
  for_each((params.rows + kBlock - 1) / kBlock, kBlock * inputs * outputs, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit)
      multiply(params, unit * kBlock, std::min(params.rows, (unit + 1) * kBlock));
  });
}
template void linear(Arena&, Params<float>);
template void linear(Arena&, Params<double>);

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("row_invariant_linear", TORCH_BOX(&row_invariant_linear));
}

}  // namespace eaml::row_invariant_linear
