// Packs keys into panels for tensor cores: centred or normalised, in bfloat16, with the bounds of their errors.
#pragma once

#include "knn/cuda/exact.cuh"
#include "knn/error_bounds.h"

namespace eaml::knn {
namespace {

using TensorCoreBound = ErrorBound<float, kTensorCoreRoundings>;

template <class V>
EAML_DEVICE V sum_of_warp(V x) {
  EAML_UNROLL
  for (int mask = 1; mask < cuda::kWarp; mask *= 2) x += cuda::shuffle_xor(x, mask);
  return x;
}

// Rows of keys, read as float.
struct KeyRows {
  const char* data;
  int64_t features;
  Half half;
  EAML_MEMBER const void* row(int64_t i) const { return data + i * features * (half == Half::kNone ? 4 : 2); }
  EAML_MEMBER float get(int64_t i, int64_t feature) const { return read_number<float>(row(i), feature, half); }
  // |x|² of a row, computed by a warp.
  EAML_MEMBER double square(int64_t i) const {
    double sum = 0;
    for (int64_t f = cuda::thread() % cuda::kWarp; f < features; f += cuda::kWarp) {
      const double x = get(i, f);
      sum += x * x;
    }
    return sum_of_warp(sum);
  }
};

// Packed keys in panels or in the workspace of a call. Strides are in elements: of a block of keys or a set of bounds,
// and of a panel. A block of keys can have several sets of bounds, one for each bias.
struct Packed {
  uint16_t* keys;        // (blocks, panels, kPanel, depth)
  uint32_t* norms;       // (blocks, panels, kPanel)
  float *start, *width;  // (sets, panels, kPanel)
  int64_t keys_stride, keys_panel, norms_stride, norms_panel, bounds_stride, bounds_panel;

  EAML_MEMBER uint16_t* key(int64_t block, int64_t slot, int64_t depth) const {
    return keys + block * keys_stride + slot / kPanel * keys_panel + slot % kPanel * depth;
  }
  EAML_MEMBER uint32_t* norm(int64_t block, int64_t slot) const {
    return norms + block * norms_stride + slot / kPanel * norms_panel + slot % kPanel;
  }
  EAML_MEMBER int64_t bounds_at(int64_t set, int64_t slot) const {
    return set * bounds_stride + slot / kPanel * bounds_panel + slot % kPanel;
  }
};

// A view of the panels of consecutive memories.
EAML_INLINE Packed panels_at(const void* panels, int64_t size, int64_t features) {
  const int64_t depth = depth_of(features), words = panel_words(features), all = words * panel_count(size);
  uint32_t* const base = static_cast<uint32_t*>(const_cast<void*>(panels));
  Packed p{};
  p.keys = reinterpret_cast<uint16_t*>(base), p.norms = base + kPanel * (depth / 2);
  p.start = reinterpret_cast<float*>(p.norms + kPanel), p.width = p.start + kPanel;
  p.keys_panel = 2 * words, p.norms_panel = p.bounds_panel = words;
  p.keys_stride = 2 * all, p.norms_stride = p.bounds_stride = all;
  return p;
}

// A warp packs the rows and the norms of some keys. `square` becomes |x|², or NaN if no bound holds. Negative slots are
// skipped.
template <class C, int kKeys>
EAML_DEVICE void pack_keys(float (&square)[kKeys], const KeyRows& keys, const int64_t (&slots)[kKeys],
                           uint16_t* const (&rows)[kKeys], uint32_t* const (&norms)[kKeys], const C* centre,
                           Metric metric, const TensorCoreBound& bound, int64_t depth) {
  const int lane = cuda::thread() % cuda::kWarp;
  float scale[kKeys], rounding_square[kKeys] = {};
  int64_t from[kKeys];
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    from[k] = slots[k] < 0 ? slots[0] : slots[k], square[k] = 0;
    scale[k] = metric == Metric::kCosine ? inverse_norm<float>(keys.square(from[k])) : 1.0f;
  }
  EAML_UNROLL_BY(4)
  for (int64_t i = lane; i < keys.features; i += cuda::kWarp) {
    const float middle = float(centre[i]);
    float x[kKeys];
    EAML_UNROLL
    for (int k = 0; k < kKeys; ++k) x[k] = keys.get(from[k], i);
    EAML_UNROLL
    for (int k = 0; k < kKeys; ++k) {
      x[k] = x[k] * scale[k] - middle;
      const uint32_t bits = to_bfloat16(x[k]);
      const float rest = x[k] - low(bits);
      square[k] += x[k] * x[k], rounding_square[k] += rest * rest;
      if (slots[k] >= 0) rows[k][i] = static_cast<uint16_t>(bits);
    }
  }
  const float g = float(bound.key), underflow = float(bound.underflow);
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    square[k] = sum_of_warp(square[k]), rounding_square[k] = sum_of_warp(rounding_square[k]);
    if (slots[k] < 0) continue;
    const float norm = norm_bound(square[k], g, underflow), rounding = norm_bound(rounding_square[k], g, underflow);
    const bool fits = norm <= Limits<float>::kMaxNorm;
    const uint32_t pair = fits ? key_pair(norm, rounding) : 0;
    if (!fits) {
      square[k] = kNaN<float>;
      for (int64_t i = lane; i < keys.features; i += cuda::kWarp) rows[k][i] = 0;
    }
    for (int64_t i = keys.features + lane; i < depth; i += cuda::kWarp) {
      const int64_t column = i - keys.features;
      rows[k][i] = static_cast<uint16_t>(column == 0 ? pair & 0xffffu : column == 1 ? pair >> 16 : 0);
    }
    if (lane == 0) *norms[k] = pair;
  }
}
template <class C>
EAML_DEVICE float pack_key(const KeyRows& keys, int64_t slot, const C* centre, Metric metric,
                           const TensorCoreBound& bound, int64_t depth, uint16_t* row, uint32_t* norms) {
  float square[1];
  const int64_t slots[1] = {slot};
  uint16_t* const rows[1] = {row};
  uint32_t* const all_norms[1] = {norms};
  pack_keys(square, keys, slots, rows, all_norms, centre, metric, bound, depth);
  return square[0];
}

// Stores the start and the width of a key's bounds; `square` is NaN if no bound holds.
EAML_DEVICE void set_bounds(float square, float bias, Metric metric, const TensorCoreBound& bound, float* start,
                            float* width) {
  const bool sqeuclidean = metric == Metric::kSqeuclidean;
  const KeyBounds<float> bounds = key_bounds(square, bias, square == square, sqeuclidean, float(bound.key));
  *start = bounds.start;
  *width = bounds.width;
}

// The bounds of a packed query. `fits` is false if its numbers are too large for every bound.
struct QueryBounds {
  QueryPair pair;
  float margin;
  bool fits;
};

// A warp packs a query: calls set(column, bits) for all columns of the depth. Numbers are centred or normalised, and
// negated. The last columns hold the query's pair.
template <class Centre, class Set>
EAML_DEVICE QueryBounds pack_query(const KeyRows& queries, int64_t from, Metric metric, int64_t depth, Centre centre_of,
                                   Set set) {
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t features = queries.features;
  const bool distance = metric == Metric::kSqeuclidean, cosine = metric == Metric::kCosine;
  const float factor = cosine ? inverse_norm<float>(queries.square(from)) : 1.0f;
  double square = 0, rounding_square = 0, centre_square = 0;
  for (int64_t i = lane; i < features; i += cuda::kWarp) {
    const float centre = centre_of(i), given = queries.get(from, i), x = distance ? given - centre : given * factor;
    const uint32_t bits = to_bfloat16(-x);
    const double rest = double(-x) - double(low(bits));
    square += double(x) * double(x), rounding_square += rest * rest, centre_square += double(centre) * double(centre);
    set(i, static_cast<uint16_t>(bits));
  }
  square = sum_of_warp(square), rounding_square = sum_of_warp(rounding_square),
  centre_square = sum_of_warp(centre_square);
  const TensorCoreBound bound(features);
  const double norm = std::sqrt(square);
  const bool fits = bound.holds() && norm <= Limits<float>::kMaxNorm;
  const QueryPair pair = fits ? query_pair(norm, rounding_square, bound.key) : QueryPair{0, 0};
  if (!fits)
    for (int64_t i = lane; i < features; i += cuda::kWarp) set(i, uint16_t(0));
  for (int64_t i = features + lane; i < depth; i += cuda::kWarp) {
    const uint32_t bits = i == features ? pair.slope : i == features + 1 ? pair.norm : 0;
    set(i, static_cast<uint16_t>(bits == 0 ? 0 : bits | 0x8000u));
  }
  return {pair, margin_of(bound, norm, centre_square, metric), fits};
}

constexpr int kSampledKeys = 32;  // keys whose mean is a centre

// A block computes the centre of a block of keys: the mean of a few keys. Every finite centre gives exact results; a
// centre near the mean of all keys keeps error bounds small. Calls set(feature, mean).
template <class Set>
EAML_DEVICE void find_centre(const KeyRows& keys, int64_t count, const bool* valid, Metric metric,
                             const Shared<float>& scales, Set set) {
  const int64_t step = count > kSampledKeys ? count / kSampledKeys : 1;
  const int samples = static_cast<int>(count < kSampledKeys ? count : kSampledKeys);
  for (int s = cuda::thread() / cuda::kWarp; s < samples; s += kWarps) {
    float scale = valid == nullptr || valid[s * step] ? 1.0f : kNaN<float>;
    if (metric == Metric::kCosine) scale *= inverse_norm<float>(keys.square(s * step));
    if (cuda::thread() % cuda::kWarp == 0) scales.set(s, scale);
  }
  cuda::sync_block();
  for (int64_t i = cuda::thread(); i < keys.features; i += kThreads) {
    double sum = 0;
    int used = 0;
    EAML_UNROLL_BY(8)
    for (int k = 0; k < samples; ++k) {
      const double x = keys.get(k * step, i);  // read before its scale, so that all loads are in flight together
      const float scale = scales.get(k);
      sum += scale == scale ? double(scale) * x : 0, used += scale == scale;
    }
    const float mean = float(sum / (used > 0 ? used : 1));
    set(i, std::abs(mean) <= Limits<float>::kMaxNorm ? mean : 0.0f);
  }
}

}  // namespace
}  // namespace eaml::knn
