// The CPU kernel of rms_norm. The order of a row's sums depends on its size alone.
#include "rms_norm/cpu/kernel.h"

#include <cmath>

#include "common/simd.h"

namespace eaml::rms_norm {
namespace {

using std::int64_t;

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

}  // namespace

#define EAML_DEFINE_FOR(TARGET, BYTES, T)                                               \
  TARGET void normalise_version(const Params<T>& params, int64_t first, int64_t last) { \
    normalise_<Vec<T, BYTES / sizeof(T)>>(params, first, last);                         \
  }
#define EAML_DEFINE(TARGET, BYTES)      \
  EAML_DEFINE_FOR(TARGET, BYTES, float) \
  EAML_DEFINE_FOR(TARGET, BYTES, double)
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

// The loader selects a version for callers that see the definitions of all versions.
template <class T>
void normalise(const Params<T>& params, int64_t first, int64_t last) {
  normalise_version(params, first, last);
}
template void normalise(const Params<float>&, int64_t, int64_t);
template void normalise(const Params<double>&, int64_t, int64_t);

}  // namespace eaml::rms_norm
