// Parameters of the knn kernels on every device: pointers and sizes.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::knn {

enum class Metric { kSqeuclidean, kCosine, kInnerProduct };

// Numbers in the state of a memory: the centre; over live keys the sums of (key - centre) and |key - centre|² and their
// count; and the number of slots changed since the centre was chosen.
EAML_INLINE std::int64_t state_size(std::int64_t features) {
  return 2 * features + 3;
}

// Keys of a panel.
constexpr int kPanel = 32;
EAML_INLINE std::int64_t panel_count(std::int64_t size) {
  return (size + kPanel - 1) / kPanel;
}

// A search. Each memory has keys (size, features) and optional valid and bias (size,); `*_share` consecutive memories
// use the same ones. Queries are (memories, queries_each, features); all arrays are row-major. Keys are of T, or of
// reduced precision beside T = float. Panels, with their state, are optional.
template <class T>
struct KnnParams {
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

// Results (memories, queries_each, k); with several key blocks (key_blocks, memories, queries_each, k).
template <class T>
struct KnnOutput {
  T* values;
  std::int64_t* indices;
};

// One memory of PackedKeys: keys (capacity, features) and bias (capacity,) of T or of reduced precision, live
// (capacity,), and the panels and state derived from them.
template <class T>
struct PackedKeysView {
  void *keys, *bias;
  bool* live;
  T* panels;
  double* state;
  std::int64_t capacity, features;
  Metric metric;
  Half half;
};

}  // namespace eaml::knn
