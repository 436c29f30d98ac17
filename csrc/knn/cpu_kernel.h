// The CPU half of knn on raw pointers. Exact search in two stages: a fast score in the keys' own precision, with a
// proven error bound, leaves a short list per query; its members are evaluated in double and ordered by (value, index).
#pragma once

#include <cstdint>

namespace eaml::knn {

enum class Metric { kSqeuclidean, kCosine, kInnerProduct };

// Memory m: `size` keys (size, features) with optional valid and bias (size,); `share` consecutive memories use one
// block. Queries (memories, queries, features), row-major like everything here.
template <class T>
struct Problem {
  const T* queries;
  const T* keys;
  const bool* valid;
  const T* bias;
  std::int64_t keys_share, valid_share, bias_share;
  std::int64_t memories, queries_each, size, features, k;
  Metric metric;
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

}  // namespace eaml::knn
