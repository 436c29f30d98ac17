// A square of lanes, transposed in registers.
#pragma once

#include <utility>

#include "common/simd.h"

namespace eaml {

// Shuffle indices of transpose_lanes. interleave: elements 0, 2 (kUpper: 1, 3) of each quad of a and b, in turns;
// pair: the lower (upper) halves of each quad of a, then of b; every_other: the even (odd) quads of a, then of b.
template <int W, bool kUpper>
constexpr int interleave(int i) {
  return i / 4 * 4 + i % 4 / 2 + i % 2 * W + 2 * kUpper;
}
template <int W, bool kUpper>
constexpr int pair(int i) {
  return i / 4 * 4 + i % 2 + i % 4 / 2 * W + 2 * kUpper;
}
template <int W, bool kUpper>
constexpr int every_other(int i) {
  return i % (W / 2) / 4 * 8 + i % 4 + i / (W / 2) * W + 4 * kUpper;
}

// to[k][4 g + j] = from[j][4 g + k]: transposes the quads of lanes of four vectors.
template <class V, int... i>
EAML_INLINE void transpose_quads(const V (&from)[4], V (&to)[4], std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i);
  const V low01 = __builtin_shufflevector(from[0], from[1], interleave<W, false>(i)...),
          high01 = __builtin_shufflevector(from[0], from[1], interleave<W, true>(i)...),
          low23 = __builtin_shufflevector(from[2], from[3], interleave<W, false>(i)...),
          high23 = __builtin_shufflevector(from[2], from[3], interleave<W, true>(i)...);
  to[0] = __builtin_shufflevector(low01, low23, pair<W, false>(i)...);
  to[1] = __builtin_shufflevector(low01, low23, pair<W, true>(i)...);
  to[2] = __builtin_shufflevector(high01, high23, pair<W, false>(i)...);
  to[3] = __builtin_shufflevector(high01, high23, pair<W, true>(i)...);
}

// to[lane][row] = from[row][lane], in registers: first within quads of lanes, then the quads.
template <class V, int... i>
EAML_INLINE void transpose_lanes(const V (&from)[sizeof...(i)], V (&to)[sizeof...(i)],
                                 std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i), quads = W / 4;
  V rows[4][quads];  // rows[k][g]: lanes k, 4 + k, 8 + k and so on of the rows 4 g, ..., 4 g + 3
  EAML_UNROLL
  for (int g = 0; g < quads; ++g) {
    const V* const x = from + 4 * g;
    const V given[4] = {x[0], x[1], x[2], x[3]};
    V transposed[4];
    transpose_quads(given, transposed, std::integer_sequence<int, i...>());
    EAML_UNROLL
    for (int k = 0; k < 4; ++k) rows[k][g] = transposed[k];
  }
  EAML_UNROLL
  for (int k = 0; k < 4; ++k) {
    const V(&x)[quads] = rows[k];
    if constexpr (quads == 1) {
      to[k] = x[0];
    } else if constexpr (quads == 2) {
      to[k] = __builtin_shufflevector(x[0], x[1], every_other<W, false>(i)...);
      to[4 + k] = __builtin_shufflevector(x[0], x[1], every_other<W, true>(i)...);
    } else {
      static_assert(quads == 4);
      const V even01 = __builtin_shufflevector(x[0], x[1], every_other<W, false>(i)...),
              odd01 = __builtin_shufflevector(x[0], x[1], every_other<W, true>(i)...),
              even23 = __builtin_shufflevector(x[2], x[3], every_other<W, false>(i)...),
              odd23 = __builtin_shufflevector(x[2], x[3], every_other<W, true>(i)...);
      to[k] = __builtin_shufflevector(even01, even23, every_other<W, false>(i)...);
      to[4 + k] = __builtin_shufflevector(odd01, odd23, every_other<W, false>(i)...);
      to[8 + k] = __builtin_shufflevector(even01, even23, every_other<W, true>(i)...);
      to[12 + k] = __builtin_shufflevector(odd01, odd23, every_other<W, true>(i)...);
    }
  }
}

}  // namespace eaml
