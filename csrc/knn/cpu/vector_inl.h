// The vector code of knn, compiled for every instruction set. It is included once, by the file that calls it, because a
// caller that does not see the versions would always call the slowest.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "knn/cpu/rows_inl.h"
#include "knn/cpu/tile_inl.h"

namespace eaml::knn {

#define EAML_DEFINE_FOR(T, TARGET, BYTES)                                                                        \
  TARGET std::uint32_t tile(int rows, const Tile<T>& t) {                                                        \
    return tile_<T, BYTES, false>(rows, t);                                                                      \
  }                                                                                                              \
  TARGET void pack(const T* keys, int count, std::int64_t features, const T* centre, const T* scale, T* panel,   \
                   T* square) {                                                                                  \
    pack_<T, BYTES>(keys, count, features, centre, scale, panel, square);                                        \
  }                                                                                                              \
  TARGET void accumulate(const T* row, T scale, const T* centre, T sign, std::int64_t features, double* total) { \
    accumulate_<T, BYTES>(row, scale, centre, sign, features, total);                                            \
  }                                                                                                              \
  TARGET double offset_square(const T* row, T scale, const T* centre, std::int64_t features) {                   \
    return offset_square_<T, BYTES>(row, scale, centre, features);                                               \
  }                                                                                                              \
  TARGET void difference_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum) {         \
    rows_<T, BYTES, true>(query, keys, count, features, sum, nullptr);                                           \
  }                                                                                                              \
  TARGET void product_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum, T* square) { \
    rows_<T, BYTES, false>(query, keys, count, features, sum, square);                                           \
  }                                                                                                              \
  TARGET bool any_below(const T* scores, T threshold) {                                                          \
    return any_below_(scores, threshold);                                                                        \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double square_distance(const T* a, const T* b, std::int64_t features) {             \
    return exact_sum_<T, BYTES, true>(a, b, features);                                                           \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double product(const T* a, const T* b, std::int64_t features) {                     \
    return exact_sum_<T, BYTES, false>(a, b, features);                                                          \
  }
#define EAML_DEFINE(TARGET, BYTES)                                                                                   \
  EAML_DEFINE_FOR(float, TARGET, BYTES)                                                                              \
  EAML_DEFINE_FOR(double, TARGET, BYTES)                                                                             \
  TARGET std::uint32_t tile_of_pairs(int rows, const Tile<float>& t) {                                               \
    if constexpr (BYTES == 64) return tile_<float, 64, true>(rows, t);                                               \
    return 0;                                                                                                        \
  }                                                                                                                  \
  TARGET void round_panel(const float* panel, std::int64_t features, std::uint32_t* pairs, float* rounding_square) { \
    round_(panel, features, pairs, rounding_square);                                                                 \
  }                                                                                                                  \
  TARGET void convert_bfloat16(const std::uint16_t* from, std::int64_t count, float* to) {                           \
    convert_row_<Half::kBfloat16, BYTES>(from, count, to);                                                           \
  }                                                                                                                  \
  TARGET void convert_float16(const std::uint16_t* from, std::int64_t count, float* to) {                            \
    convert_row_<Half::kFloat16, BYTES>(from, count, to);                                                            \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

}  // namespace eaml::knn
