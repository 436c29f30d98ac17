// rms_norm on tensors: checks, allocation, threads. Torch makes it of six operations, whose calls cost more than the
// arithmetic of a single row.
#include "common/arena.h"
#include "common/check.h"
#include "common/half_arrays.h"
#include "common/tensor.h"
#include "rms_norm/cpu/kernel.h"

namespace eaml::rms_norm {
namespace {

using std::int64_t;

template <class T>
void run(const Tensor& x, const OptionalTensor& weight, double eps, const Tensor& y) {
  static thread_local Arena arena;
  arena.reset();
  const Half half = half_of(x.scalar_type());
  Params<T> p{.size = x.size(1),
              .x = data<T>(x),
              .weight = weight ? data<T>(*weight) : nullptr,
              .eps = T(eps),
              .y = mutable_data<T>(y)};
  if constexpr (sizeof(T) == 4)
    if (half != Half::kNone) {
      const auto widened = [&](const Tensor& t) {
        float* const to = arena.take<float>(t.numel());
        widen_array(to, t.const_data_ptr(), half, t.numel());
        return to;
      };
      p.x = widened(x), p.weight = weight ? widened(*weight) : nullptr, p.y = arena.take<float>(y.numel());
    }
  constexpr int64_t kGrain = int64_t{1} << 15;  // numbers of a thread
  torch::stable::parallel_for(0, x.size(0), 1 + kGrain / p.size,
                              [&](int64_t begin, int64_t end) { normalise(p, begin, end); });
  if constexpr (sizeof(T) == 4)
    if (half != Half::kNone) narrow_array(y.mutable_data_ptr(), p.y, half, y.numel());
}

Tensor rms_norm(Tensor x, OptionalTensor weight, double eps) {
  const ScalarType type = x.scalar_type();
  const bool fits = x.dim() == 2 && (!weight || (weight->is_cpu() && weight->dim() == 1 &&
                                                 weight->size(0) == x.size(1) && weight->scalar_type() == type));
  EAML_CHECK(fits && is_kernel_dtype(type),
             "rms_norm: x and weight must be (rows, size) and (size,), of one dtype: float32, float64, bfloat16 or "
             "float16");
  x = to_contiguous(x);
  if (weight) weight = to_contiguous(*weight);
  Tensor y = allocate(x, {x.size(0), x.size(1)});
  if (y.numel() > 0) type == ScalarType::Double ? run<double>(x, weight, eps, y) : run<float>(x, weight, eps, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace eaml::rms_norm
