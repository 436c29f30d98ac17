// Keys as tensor cores read them, and the bounds of what their products leave out.
#pragma once

#include "knn/cuda/exact.cuh"

namespace eaml::knn {
namespace {

// The bounds are those of csrc/knn/cpu/error_bounds.h for pairs of bfloat16 numbers, where they are derived; but for
// the products, whose sums tensor cores take in steps of 16, 8 or 4. A step of n aligns its n + 1 terms to the largest
// and may cut each at 24 bits, and the sum too: an error of up to (n + 2) 2^-23 times the sum of their magnitudes,
// which makes no more than 3 u a product, instead of u. kRounding u covers it.
constexpr double kRounding = 4, kU = 0x1p-24, kV = 0x1p-53;
constexpr float kTiny = 0x1p-126f, kMax = 0x1.fffffep127f, kMostNorm = 0x1p60f, kMostBias = kMax / 16;

struct Bound {
  double own, shared, tiny;
  EAML_MEMBER explicit Bound(int64_t features) {
    const double n = double(features) + 16;
    own = 1.25 * n * (kRounding * kU + kV), shared = 8 * kU + 2 * n * kV, tiny = 2 * n * kTiny;
  }
  EAML_MEMBER bool holds() const { return own < 0.05; }
};

EAML_DEVICE float low(uint32_t pair) {
  return __builtin_bit_cast(float, pair << 16);
}
EAML_DEVICE float high(uint32_t pair) {
  return __builtin_bit_cast(float, pair & 0xffff0000u);
}
// The least bfloat16 that is no less than x >= 0.
EAML_DEVICE uint32_t round_up(float x) {
  return (__builtin_bit_cast(uint32_t, x) + 0xffffu) >> 16;
}
// The nearest bfloat16; zero below the normal numbers, which tensor cores may take for zero.
EAML_DEVICE uint32_t to_bfloat16(float x) {
  const uint32_t bits = narrow<Half::kBfloat16, uint32_t>(x);
  return (bits & 0x7f80u) == 0 ? 0 : bits;
}

// 1 / |x| for the cosine, of |x|²; 0 for the zero vector, NaN where the exact values must decide.
EAML_DEVICE float scale_of(double square) {
  if (square == 0) return 0;
  return square >= 1e-60 && square <= 1e60 ? float(1 / std::sqrt(square)) : kNaN<float>;
}

template <class V>
EAML_DEVICE V sum_of_warp(V x) {
  EAML_UNROLL
  for (int mask = 1; mask < cuda::kWarp; mask *= 2) x += cuda::shuffle_xor(x, mask);
  return x;
}

// Keys as numbers of float, wherever they are.
struct KeyRows {
  const char* data;
  int64_t features;
  Half half;
  EAML_MEMBER const void* row(int64_t i) const { return data + i * features * (half == Half::kNone ? 4 : 2); }
  EAML_MEMBER float get(int64_t i, int64_t feature) const { return read_number<float>(row(i), feature, half); }
  // |x|² of a row, by a warp.
  EAML_MEMBER double square(int64_t i) const {
    double sum = 0;
    for (int64_t f = cuda::thread() % cuda::kWarp; f < features; f += cuda::kWarp) {
      const double x = get(i, f);
      sum += x * x;
    }
    return sum_of_warp(sum);
  }
};

// What is packed, wherever it is: strides in words, of a block of keys (of a set of bounds) and of a panel.
struct Packed {
  uint16_t* keys;
  uint32_t* norms;
  float *start, *width;
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

// Panels, those of one memory behind those of another.
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

// The rows and the norms of some keys, by a warp; `square` becomes |x|², NaN where no bound holds. None for slots that
// do not exist, which are less than 0.
template <class C, int kKeys>
EAML_DEVICE void pack_keys(float (&square)[kKeys], const KeyRows& keys, const int64_t (&slots)[kKeys],
                           uint16_t* const (&rows)[kKeys], uint32_t* const (&norms)[kKeys], const C* centre,
                           Metric metric, const Bound& bound, int64_t depth) {
  const int lane = cuda::thread() % cuda::kWarp;
  float scale[kKeys], lost[kKeys] = {};
  int64_t from[kKeys];
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    from[k] = slots[k] < 0 ? slots[0] : slots[k], square[k] = 0;
    scale[k] = metric == Metric::kCosine ? scale_of(keys.square(from[k])) : 1.0f;
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
      square[k] += x[k] * x[k], lost[k] += rest * rest;
      if (slots[k] >= 0) rows[k][i] = static_cast<uint16_t>(bits);
    }
  }
  const float g = float(bound.own), tiny = float(bound.tiny);
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    square[k] = sum_of_warp(square[k]), lost[k] = sum_of_warp(lost[k]);
    if (slots[k] < 0) continue;
    const float norm = std::sqrt(square[k] + tiny) * (1 + g), rest = std::sqrt(lost[k] + tiny) * (1 + g);
    const bool fits = norm <= kMostNorm;
    const uint32_t pair = fits ? round_up(norm + rest) | round_up(rest) << 16 : 0;
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
EAML_DEVICE float pack_key(const KeyRows& keys, int64_t slot, const C* centre, Metric metric, const Bound& bound,
                           int64_t depth, uint16_t* row, uint32_t* norms) {
  float square[1];
  const int64_t slots[1] = {slot};
  uint16_t* const rows[1] = {row};
  uint32_t* const all_norms[1] = {norms};
  pack_keys(square, keys, slots, rows, all_norms, centre, metric, bound, depth);
  return square[0];
}

// Where a key's bounds start, and their width without the part in the query's norm.
EAML_DEVICE void set_bounds(float square, float bias, Metric metric, const Bound& bound, float* start, float* width) {
  const bool cut = bias < -kMostBias;  // so low that a bound from below is enough
  bias = cut ? -kMostBias : bias;
  const bool fits = square == square && bias <= kMostBias;
  const bool distance = metric == Metric::kSqeuclidean;
  const float own = distance ? square : 0.0f, error = float(bound.own) * (own + std::abs(bias));
  *start = fits ? (distance ? 0.5f : 1.0f) * (own - bias) - error : -kMax;
  *width = fits && !cut ? 2 * error : kInfinity<float>;
}

constexpr int kSampled = 32;  // keys of a centre

// A block finds the centre of a block of keys: of a few, the mean. Any is right; a good one keeps errors small.
template <class C>
EAML_DEVICE void find_centre(const KeyRows& keys, int64_t count, const bool* valid, Metric metric,
                             const Shared<float>& scales, C* centre) {
  const int64_t step = count > kSampled ? count / kSampled : 1;
  const int samples = static_cast<int>(count < kSampled ? count : kSampled);
  for (int s = cuda::thread() / cuda::kWarp; s < samples; s += kWarps) {
    float scale = valid == nullptr || valid[s * step] ? 1.0f : kNaN<float>;
    if (metric == Metric::kCosine) scale *= scale_of(keys.square(s * step));
    if (cuda::thread() % cuda::kWarp == 0) scales.set(s, scale);
  }
  cuda::sync_block();
  for (int64_t i = cuda::thread(); i < keys.features; i += kThreads) {
    double sum = 0;
    int used = 0;
    EAML_UNROLL_BY(8)
    for (int k = 0; k < samples; ++k) {
      const double x = keys.get(k * step, i);  // before it is known whether it counts: these loads wait together
      const float scale = scales.get(k);
      sum += scale == scale ? double(scale) * x : 0, used += scale == scale;
    }
    const float mean = float(sum / (used > 0 ? used : 1));
    centre[i] = std::abs(mean) <= kMostNorm ? mean : 0.0f;
  }
}

}  // namespace
}  // namespace eaml::knn
