// Interface of the CPU kernels of knn. The search has two stages: fast scores in the keys' precision, with a proven
// error bound, leave a list of candidates per query; these are evaluated in double and ordered by (value, index).
#pragma once

#include <cstdint>

#include "knn/params.h"

namespace eaml::knn {

// A panel of keys for the fast scores, in rows of kPanel numbers: start and width of the bounds, one row per feature of
// the centred keys, and the norms. Rows are in the order in which they are read, which matters where memory is the
// limit. Where the machine multiplies bfloat16 numbers, a panel of floats has pairs of these: a row per two features,
// and in the last row the norms beside the norms of the rounding errors.
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

// The units of a search: memory × query block × key block, each searched independently.
struct Plan {
  std::int64_t query_block, query_blocks, key_block, key_blocks, units, grain;
};

template <class T>
Plan plan(const KnnParams<T>& problem, std::int64_t threads);

template <class T>
void search(const KnnParams<T>& problem, const Plan& plan, std::int64_t first_unit, std::int64_t last_unit,
            KnnOutput<T> found);

// Merges the results of several key blocks into the best k.
template <class T>
void merge(const KnnParams<T>& problem, const Plan& plan, KnnOutput<T> blocks, KnnOutput<T> found);

// Writes `count` keys (count, features) and their bias (null: 0) to slots, in order; without keys the slots are erased.
// The amortised time is proportional to count.
template <class T>
void write(const PackedKeysView<T>& store, const std::int64_t* slots, std::int64_t count, const void* keys,
           const void* bias);

// Computes panels and state from the keys.
template <class T>
void repack(const PackedKeysView<T>& store);

}  // namespace eaml::knn
