// rms_norm on the CPU: y = x / sqrt(mean(x^2) + eps) weight, for each row. Torch makes it of six operations, whose
// calls cost more than the arithmetic of a single row.
#include <cmath>

#include "common/arena.h"
#include "common/check.h"
#include "common/half_arrays.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace eaml::rms_norm {
namespace {

using std::int64_t;

template <class T>
struct Params {
  int64_t size;
  const T *x, *weight;  // (rows, size); (size,), null: ones
  T eps, *y;
};

template <class V, class T>
EAML_INLINE void normalise_(const Params<T>& p, int64_t first, int64_t last) {
  constexpr int64_t W = Lanes<V>::count;
  constexpr int kSums = 4;  // to hide the latency of sums
  for (int64_t row = first; row < last; ++row) {
    const T* const x = p.x + row * p.size;
    T* const y = p.y + row * p.size;
    V sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * W <= p.size; i += kSums * W) {
      EAML_UNROLL
      for (int k = 0; k < kSums; ++k) {
        const V v = load<V>(x + i + k * W);
        sums[k] += v * v;
      }
    }
    const V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    T sum = 0;
    for (int64_t lane = 0; lane < W; ++lane) sum += total[lane];
    for (; i < p.size; ++i) sum += x[i] * x[i];
    const T scale = 1 / std::sqrt(sum / T(p.size) + p.eps);
    i = 0;
    for (; i + W <= p.size; i += W) {
      const V normalised = load<V>(x + i) * scale;
      store(y + i, p.weight ? normalised * load<V>(p.weight + i) : normalised);
    }
    for (; i < p.size; ++i) y[i] = x[i] * scale * (p.weight ? p.weight[i] : T(1));
  }
}

#define EAML_DEFINE_FOR(TARGET, BYTES, T)                                       \
  TARGET void normalise(const Params<T>& params, int64_t first, int64_t last) { \
    normalise_<Vec<T, BYTES / sizeof(T)>>(params, first, last);                 \
  }
#define EAML_DEFINE(TARGET, BYTES)      \
  EAML_DEFINE_FOR(TARGET, BYTES, float) \
  EAML_DEFINE_FOR(TARGET, BYTES, double)
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

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
  const bool fits = x.dim() == 2 &&
                    (!weight || (weight->dim() == 1 && weight->size(0) == x.size(1) && weight->scalar_type() == type));
  EAML_CHECK(fits && is_kernel_dtype(type),
             "rms_norm: x and weight must be (rows, size) and (size,), of one dtype: float32, float64, bfloat16 or "
             "float16");
  x = to_contiguous(x);
  if (weight) weight = to_contiguous(*weight);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (y.numel() > 0) type == ScalarType::Double ? run<double>(x, weight, eps, y) : run<float>(x, weight, eps, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace eaml::rms_norm
