// The CPU half of knn on raw pointers. Exact search in two stages: a fast score in the keys' own precision, with a
// proven error bound, leaves a short list per query; its members are evaluated in double and ordered by (value, index).
#pragma once

#include <cstdint>

#include "common/half.h"

namespace eaml::knn {

enum class Metric { kSqeuclidean, kCosine, kInnerProduct };

// What the fast scores read: keys in panels of rows [kPanel]. First the start and the width of their bounds, then the
// centred keys, a row per feature, last their norms. In the order in which they are read: it counts where a search is
// as fast as memory. Where the machine multiplies bfloat16 numbers, T = float keeps pairs of these instead: a row per
// two features, and the last one the norms beside the norms of what rounding took.
constexpr int kPanel = 32;
bool has_pairs(bool is_float);
inline std::int64_t key_rows(std::int64_t features, bool pairs) {
  return pairs ? (features + 1) / 2 : features;
}
inline std::int64_t panel_rows(std::int64_t features, bool is_float) {
  return key_rows(features, has_pairs(is_float)) + 3;
}
template <class T>
struct Panel {
  T *start, *width, *keys, *norms;
  Panel(T* at, std::int64_t features)
      : start(at),
        width(at + kPanel),
        keys(at + 2 * kPanel),
        norms(keys + key_rows(features, has_pairs(sizeof(T) == 4)) * kPanel) {}
};
inline std::int64_t panel_count(std::int64_t size) {
  return (size + kPanel - 1) / kPanel;
}
template <class T>
std::int64_t panel_size(std::int64_t features) {
  return panel_rows(features, sizeof(T) == 4) * kPanel;
}

// What panels depend on and what is known of a store's keys: their centre, and over live keys the sums of (key -
// centre) and |key - centre|², their number, and how many slots have changed since the centre was chosen.
inline std::int64_t state_size(std::int64_t features) {
  return 2 * features + 3;
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

// A call is cut into units, memory × query block × key block, each searched alone.
struct Plan {
  std::int64_t query_block, query_blocks, key_block, key_blocks, units, grain;
};

template <class T>
Plan plan(const Problem<T>& problem, std::int64_t threads);

template <class T>
void search(const Problem<T>& problem, const Plan& plan, std::int64_t first_unit, std::int64_t last_unit,
            Found<T> found);

// The best k of the results of several key blocks.
template <class T>
void merge(const Problem<T>& problem, const Plan& plan, Found<T> blocks, Found<T> found);

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

// Writes `count` keys (count, features) and their bias (none: 0) to slots, one after the other; without keys the slots
// become dead. Takes time proportional to count, over many calls.
template <class T>
void write(const Store<T>& store, const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias);

// Derives panels and state anew.
template <class T>
void repack(const Store<T>& store);

}  // namespace eaml::knn
