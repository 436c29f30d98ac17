// Interface of the CPU kernels of knn. The search has two stages. Fast scores in the keys' precision, with a proven
// error bound, select a list of candidates per query. Candidates are evaluated in double and ordered by (value, index).
#pragma once

#include <cstdint>

#include "knn/params.h"

namespace eaml::knn {

// A panel of keys for the fast scores, in rows of kPanel numbers: start and width of the bounds, one row per feature of
// the centred keys, and the norms. Rows are stored in the order in which they are read, because memory may limit the
// speed. On processors with products of bfloat16 numbers, a panel of floats holds pairs of them: a row per two
// features. Its last row holds the norms beside the norms of the rounding errors.
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
Plan plan(const KnnParams<T>& params, std::int64_t threads);

template <class T>
void search(const KnnParams<T>& params, const Plan& plan, std::int64_t first_unit, std::int64_t last_unit,
            KnnOutput<T> output);

// Merges the results of key blocks, (key_blocks, memories, queries_each, k), into the best k.
template <class T>
void merge(const KnnParams<T>& params, const Plan& plan, KnnOutput<T> blocks, KnnOutput<T> output);

// Writes to a memory, in order: slots: (count,), keys: (count, features), bias: (count,) or null for 0. Without keys
// the slots are erased. The amortised time is proportional to count.
template <class T>
void write(const PackedKeysView<T>& view, const std::int64_t* slots, std::int64_t count, const void* keys,
           const void* bias);

// Computes panels and state from keys, bias and live.
template <class T>
void repack(const PackedKeysView<T>& view);

}  // namespace eaml::knn
