// The CPU half of knn on raw pointers. Exact search in two stages: a fast score in the keys' own precision, with a
// proven error bound, leaves a short list per query; its members are evaluated in double and ordered by (value, index).
#pragma once

#include <cstdint>

#include "knn/params.h"

namespace eaml::knn {

// What the fast scores read: keys in panels of rows [kPanel]. First the start and the width of their bounds, then the
// centred keys, a row per feature, last their norms. In the order in which they are read: it counts where a search is
// as fast as memory. Where the machine multiplies bfloat16 numbers, T = float keeps pairs of these instead: a row per
// two features, and the last one the norms beside the norms of what rounding took.
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
template <class T>
std::int64_t panel_size(std::int64_t features) {
  return panel_rows(features, sizeof(T) == 4) * kPanel;
}

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

// Writes `count` keys (count, features) and their bias (none: 0) to slots, one after the other; without keys the slots
// become dead. Takes time proportional to count, over many calls.
template <class T>
void write(const Store<T>& store, const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias);

// Derives panels and state anew.
template <class T>
void repack(const Store<T>& store);

}  // namespace eaml::knn
