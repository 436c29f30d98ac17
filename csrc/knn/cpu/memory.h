// One memory: rows of keys, exact scores, and the order of results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "knn/cpu/vector_inl.h"
#include "knn/params.h"

namespace eaml::knn {
namespace {

// A key and its score, a squared distance less bias or a negated similarity: smaller is better.
template <class T>
struct Ranked {
  T score;
  std::int64_t index;
};

template <class T>
bool operator<(const Ranked<T>& a, const Ranked<T>& b) {
  if (a.score < b.score) return true;
  if (b.score < a.score) return false;
  const bool a_nan = a.score != a.score, b_nan = b.score != b.score;
  return a_nan != b_nan ? b_nan : a.index < b.index;
}

// Rows of numbers of T or of reduced precision, which are converted to T when read.
template <class T>
struct Rows {
  const void* data;
  std::int64_t features;
  Half half;

  const std::byte* address(std::int64_t row) const {
    return static_cast<const std::byte*>(data) + row * features * (half == Half::kNone ? sizeof(T) : 2);
  }
  // Returns `count` rows in place, or converted to T in `scratch`.
  const T* read(std::int64_t row, std::int64_t count, std::vector<T>& scratch) const {
    if constexpr (sizeof(T) == 4) {
      if (half != Half::kNone) {
        scratch.resize(count * features);
        const auto* from = reinterpret_cast<const std::uint16_t*>(address(row));
        if (half == Half::kBfloat16)
          convert_bfloat16(from, count * features, scratch.data());
        else
          convert_float16(from, count * features, scratch.data());
        return scratch.data();
      }
    }
    return reinterpret_cast<const T*>(address(row));
  }
  void prefetch(std::int64_t row) const {
    const std::byte* from = address(row);
    for (const std::byte* end = address(row + 1); from < end; from += 64) __builtin_prefetch(from);
  }
};

// One memory and its exact scores.
template <class T>
struct Memory {
  Rows<T> keys;
  const bool* valid;
  const T* bias;
  Metric metric;

  Memory(const KnnParams<T>& p, std::int64_t memory)
      : keys{p.keys, p.features, p.half},
        valid(p.valid ? p.valid + memory / p.valid_share * p.size : nullptr),
        bias(p.bias ? p.bias + memory / p.bias_share * p.size : nullptr),
        metric(p.metric) {
    keys.data = keys.address(memory / p.keys_share * p.size);
  }

  bool live(std::int64_t slot) const { return !valid || valid[slot]; }

  T score(const T* query, double query_norm, std::int64_t slot, std::vector<T>& scratch) const {
    const double weight = bias ? bias[slot] : 0;
    const T* key = keys.read(slot, 1, scratch);
    if (metric == Metric::kSqeuclidean) return T(square_distance(query, key, keys.features) - weight);
    double value = product(query, key, keys.features);
    if (metric == Metric::kCosine) {
      const double norm = query_norm * std::sqrt(product(key, key, keys.features));
      value = norm == 0 ? 0 : value / norm;
    }
    return T(-(value + weight));
  }
};

// Writes the best k of `ranked`, and reorders it.
template <class T>
void write_best(std::vector<Ranked<T>>& ranked, std::int64_t k, Metric metric, T* values, std::int64_t* indices) {
  const T sign = metric == Metric::kSqeuclidean ? T(1) : T(-1);
  const std::int64_t count = std::min<std::int64_t>(k, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end());
  for (std::int64_t j = 0; j < count; ++j) values[j] = sign * ranked[j].score, indices[j] = ranked[j].index;
  std::fill(values + count, values + k, sign * std::numeric_limits<T>::infinity());
  std::fill(indices + count, indices + k, std::int64_t(-1));
}

}  // namespace
}  // namespace eaml::knn
