// Packs keys into panels for the fast scores: centred or normalised, with the bounds of their errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "knn/cpu/kernel.h"
#include "knn/cpu/vector_inl.h"
#include "knn/error_bounds.h"

namespace eaml::knn {
namespace {

// The constants of the bounds of all keys.
template <class T>
struct KeyPacker {
  T g, underflow;
  bool sqeuclidean;

  KeyPacker(const ErrorBound<T>& bound, Metric metric)
      : g(T(bound.key)), underflow(T(bound.underflow)), sqeuclidean(metric == Metric::kSqeuclidean) {}

  // Sets norm, start and width of a key's bounds. `square` is |x|², `rounding_square` |x - y|². Returns false if the
  // key is too large or NaN; it is then always a candidate.
  bool set_bounds(T square, T rounding_square, T bias, const Panel<T>& panel, int lane) const {
    const T norm = norm_bound(square, g, underflow);
    const KeyBounds<T> bounds = key_bounds(square, bias, norm <= Limits<T>::kMaxNorm, sqeuclidean, g);
    panel.start[lane] = bounds.start;
    panel.width[lane] = bounds.width;
    panel.norms[lane] = bounds.fits ? norm : T(0);
    if constexpr (sizeof(T) == 4) {
      if (has_pairs(true)) {
        const float rounding = norm_bound(rounding_square, g, underflow);
        panel.norms[lane] = __builtin_bit_cast(float, bounds.fits ? key_pair(norm, rounding) : 0);
      }
    }
    return bounds.fits;
  }
};

// The factor that normalises x for the cosine; 1 for other metrics.
template <class T>
T scale_of(const T* x, std::int64_t features, Metric metric) {
  return metric == Metric::kCosine ? inverse_norm<T>(product(x, x, features)) : T(1);
}

// Zeroes a key of a panel.
template <class T>
void clear(const Panel<T>& panel, int lane) {
  for (T* x = panel.keys + lane; x < panel.norms; x += kPanel) *x = 0;
}

// Packs keys: (count, features), with bias: (count,) or null, and their bounds. Lanes beyond `count` get infinite
// scores.
template <class T>
void pack_panel(const T* keys, const T* bias, int count, std::int64_t features, const T* centre, Metric metric,
                const KeyPacker<T>& packer, std::vector<T>& unrounded, const Panel<T>& panel) {
  T scales[kPanel], square[kPanel], rounding_square[kPanel] = {};
  for (int l = 0; l < count; ++l) scales[l] = scale_of(keys + l * features, features, metric);
  if constexpr (sizeof(T) == 4) {
    if (has_pairs(true)) {
      unrounded.resize(features * kPanel);
      pack(keys, count, features, centre, scales, unrounded.data(), square);
      round_panel(unrounded.data(), features, reinterpret_cast<std::uint32_t*>(panel.keys), rounding_square);
    } else {
      pack(keys, count, features, centre, scales, panel.keys, square);
    }
  } else {
    pack(keys, count, features, centre, scales, panel.keys, square);
  }
  bool fits = true;
  for (int l = 0; l < count; ++l)
    fits &= packer.set_bounds(square[l], rounding_square[l], bias ? bias[l] : T(0), panel, l);
  for (int l = 0; l < count && !fits; ++l)
    if (panel.start[l] == -Limits<T>::kMax) clear(panel, l);
  for (int l = count; l < kPanel; ++l) {
    clear(panel, l);
    panel.norms[l] = panel.width[l] = 0, panel.start[l] = std::numeric_limits<T>::infinity();
  }
}

// The centre that is subtracted from keys: the mean of a few keys. Every finite centre gives exact results; a centre
// near the mean of all keys keeps norms and error bounds small.
template <class T>
class Centre {
 public:
  Centre(std::int64_t features, Metric metric) : features_(features), metric_(metric), mean_(features) {}

  void add(const T* key) {
    const double factor = scale_of(key, features_, metric_);
    if (factor != factor) return;
    for (std::int64_t i = 0; i < features_; ++i) mean_[i] += factor * key[i];
    ++used_;
  }
  void write(T* centre) const {
    for (std::int64_t i = 0; i < features_; ++i) {
      const T mean = T(mean_[i] / double(std::max<std::int64_t>(used_, 1)));
      centre[i] = std::abs(mean) <= Limits<T>::kMaxNorm ? mean : 0;
    }
  }

 private:
  std::int64_t features_;
  Metric metric_;
  std::vector<double> mean_;
  std::int64_t used_ = 0;
};

constexpr std::int64_t kSampledKeys = 32;  // keys whose mean is the first centre

}  // namespace
}  // namespace eaml::knn
