// Error bounds of the fast scores of all kernels, with their derivation.
//
// Let q, x be the query and the key as computed with: centred (sqeuclidean) or normalised (cosine). With bias b the
// fast score is
//
//   sqeuclidean       (|x|² - b) / 2 - q.x  =  (|q - x|² - b - |q|²) / 2
//   other metrics     -b - q.x
//
// It orders keys as the exact score does, up to a constant of the query alone and an error.
//
// Let u, v be the unit roundoffs of T and double, and n the number of features.
// Let g' = (n + 1) u / (1 - (n + 1) u) and g = (n + 16)(u + v) 5/4.
// The errors are at most
//
//   - g' (|q||x| + |start|): the sum of n + 1 products onto the start, in any order;
//   - g' (|x|² + |b|) / 2: computing |x|², halving and subtracting the bias;
//   - u (|q| + |x|)²  (sqeuclidean),  u |q||x|: centring, (1 + u) on each component of q - c and x - c;
//   - 4u |q| (|x| + 1)  (cosine): normalising q and x;
//   - (u + (n + 16) v) |value|: the exact sum in double and its rounding to T.
//
// Here |value| <= (|q| + |x|)² + |b| (sqeuclidean), |q| (|x| + |c|) + |b| (inner product), 1 + |b| (cosine).
// The terms in |q||x|, |x|² and |b| add up to less than g (|q||x| + [sqeuclidean] |x|² + |b|): the key's error.
// The terms in |q| alone add up to less than e = (8u + 2 (n + 16) v) |q| s: the query's error.
// Here s is |q| (sqeuclidean), |c| (inner product) or |c| + 1 (cosine).
// The smallest normal number is added to it for each operation that may underflow.
// The factor 5/4 covers second-order terms as long as g < 1/20, and the roundings in computing the bounds.
//
// A kernel computes the lower bound, fast score - g (|q||x| + ...), in the same sum of products. One more row of the
// operands holds g|q| and |x|, and the sum starts from the other terms.
//
// Pairs of bfloat16. With y, p the bfloat16 numbers next to x, q, the inequality of Cauchy and Schwarz bounds the error
// of p.y by |q||x - y| + |q - p||y|. Both differences are known when numbers are rounded. The last row of the keys
// holds |x - y| beside |x| + |x - y|, which is at least |y|. The last row of the queries holds |q| beside g|q| + |q -
// p|. All are rounded up.
//
// The hardware may read subnormal numbers of bfloat16 as zero, which adds at most sqrt(n) tiny to |x - y|. That is less
// than the underflow and the factor 1 + g add to the bound of |x - y|.
//
// The one-pass kernel rounds keys as it reads them, and computes |x - y|² beside |x|². It subtracts the terms of the
// last row after the products: a sum of n + 1 products onto the start, in another order.
//
// Tensor cores sum products in steps of 16, 8 or 4. A step of n aligns its n + 1 terms to the largest term and may cut
// each term, and the sum, at 24 bits. Its error is at most (n + 2) 2^-23 times the sum of magnitudes: no more than 3u a
// product, instead of u. kTensorCoreRoundings u covers it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "knn/params.h"

namespace eaml::knn {
namespace {

constexpr int kTensorCoreRoundings = 4;

template <class T>
struct Limits {
  static constexpr T kRoundoff = std::numeric_limits<T>::epsilon() / 2;
  static constexpr T kTiny = std::numeric_limits<T>::min();
  static constexpr T kMax = std::numeric_limits<T>::max();
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  // sqrt(kMax) / 16: products of two such norms and their sums stay finite.
  static constexpr T kMaxNorm = sizeof(T) == 4 ? T(0x1.fffffep59) : T(0x1.fffffffffffffp507);
  static constexpr T kMaxBias = kMax / 16;
  // Squared norms between which a vector is normalised without loss; others are left to the exact scores.
  static constexpr double kMinSquare = sizeof(T) == 4 ? 1e-60 : 1e-200, kMaxSquare = 1 / kMinSquare;
};

// Factors of the bounds for some number of features; a product and its sum take kRoundings roundings.
template <class T, int kRoundings = 1>
struct ErrorBound {
  double key, query, underflow;  // g, the factor of |q| s in e, and the underflow

  EAML_INLINE explicit ErrorBound(std::int64_t features) {
    constexpr double u = Limits<T>::kRoundoff, v = Limits<double>::kRoundoff;
    const double n = double(features) + 16;
    key = 1.25 * n * (kRoundings * u + v);
    query = 8 * u + 2 * n * v;
    underflow = 2 * n * Limits<T>::kTiny;
  }
  EAML_INLINE bool holds() const { return key < 0.05; }
};

// 1 / |x| for the cosine, from |x|²: 0 for the zero vector, NaN if |x|² is outside the range of exact normalisation.
template <class T>
EAML_INLINE T inverse_norm(double square) {
  if (square == 0) return 0;
  const bool safe = square >= Limits<T>::kMinSquare && square <= Limits<T>::kMaxSquare;
  return safe ? T(1 / std::sqrt(square)) : Limits<T>::kNaN;
}

// ---- bounds of a key ----

// |x| or |x - y| from its square, rounded up.
template <class T>
EAML_INLINE T norm_bound(T square, T g, T underflow) {
  return std::sqrt(square + underflow) * (1 + g);
}

// The start of a key's sum and the width of its bounds, both without the part in |q||x|.
template <class T>
struct KeyBounds {
  T start, width;
  bool fits;  // otherwise the key is too large or NaN, and always a candidate
};

// `norm_fits` is whether |x| is at most kMaxNorm. A bias below -kMaxBias is clamped and the width infinite, because
// only the lower bound of such a key matters.
template <class T>
EAML_INLINE KeyBounds<T> key_bounds(T square, T bias, bool norm_fits, bool sqeuclidean, T g) {
  using L = Limits<T>;
  const bool clamped = bias < -L::kMaxBias;
  bias = clamped ? -L::kMaxBias : bias;
  const T own = sqeuclidean ? square : T(0), error = g * (own + std::abs(bias));
  const bool fits = norm_fits && bias <= L::kMaxBias;
  return {fits ? (sqeuclidean ? T(0.5) : T(1)) * (own - bias) - error : -L::kMax,
          fits && !clamped ? 2 * error : L::kInfinity, fits};
}

// ---- pairs of bfloat16 ----

// The nearest bfloat16; zero in place of a subnormal number, which the hardware's products may read as zero.
EAML_INLINE std::uint32_t to_bfloat16(float x) {
  const std::uint32_t bits = narrow<Half::kBfloat16, std::uint32_t>(x);
  return (bits & 0x7f80u) == 0 ? 0 : bits;
}
// The least bfloat16 that is at least x >= 0.
EAML_INLINE std::uint32_t round_up(float x) {
  return (__builtin_bit_cast(std::uint32_t, x) + 0xffffu) >> 16;
}
EAML_INLINE float low(std::uint32_t pair) {
  return __builtin_bit_cast(float, pair << 16);
}
EAML_INLINE float high(std::uint32_t pair) {
  return __builtin_bit_cast(float, pair & 0xffff0000u);
}

// The last row of a key: |x| + |x - y|, and |x - y|, each rounded up.
EAML_INLINE std::uint32_t key_pair(float norm, float rounding) {
  return round_up(norm + rounding) | round_up(rounding) << 16;
}

// The last row of a query: g|q| + |q - p| and |q|, each rounded up, from |q| and |q - p|².
struct QueryPair {
  std::uint32_t slope, norm;
};
EAML_INLINE QueryPair query_pair(double norm, double rounding_square, double g) {
  constexpr float kTiny = Limits<float>::kTiny;
  const double rest = std::sqrt(rounding_square) * (1 + g) + kTiny, most = norm * (1 + g);
  return {round_up(float(2 * g * (most + rest) + rest)), round_up(float(most) + kTiny)};
}

// Twice the query's error: the part of the width that all keys share.
template <class T, int kRoundings>
EAML_INLINE T margin_of(const ErrorBound<T, kRoundings>& bound, double norm, double centre_square, Metric metric) {
  const double extent =
      metric == Metric::kSqeuclidean ? norm : std::sqrt(centre_square) + (metric == Metric::kCosine ? 1 : 0);
  return T(2 * (bound.query * norm * extent + bound.underflow));
}

}  // namespace
}  // namespace eaml::knn
