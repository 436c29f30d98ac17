// The CPU kernels of row_invariant_linear: register tiles of rows and outputs, over all inputs.
#include "row_invariant_linear/cpu/kernel.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/simd.h"
#include "common/transpose_lanes.h"

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

// ---- few rows ----
// The time of few rows is that of reading the weight. It is read once and transposed in registers, so that each sum has
// the order of the inputs.

template <Half kHalf, class T>
using StoredAs = std::conditional_t<kHalf == Half::kNone, T, std::uint16_t>;

template <Half kHalf, class T>
EAML_INLINE T weight_at(const StoredAs<kHalf, T>* from) {
  if constexpr (kHalf == Half::kNone)
    return *from;
  else
    return widen<kHalf, T>(std::uint32_t{*from});
}

// A vector of four adjacent words of each of W / 4 rows that are `step` bytes apart.
template <class V, class T = element_t<V>>
EAML_INLINE V load_quads(const char* from, std::int64_t step) {
  using Quad __attribute__((vector_size(4 * sizeof(T)))) = T;
  constexpr int W = Lanes<V>::count;
  Quad x[W / 4];
  EAML_UNROLL
  for (int q = 0; q < W / 4; ++q) std::memcpy(&x[q], from + q * step, sizeof(Quad));
  if constexpr (W == 4) {
    return x[0];
  } else if constexpr (W == 8) {
    return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    static_assert(W == 16);
    return __builtin_shufflevector(__builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7),
                                   __builtin_shufflevector(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7), 0, 1, 2, 3, 4, 5, 6, 7,
                                   8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// to[word][lane] is word `word` < 4 of row `lane`. Rows are `step` bytes apart, one per lane.
template <class V, int... i>
EAML_INLINE void load_transposed(const char* from, std::int64_t step, V (&to)[4],
                                 std::integer_sequence<int, i...> lanes) {
  V rows[4];
  EAML_UNROLL
  for (int k = 0; k < 4; ++k) rows[k] = load_quads<V>(from + k * step, 4 * step);
  transpose_quads(rows, to, lanes);
}

// For kHeight rows from `row` on: the outputs first, first + spread and so on, one per lane of kWidth vectors. Several
// rows or vectors hide the latency of sums in order. The lanes from `stored` on are stored.
template <class V, int kHeight, int kWidth, Half kHalf, class T>
EAML_INLINE void in_place_tile(const Params<T>& p, std::int64_t row, std::int64_t first, std::int64_t spread,
                               int stored) {
  using Stored = StoredAs<kHalf, T>;
  constexpr int kLanes = Lanes<V>::count, kOutputs = kWidth * kLanes;
  constexpr std::int64_t kStep = 4 * sizeof(T) / sizeof(Stored), kLine = 64 / sizeof(Stored);
  constexpr std::int64_t kAhead = 64 / kOutputs * kLine;  // 64 lines are on their way, 4 KiB
  const std::int64_t inputs = p.inputs, step = spread * inputs;
  const Stored* const weight = reinterpret_cast<const Stored*>(p.weight) + first * inputs;
  const T* const x = p.x + row * inputs;
  V sums[kHeight][kWidth];
  alignas(kAlignment) T lanes[kOutputs] = {};
  if (p.bias)
    for (int k = 0; k < kOutputs; ++k) lanes[k] = p.bias[first + k * spread];
  EAML_UNROLL
  for (int v = 0; v < kWidth; ++v) {
    const V start = load<V>(lanes + v * kLanes);
    EAML_UNROLL
    for (int r = 0; r < kHeight; ++r) sums[r][v] = start;
  }
  const auto add = [&](int v, std::int64_t i, V weights) EAML_LAMBDA {
    EAML_UNROLL
    for (int r = 0; r < kHeight; ++r) sums[r][v] += x[r * inputs + i] * weights;
  };

  std::int64_t i = 0;
  if constexpr (kLanes % 4 == 0)
    for (; i + kStep <= inputs; i += kStep) {
      if (i % kLine == 0)
        for (int k = 0; k < kOutputs; ++k) EAML_PREFETCH(weight + k * step + i + kAhead);
      EAML_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        V weights[4];
        load_transposed(reinterpret_cast<const char*>(weight + v * kLanes * step + i), step * sizeof(Stored), weights,
                        std::make_integer_sequence<int, kLanes>());
        EAML_UNROLL
        for (int k = 0; k < 4; ++k) {
          if constexpr (kHalf == Half::kNone) {
            add(v, i + k, weights[k]);
          } else {  // a word holds the weights of two adjacent inputs
            const auto bits = __builtin_bit_cast(unsigned_t<V>, weights[k]);
            add(v, i + 2 * k, widen<kHalf, V>(bits & 0xffffu));
            add(v, i + 2 * k + 1, widen<kHalf, V>(bits >> 16));
          }
        }
      }
    }
  for (; i < inputs; ++i) {
    for (int k = 0; k < kOutputs; ++k) lanes[k] = weight_at<kHalf, T>(weight + k * step + i);
    EAML_UNROLL
    for (int v = 0; v < kWidth; ++v) add(v, i, load<V>(lanes + v * kLanes));
  }
  EAML_UNROLL
  for (int r = 0; r < kHeight; ++r) {
    EAML_UNROLL
    for (int v = 0; v < kWidth; ++v) store(lanes + v * kLanes, sums[r][v]);
    for (int k = stored; k < kOutputs; ++k) p.y[(row + r) * p.outputs + first + k * spread] = lanes[k];
  }
}

// As in_place_tile, of fewer outputs than a vector has lanes.
template <class V, Half kHalf, class T>
EAML_INLINE void narrow_tile(const Params<T>& p, std::int64_t row) {
  const auto* const weight = reinterpret_cast<const StoredAs<kHalf, T>*>(p.weight);
  alignas(kAlignment) T lanes[Lanes<V>::count] = {};
  if (p.bias) std::copy_n(p.bias, p.outputs, lanes);
  V sum = load<V>(lanes);
  for (std::int64_t i = 0; i < p.inputs; ++i) {
    for (std::int64_t k = 0; k < p.outputs; ++k) lanes[k] = weight_at<kHalf, T>(weight + k * p.inputs + i);
    sum += p.x[row * p.inputs + i] * load<V>(lanes);
  }
  store(lanes, sum);
  std::copy_n(lanes, p.outputs, p.y + row * p.outputs);
}

template <class V, int kWidth, Half kHalf, class T>
EAML_INLINE void in_place_rows(const Params<T>& p, std::int64_t output, std::int64_t spread, int stored) {
  std::int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) in_place_tile<V, 4, kWidth, kHalf>(p, row, output, spread, stored);
  if (row + 2 <= p.rows) in_place_tile<V, 2, kWidth, kHalf>(p, row, output, spread, stored), row += 2;
  if (row < p.rows) in_place_tile<V, 1, kWidth, kHalf>(p, row, output, spread, stored);
}

// Each lane of the tiles reads rows that are adjacent in memory, one after another, because the processor's prefetchers
// follow long streams; four to eight at once are the fastest. The lanes are an odd number of rows apart, so that they
// use different sets of the cache.
template <class V, Half kHalf, class T>
EAML_INLINE void in_place_panels(const Params<T>& p, std::int64_t first, std::int64_t last) {
  constexpr int kLanes = Lanes<V>::count, kWidth = kLanes < 8 ? 2 : 1, kOutputs = kWidth * kLanes;
  if (p.outputs < kLanes) {
    for (std::int64_t row = 0; row < p.rows; ++row) narrow_tile<V, kHalf>(p, row);
    return;
  }
  std::int64_t output = first * kPanel;
  const std::int64_t end = std::min(p.outputs, last * kPanel);
  while (output + kOutputs <= end) {
    const std::int64_t tiles = (end - output) / kOutputs, spread = tiles - (tiles + 1) % 2;
    for (std::int64_t t = 0; t < spread; ++t) in_place_rows<V, kWidth, kHalf>(p, output + t, spread, 0);
    output += spread * kOutputs;
  }
  for (; output < end; output += kLanes) {
    const std::int64_t at = std::min(output, p.outputs - kLanes);
    in_place_rows<V, 1, kHalf>(p, at, 1, static_cast<int>(output - at));
  }
}

template <class V, class T>
EAML_INLINE void multiply_in_place_(const Params<T>& p, std::int64_t first, std::int64_t last) {
  if constexpr (sizeof(T) == 4) {
    if (p.half == Half::kBfloat16) return in_place_panels<V, Half::kBfloat16>(p, first, last);
    if (p.half == Half::kFloat16) return in_place_panels<V, Half::kFloat16>(p, first, last);
  }
  in_place_panels<V, Half::kNone>(p, first, last);
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

#define EAML_DEFINE_FOR(TARGET, BYTES, T)                                                        \
  TARGET void multiply_version(const Params<T>& params, std::int64_t first, std::int64_t last) { \
    multiply_<Vec<T, BYTES / sizeof(T)>>(params, first, last);                                   \
  }                                                                                              \
  TARGET void in_place_version(const Params<T>& params, std::int64_t first, std::int64_t last) { \
    multiply_in_place_<Vec<T, BYTES / sizeof(T)>>(params, first, last);                          \
  }
#define EAML_DEFINE(TARGET, BYTES)      \
  EAML_DEFINE_FOR(TARGET, BYTES, float) \
  EAML_DEFINE_FOR(TARGET, BYTES, double)
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

// The loader selects a version for callers that see the definitions of all versions.
template <class T>
void multiply(const Params<T>& params, std::int64_t first, std::int64_t last) {
  multiply_version(params, first, last);
}
template void multiply(const Params<float>&, std::int64_t, std::int64_t);
template void multiply(const Params<double>&, std::int64_t, std::int64_t);
template <class T>
void multiply_in_place(const Params<T>& params, std::int64_t first, std::int64_t last) {
  in_place_version(params, first, last);
}
template void multiply_in_place(const Params<float>&, std::int64_t, std::int64_t);
template void multiply_in_place(const Params<double>&, std::int64_t, std::int64_t);

}  // namespace eaml::row_invariant_linear
