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

// A warp packs the row and the norms of a key. Returns |x|², or NaN if no bound holds.
template <class C>
EAML_DEVICE float pack_key(const KeyRows& keys, int64_t slot, const C* centre, Metric metric,
                           const TensorCoreBound& bound, int64_t depth, uint16_t* row, uint32_t* norms) {
  const int lane = cuda::thread() % cuda::kWarp;
  const float scale = metric == Metric::kCosine ? inverse_norm<float>(keys.square(slot)) : 1.0f;
  float square = 0, rounding_square = 0;
  EAML_UNROLL_BY(4)
  for (int64_t i = lane; i < keys.features; i += cuda::kWarp) {
    const float x = keys.get(slot, i) * scale - float(centre[i]);
    const uint32_t bits = to_bfloat16(x);
    const float rest = x - low(bits);
    square += x * x, rounding_square += rest * rest;
    row[i] = static_cast<uint16_t>(bits);
  }
  const float g = float(bound.key), underflow = float(bound.underflow);
  square = sum_of_warp(square), rounding_square = sum_of_warp(rounding_square);
  const float norm = norm_bound(square, g, underflow), rounding = norm_bound(rounding_square, g, underflow);
  const bool fits = norm <= Limits<float>::kMaxNorm;
  const uint32_t pair = fits ? key_pair(norm, rounding) : 0;
  if (!fits)
    for (int64_t i = lane; i < keys.features; i += cuda::kWarp) row[i] = 0;
  for (int64_t i = keys.features + lane; i < depth; i += cuda::kWarp) {
    const int64_t column = i - keys.features;
    row[i] = static_cast<uint16_t>(column == 0 ? pair & 0xffffu : column == 1 ? pair >> 16 : 0);
  }
  if (lane == 0) *norms = pair;
  return fits ? square : kNaN<float>;
}

// ---- rows of 16 keys on a warp: lanes 4 g ... 4 g + 3 read rows g and g + 8, eight adjacent features each ----

constexpr int kRowKeys = 16, kColumns = 32;  // keys of a warp; features of a row that four lanes read

// Where kernels read keys: packed, in rows of floats for 16-byte accesses of eight features, or in any other rows.
struct Panels {};
struct AlignedRows {};
struct Rows {};

// Returns whether keys are AlignedRows.
inline bool has_aligned_rows(const KnnParams<float>& p) {
  return p.half == Half::kNone && p.features % 8 == 0 && reinterpret_cast<std::uintptr_t>(p.keys) % 16 == 0;
}

// Reads features i ... i + 7 of a row, 0 beyond its end.
template <class Source>
EAML_DEVICE void read_eight(float (&to)[8], const void* row, int64_t i, int64_t features, Half half) {
  if constexpr (std::is_same_v<Source, AlignedRows>) {
    if (i < features) return cuda::load_row(to, static_cast<const float*>(row) + i);
    EAML_UNROLL
    for (int j = 0; j < 8; ++j) to[j] = 0;
  } else {
    EAML_UNROLL
    for (int j = 0; j < 8; ++j) to[j] = i + j < features ? read_number<float>(row, i + j, half) : 0.0f;
  }
}

// The sum over the four lanes of a row.
template <class V>
EAML_DEVICE V sum_of_row(V x) {
  x += cuda::shuffle_xor(x, 1);
  return x + cuda::shuffle_xor(x, 2);
}

// The nearest bfloat16 numbers; adds the squares of the differences to `square`. Differences are exact.
EAML_DEVICE uint32_t round_pair(float& square, float first, float second) {
  const uint32_t pair = cuda::narrow_pair<Half::kBfloat16>(first, second);
  const float rest[2] = {first - low(pair), second - high(pair)};
  square += rest[0] * rest[0] + rest[1] * rest[1];
  return pair;
}

// Centres the two rows of a lane, or normalises them first. Calls centre(i, to) to read the centre from feature i on,
// and use(i, x) with the results, 0 beyond the last feature. `square` becomes |x|².
template <class Source, class Centre, class Use>
EAML_DEVICE void centre_rows(float (&square)[2], const KeyRows& keys, const int64_t (&slots)[2], Metric metric,
                             Centre centre, Use use) {
  const int64_t features = keys.features, first = cuda::thread() % 4 * 8;
  const void* const rows[2] = {keys.row(slots[0]), keys.row(slots[1])};
  float scale[2] = {1, 1};
  if (metric == Metric::kCosine) {
    double squares[2] = {};
    for (int64_t i = first; i < features; i += kColumns) {
      EAML_UNROLL
      for (int h = 0; h < 2; ++h) {
        float x[8];
        read_eight<Source>(x, rows[h], i, features, keys.half);
        EAML_UNROLL
        for (int j = 0; j < 8; ++j) squares[h] += double(x[j]) * double(x[j]);
      }
    }
    EAML_UNROLL
    for (int h = 0; h < 2; ++h) scale[h] = inverse_norm<float>(sum_of_row(squares[h]));
  }
  square[0] = square[1] = 0;
  constexpr int kBatch = 2;  // reads of a row in flight
  for (int64_t start = 0; start < features; start += kBatch * kColumns) {
    float x[kBatch][2][8];
    EAML_UNROLL
    for (int b = 0; b < kBatch; ++b)
      for (int h = 0; h < 2; ++h)
        read_eight<Source>(x[b][h], rows[h], start + b * kColumns + first, features, keys.half);
    EAML_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (start + b * kColumns >= features) break;
      float middle[8];
      centre(start + b * kColumns + first, middle);
      EAML_UNROLL
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 8; ++j) {
          x[b][h][j] = x[b][h][j] * scale[h] - middle[j];
          square[h] += x[b][h][j] * x[b][h][j];
        }
      use(start + b * kColumns + first, x[b]);
    }
  }
  square[0] = sum_of_row(square[0]), square[1] = sum_of_row(square[1]);
}

EAML_DEVICE uint32_t* row_of_words(uint16_t* row) {
  return reinterpret_cast<uint32_t*>(row);
}
// A warp packs the rows and the norms of 16 keys from `first` on, those below `size`. Each `square` becomes |x|², or
// NaN if no bound holds.
template <class Source>
EAML_DEVICE void pack_rows(float (&square)[2], const KeyRows& keys, int64_t first, int64_t size, const float* centre,
                           Metric metric, const TensorCoreBound& bound, const Packed& packed, int64_t block,
                           int64_t depth) {
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t features = keys.features;
  int64_t slots[2];
  uint16_t* rows[2];
  float rounding[2] = {};
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t slot = first + lane / 4 + h * 8;
    slots[h] = slot < size ? slot : size - 1, rows[h] = slot < size ? packed.key(block, slot, depth) : nullptr;
  }
  const auto store = [&](uint16_t* to, int64_t i, const uint32_t (&pairs)[4]) {  // columns i ... i + 7
    if (std::is_same_v<Source, AlignedRows> || i + 8 <= features) return cuda::store_row(row_of_words(to + i), pairs);
    EAML_UNROLL
    for (int j = 0; j < 8; ++j)
      if (i + j < features) to[i + j] = static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
  };
  const auto read_centre = [&](int64_t i, float (&to)[8]) { read_eight<Source>(to, centre, i, features, Half::kNone); };
  centre_rows<Source>(square, keys, slots, metric, read_centre, [&](int64_t i, const float (&x)[2][8]) {
    EAML_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t pairs[4];
      EAML_UNROLL
      for (int j = 0; j < 4; ++j) pairs[j] = round_pair(rounding[h], x[h][2 * j], x[h][2 * j + 1]);
      if (rows[h] != nullptr && i < features) store(rows[h], i, pairs);
    }
  });
  const float g = float(bound.key), underflow = float(bound.underflow);
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float norm = norm_bound(square[h], g, underflow);
    const float rest = norm_bound(sum_of_row(rounding[h]), g, underflow);
    const bool fits = norm <= Limits<float>::kMaxNorm;
    const uint32_t pair = fits ? key_pair(norm, rest) : 0;
    if (!fits) square[h] = kNaN<float>;
    if (rows[h] == nullptr) continue;
    constexpr uint32_t kZeros[4] = {};
    if (!fits)
      for (int64_t i = lane % 4 * 8; i < features; i += kColumns) store(rows[h], i, kZeros);
    if constexpr (std::is_same_v<Source, AlignedRows>) {  // the depth is a multiple of 16
      for (int64_t i = features + lane % 4 * 8; i < depth; i += kColumns) {
        const uint32_t last[4] = {i == features ? pair : 0};
        cuda::store_row(row_of_words(rows[h] + i), last);
      }
    } else {
      for (int64_t i = features + lane % 4; i < depth; i += 4) {
        const int64_t column = i - features;
        rows[h][i] = static_cast<uint16_t>(column == 0 ? pair & 0xffffu : column == 1 ? pair >> 16 : 0);
      }
    }
    if (lane % 4 == 0) *packed.norm(block, slots[h]) = pair;
  }
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
