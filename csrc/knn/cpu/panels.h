// Keys as panels of the fast scores: centred or normalised, with the bounds of their errors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "knn/cpu/error_bounds.h"
#include "knn/cpu/kernel.h"
#include "knn/cpu/vector_inl.h"

namespace eaml::knn {
namespace {

// Constants of the bounds of all keys: g, the underflow, and whether |x|² is part of the score.
template <class T>
struct KeyBounds {
  T g, tiny;
  bool square;

  KeyBounds(const Bound<T>& bound, Metric metric)
      : g(T(bound.own)), tiny(T(bound.tiny)), square(metric == Metric::kSqeuclidean) {}

  // Sets norm, start and width of a key's bounds, without the part in |q||x|. `lost` is |x - y|². A bias below -kBias
  // is clamped, because only the lower bound of such a key matters. Returns false if the key is too large or NaN; it is
  // then always a candidate.
  bool set(T squared, T lost, T bias, const Panel<T>& panel, int lane) const {
    using L = Limits<T>;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const bool cut = bias < -L::kBias;
    bias = cut ? -L::kBias : bias;
    const T own = square ? squared : T(0), error = g * (own + std::abs(bias));
    const T norm = std::sqrt(squared + tiny) * (1 + g);
    const bool fits = norm <= L::kNorm && bias <= L::kBias;
    panel.start[lane] = fits ? (square ? T(0.5) : T(1)) * (own - bias) - error : -L::kMax;
    panel.width[lane] = fits && !cut ? 2 * error : kInfinity;
    panel.norms[lane] = fits ? norm : T(0);
    if constexpr (sizeof(T) == 4) {
      if (has_pairs(true)) {
        const float rest = std::sqrt(lost + tiny) * (1 + g);
        panel.norms[lane] = std::bit_cast<float>(fits ? round_up(norm + rest) | round_up(rest) << 16 : 0);
      }
    }
    return fits;
  }
};

// 1 / |x| for the cosine: 0 for the zero vector, NaN if |x|² is outside the range of exact normalisation.
template <class T>
T scale_of(const T* x, std::int64_t features, Metric metric) {
  if (metric != Metric::kCosine) return 1;
  const double square = product(x, x, features);
  if (square == 0) return 0;
  const bool safe = square >= Limits<T>::kSquareMin && square <= Limits<T>::kSquareMax;
  return safe ? T(1 / std::sqrt(square)) : std::numeric_limits<T>::quiet_NaN();
}

// Zeroes a key of a panel.
template <class T>
void clear(const Panel<T>& panel, int lane) {
  for (T* x = panel.keys + lane; x < panel.norms; x += kPanel) *x = 0;
}

// Packs `count` keys and their bounds. Lanes beyond them have infinite scores.
template <class T>
void pack_panel(const T* keys, const T* bias, int count, std::int64_t features, const T* centre, Metric metric,
                const KeyBounds<T>& bounds, std::vector<T>& wide, const Panel<T>& panel) {
  T scales[kPanel], square[kPanel], lost[kPanel] = {};
  for (int l = 0; l < count; ++l) scales[l] = scale_of(keys + l * features, features, metric);
  if constexpr (sizeof(T) == 4) {
    if (has_pairs(true)) {
      wide.resize(features * kPanel);
      pack(keys, count, features, centre, scales, wide.data(), square);
      round_panel(wide.data(), features, reinterpret_cast<std::uint32_t*>(panel.keys), lost);
    } else {
      pack(keys, count, features, centre, scales, panel.keys, square);
    }
  } else {
    pack(keys, count, features, centre, scales, panel.keys, square);
  }
  bool fits = true;
  for (int l = 0; l < count; ++l) fits &= bounds.set(square[l], lost[l], bias ? bias[l] : T(0), panel, l);
  for (int l = 0; l < count && !fits; ++l)
    if (panel.start[l] == -Limits<T>::kMax) clear(panel, l);
  for (int l = count; l < kPanel; ++l) {
    clear(panel, l);
    panel.norms[l] = panel.width[l] = 0, panel.start[l] = std::numeric_limits<T>::infinity();
  }
}

// The centre that keys are shifted by: the mean of a few keys. Every finite centre gives right results; one near the
// mean keeps norms and error bounds small.
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
      centre[i] = std::abs(mean) <= Limits<T>::kNorm ? mean : 0;
    }
  }

 private:
  std::int64_t features_;
  Metric metric_;
  std::vector<double> mean_;
  std::int64_t used_ = 0;
};

constexpr std::int64_t kSample = 32;  // keys that the first centre is the mean of

}  // namespace
}  // namespace eaml::knn
