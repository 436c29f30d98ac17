// The CPU kernel of row_invariant_linear: register tiles of rows and outputs, over all inputs.
#include "row_invariant_linear/cpu/kernel.h"

#include <algorithm>

#include "common/simd.h"

namespace eaml::row_invariant_linear {
namespace {

// The outputs of kHeight rows from `row` on and of kWidth vectors from number `first` on. The order of each sum is that
// of the inputs, whatever the size of the tile. Vectors beyond the last output compute zeros, which are not stored.
template <class V, int kHeight, int kWidth, class T>
EAML_INLINE void tile(const Params<T>& p, std::int64_t row, std::int64_t first) {
  constexpr std::int64_t kLanes = Lanes<V>::count;
  const T* weights[kWidth];
  V sums[kHeight][kWidth];
  EAML_UNROLL
  for (int v = 0; v < kWidth; ++v) {
    const std::int64_t output = (first + v) * kLanes;
    weights[v] = p.packed + output / kPanel * kPanel * (1 + p.inputs) + output % kPanel;
    EAML_UNROLL
    for (int r = 0; r < kHeight; ++r) sums[r][v] = load<V>(weights[v]);
  }
  const T* x = p.x + row * p.inputs;
  for (std::int64_t i = 0; i < p.inputs; ++i) {
    EAML_UNROLL
    for (int v = 0; v < kWidth; ++v) {
      const V weight = load<V>(weights[v] + (1 + i) * kPanel);
      EAML_UNROLL
      for (int r = 0; r < kHeight; ++r) sums[r][v] += x[r * p.inputs + i] * weight;
    }
  }
  EAML_UNROLL
  for (int v = 0; v < kWidth; ++v) {
    const std::int64_t output = (first + v) * kLanes, count = std::min(kLanes, p.outputs - output);
    EAML_UNROLL
    for (int r = 0; r < kHeight; ++r) {
      T* const to = p.y + (row + r) * p.outputs + output;
      if (count == kLanes)
        store(to, sums[r][v]);
      else
        for (std::int64_t lane = 0; lane < count; ++lane) to[lane] = sums[r][v][lane];
    }
  }
}

template <class V, int kWidth, class T>
EAML_INLINE void column(const Params<T>& p, std::int64_t row, std::int64_t last, std::int64_t first) {
  static_assert(kRows == 6);
  for (; row + kRows <= last; row += kRows) tile<V, kRows, kWidth>(p, row, first);
  switch (last - row) {
    case 5:
      return tile<V, 5, kWidth>(p, row, first);
    case 4:
      return tile<V, 4, kWidth>(p, row, first);
    case 3:
      return tile<V, 3, kWidth>(p, row, first);
    case 2:
      return tile<V, 2, kWidth>(p, row, first);
    case 1:
      return tile<V, 1, kWidth>(p, row, first);
  }
}

// AVX-512 has 32 registers, the other sets have 16.
template <class V, class T>
EAML_INLINE void multiply_(const Params<T>& p, std::int64_t row, std::int64_t last) {
  constexpr std::int64_t kLanes = Lanes<V>::count, kWidth = sizeof(V) == 64 ? 4 : 2;
  const std::int64_t vectors = (p.outputs + kLanes - 1) / kLanes;
  std::int64_t v = 0;
  for (; v + kWidth <= vectors; v += kWidth) column<V, kWidth>(p, row, last, v);
  if constexpr (kWidth == 4)
    if (v + 2 <= vectors) column<V, 2>(p, row, last, v), v += 2;
  if (v < vectors) column<V, 1>(p, row, last, v);
}

}  // namespace

template <class T>
void pack(const Params<T>& p) {
  for (std::int64_t output = 0; output < p.outputs; output += kPanel) {
    T* const to = p.packed + output * (1 + p.inputs);
    const std::int64_t count = std::min(kPanel, p.outputs - output);
    if (count < kPanel) std::fill_n(to, kPanel * (1 + p.inputs), T(0));
    if (p.bias)
      std::copy_n(p.bias + output, count, to);
    else
      std::fill_n(to, count, T(0));
    transpose(to + kPanel, kPanel, p.weight + output * p.inputs, p.inputs, count, p.inputs);
  }
}
template void pack(const Params<float>&);
template void pack(const Params<double>&);

#define EAML_DEFINE(TARGET, BYTES)                                                                    \
  TARGET void multiply_version(const Params<float>& params, std::int64_t first, std::int64_t last) {  \
    multiply_<Vec<float, BYTES / 4>>(params, first, last);                                            \
  }                                                                                                   \
  TARGET void multiply_version(const Params<double>& params, std::int64_t first, std::int64_t last) { \
    multiply_<Vec<double, BYTES / 8>>(params, first, last);                                           \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE

// The loader selects a version for callers that see the definitions of all versions.
template <class T>
void multiply(const Params<T>& params, std::int64_t first, std::int64_t last) {
  multiply_version(params, first, last);
}
template void multiply(const Params<float>&, std::int64_t, std::int64_t);
template void multiply(const Params<double>&, std::int64_t, std::int64_t);

}  // namespace eaml::row_invariant_linear
