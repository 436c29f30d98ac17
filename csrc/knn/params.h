// Parameters of the knn kernels on every device: pointers and sizes.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml::knn {

enum class Metric { kSqeuclidean, kCosine, kInnerProduct };

// Numbers in the state of a memory: the centre, then over live keys the sums of key - centre and of |key - centre|²,
// and their count. The last is the number of slots that changed since the centre was chosen.
EAML_INLINE std::int64_t state_size(std::int64_t features) {
  return 2 * features + 3;
}

// Keys of a panel.
constexpr int kPanel = 32;
EAML_INLINE std::int64_t panel_count(std::int64_t size) {
  return (size + kPanel - 1) / kPanel;
}

// A search. All arrays are row-major. Keys are numbers of T or, if T is float, of the reduced precision `half`.
template <class T>
struct KnnParams {
  const T* queries;                                  // (memories, queries_each, features)
  const void* keys;                                  // (memories / keys_share, size, features)
  const bool* valid;                                 // (memories / valid_share, size) or null: all are valid
  const T* bias;                                     // (memories / bias_share, size) or null: 0
  const T* panels;                                   // (memories / keys_share, panels of the device) or null
  const double* state;                               // (memories / keys_share, state_size) or null
  std::int64_t keys_share, valid_share, bias_share;  // consecutive memories with the same keys, valid and bias
  std::int64_t memories, queries_each, size, features, k;
  Metric metric;
  Half half;
};

// Results, also of key blocks: then (key_blocks, memories, queries_each, k).
template <class T>
struct KnnOutput {
  T* values;              // (memories, queries_each, k)
  std::int64_t* indices;  // (memories, queries_each, k)
};

// One memory of PackedKeys. Panels and state are computed from keys, bias and live.
template <class T>
struct PackedKeysView {
  void* keys;     // (capacity, features), of T or reduced precision
  void* bias;     // (capacity,), of the same dtype
  bool* live;     // (capacity,)
  T* panels;      // the panels of the device
  double* state;  // (state_size,)
  std::int64_t capacity, features;
  Metric metric;
  Half half;
};

}  // namespace eaml::knn
