// A call of knn, on every device, on raw pointers.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::knn {

enum class Metric { kSqeuclidean, kCosine, kInnerProduct };

// What panels depend on and what is known of a store's keys: their centre, and over live keys the sums of (key -
// centre) and |key - centre|², their number, and how many slots have changed since the centre was chosen.
EAML_INLINE std::int64_t state_size(std::int64_t features) {
  return 2 * features + 3;
}

// Keys are packed in panels.
constexpr int kPanel = 32;
EAML_INLINE std::int64_t panel_count(std::int64_t size) {
  return (size + kPanel - 1) / kPanel;
}

// Memory m: `size` keys (size, features) with optional valid and bias (size,); `share` consecutive memories use one
// block. Queries (memories, queries, features), row-major like everything here. Keys are of T, or of a half type
// beside T = float. Panels (with the state that they were made with) are optional.
template <class T>
struct Problem {
  const T* queries;
  const void* keys;
  const bool* valid;
  const T* bias;
  const T* panels;
  const double* state;
  std::int64_t keys_share, valid_share, bias_share;
  std::int64_t memories, queries_each, size, features, k;
  Metric metric;
  Half half;
};

// (memories, queries, k) results; with several key blocks one such array per block, blocks outermost.
template <class T>
struct Found {
  T* values;
  std::int64_t* indices;
};

// One memory that keeps its panels: keys (capacity, features) and bias (capacity,) of T or of a half type, live
// (capacity,); panels and state follow from them.
template <class T>
struct Store {
  void *keys, *bias;
  bool* live;
  T* panels;
  double* state;
  std::int64_t capacity, features;
  Metric metric;
  Half half;
};

}  // namespace eaml::knn
