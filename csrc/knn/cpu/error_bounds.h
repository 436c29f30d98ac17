// Error bounds of the fast scores, with their derivation.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "knn/params.h"

namespace eaml::knn {
namespace {

// With q, x the query and key as computed with (centred, or normalised for the cosine), b the bias, the fast score
//   sqeuclidean  (|x|² - b) / 2 - q.x  =  (|q - x|² - b - |q|²) / 2,        otherwise  -b - q.x
// orders keys as the exact score does: it differs from an increasing function of it by a constant of the query alone
// and by an error. With u, v the unit roundoffs of T and double, n features, g' = (n + 1) u / (1 - (n + 1) u) and
// g = (n + 16)(u + v) 5/4:
//   the sum of n + 1 products onto the start, any order           <=  g' (|q||x| + |start|)
//   computing |x|², halving and subtracting the bias              <=  g' (|x|² + |b|) / 2
//   centring, (1 + u) on each component of q - c and x - c        <=  u (|q| + |x|)²  (sqeuclidean),  u |q||x|
//   normalising q and x                                           <=  4u |q| (|x| + 1)                (cosine)
//   the exact sum in double and its rounding to T                 <=  (u + (n + 16) v) |value|,
//       |value| <= (|q| + |x|)² + |b|,   |q| (|x| + |c|) + |b|,   1 + |b|
// The terms in |q||x|, |x|² and |b| add up to less than g (|q||x| + [sqeuclidean] |x|² + |b|): the key's own error. The
// others, in |q| alone, to less than e = (8u + 2 (n + 16) v) |q| s with s = |q|, |c| or |c| + 1, the query's error, to
// which the smallest normal number is added for each operation that may underflow. The factor 5/4 covers second order
// terms as long as g < 1/20, and the roundings made in computing bounds.
// The tile computes fast score - g (|q||x| + ...) directly: g|q| and |x| stand in one more row, the rest in the start.
template <class T>
struct Limits {
  static constexpr T kTiny = std::numeric_limits<T>::min();
  static constexpr T kMax = std::numeric_limits<T>::max();
  static inline const T kNorm = std::sqrt(kMax) / 16;  // products of two such norms and their sums stay finite
  static constexpr T kBias = kMax / 16;
  // Squared norms between which a vector is normalised without loss; others are left to the exact stage.
  static constexpr double kSquareMin = sizeof(T) == 4 ? 1e-60 : 1e-200, kSquareMax = 1 / kSquareMin;
};

template <class T>
struct Bound {
  double own, shared, tiny;  // g, the factor of |q| s in e, and the underflow

  explicit Bound(std::int64_t features) {
    const double u = std::numeric_limits<T>::epsilon() / 2, v = std::numeric_limits<double>::epsilon() / 2;
    const double n = double(features) + 16;
    own = 1.25 * n * (u + v);
    shared = 8 * u + 2 * n * v;
    tiny = 2 * n * Limits<T>::kTiny;
  }
  bool holds() const { return own < 0.05; }
};

// With y, p the bfloat16 numbers next to x, q, the products of these are within |q||x - y| + |q - p||y| of q.x, by the
// inequality of Cauchy and Schwarz. Both differences are known when they are rounded: |x - y| stands beside |x| in the
// last row (rather |x| + |x - y|, no less than |y|), and |q| beside g|q| + |q - p| in that of the queries, rounded up.

// The least bfloat16 that is no less than x >= 0.
inline std::uint32_t round_up(float x) {
  return (std::bit_cast<std::uint32_t>(x) + 0xffffu) >> 16;
}
inline float low(std::uint32_t pair) {
  return std::bit_cast<float>(pair << 16);
}
inline float high(std::uint32_t pair) {
  return std::bit_cast<float>(pair & 0xffff0000u);
}

}  // namespace
}  // namespace eaml::knn
