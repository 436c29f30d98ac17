// Fast scores that skip nearly all keys for certain, exact scores for the rest.
#include "knn/cpu_kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "common/simd.h"

// Rounds every product: the double sums must not depend on whether the machine has a fused multiply-add.
#if defined(__clang__)
#define EAML_NO_CONTRACTION
#define EAML_NO_CONTRACTION_PRAGMA _Pragma("clang fp contract(off)")
#else
#define EAML_NO_CONTRACTION __attribute__((optimize("fp-contract=off")))
#define EAML_NO_CONTRACTION_PRAGMA
#endif

namespace eaml::knn {

// ---- vector code -------------------------------------------------------------------------------------------------

// Loaded from any address, in place. A member, because clang ignores the alignment of an alias template.
template <class T, int N>
struct UnalignedVector {
  typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Unaligned = typename UnalignedVector<T, N>::type;

constexpr int kRows = 12;   // queries of a tile: with one vector of keys, 12 accumulators + operands fill 16 registers
constexpr int kPanel = 32;  // keys of a panel [features + 1][kPanel]
constexpr int kFew = 4;     // queries searched row by row, without packing
constexpr int kLanes = 8;   // lanes of an exact sum

// scores[r][l] = start[l] + sum_i queries[i][r] * panel[i][l]
template <class T, int Bytes>
EAML_INLINE void tile_(const T* queries, const T* panel, const T* start, std::int64_t depth, T* scores) {
  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  for (int lane = 0; lane < kPanel; lane += N) {
    V sum[kRows];
    EAML_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = *reinterpret_cast<const V*>(start + lane);
    for (std::int64_t i = 0; i < depth; ++i) {
      const V key = *reinterpret_cast<const V*>(panel + i * kPanel + lane);
      EAML_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += queries[i * kRows + r] * key;
    }
    EAML_UNROLL
    for (int r = 0; r < kRows; ++r) *reinterpret_cast<V*>(scores + r * kPanel + lane) = sum[r];
  }
}

// The exact sum over features of (a - b)² or a b, in double: lane l sums features l, l + 8, ...; lanes join in pairs.
template <class T, int Bytes, bool kDifference>
EAML_INLINE double exact_sum_(const T* a, const T* b, std::int64_t features) {
  EAML_NO_CONTRACTION_PRAGMA
  constexpr int N = Bytes / sizeof(double), kVectors = kLanes / N;
  using V = Unaligned<double, N>;
  V sum[kVectors] = {};
  double lane[kLanes];
  std::int64_t i = 0;
  for (; i + kLanes <= features; i += kLanes) {
    EAML_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V x = __builtin_convertvector(*reinterpret_cast<const Unaligned<T, N>*>(a + i + v * N), V);
      const V y = __builtin_convertvector(*reinterpret_cast<const Unaligned<T, N>*>(b + i + v * N), V);
      sum[v] += kDifference ? (x - y) * (x - y) : x * y;
    }
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(lane + v * N) = sum[v];
  for (int l = 0; i < features; ++i, ++l) {
    const double x = a[i], y = b[i];
    lane[l] += kDifference ? (x - y) * (x - y) : x * y;
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// panel[i][l] = keys[l][i] * scale[l] - centre[i] in blocks of 4 × 4, and the squared norms of the panel's columns
template <class T, int Bytes>
EAML_INLINE void pack_(const T* keys, int count, std::int64_t features, const T* centre, const T* scale, T* panel,
                       T* square) {
  using Four = Unaligned<T, 4>;
  const auto scalar = [&](int l, std::int64_t i) {
    panel[i * kPanel + l] = keys[l * features + i] * scale[l] - centre[i];
  };
  const std::int64_t whole = features / 4 * 4;
  int l = 0;
  for (; l + 4 <= count; l += 4) {
    const T* rows = keys + l * features;
    for (std::int64_t i = 0; i < 4 * features; i += 64 / sizeof(T))
      __builtin_prefetch(rows + kPanel * features + i, 0, 2);
    const T scales[4] = {scale[l], scale[l + 1], scale[l + 2], scale[l + 3]};
    for (std::int64_t i = 0; i < whole; i += 4) {
      const Four middle = *reinterpret_cast<const Four*>(centre + i);
      Four row[4];
      EAML_UNROLL
      for (int r = 0; r < 4; ++r) row[r] = *reinterpret_cast<const Four*>(rows + r * features + i) * scales[r] - middle;
      const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Four b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Four c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Four d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      T* to = panel + i * kPanel + l;
      *reinterpret_cast<Four*>(to) = __builtin_shufflevector(a, c, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + kPanel) = __builtin_shufflevector(a, c, 2, 3, 6, 7);
      *reinterpret_cast<Four*>(to + 2 * kPanel) = __builtin_shufflevector(b, d, 0, 1, 4, 5);
      *reinterpret_cast<Four*>(to + 3 * kPanel) = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    }
    for (std::int64_t i = whole; i < features; ++i)
      for (int r = 0; r < 4; ++r) scalar(l + r, i);
  }
  for (; l < count; ++l)
    for (std::int64_t i = 0; i < features; ++i) scalar(l, i);

  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  V sum[kPanel / N] = {};
  for (std::int64_t i = 0; i < features; ++i)
    for (int v = 0; v < kPanel / N; ++v) {
      const V x = *reinterpret_cast<const V*>(panel + i * kPanel + v * N);
      sum[v] += x * x;
    }
  for (int v = 0; v < kPanel / N; ++v) *reinterpret_cast<V*>(square + v * N) = sum[v];
}

// The sum of all lanes.
template <class T, int Bytes>
EAML_INLINE T total_(Unaligned<T, Bytes / sizeof(T)> x) {
  if constexpr (Bytes == 2 * sizeof(T)) {
    return x[0] + x[1];
  } else {
    using Half = Unaligned<T, Bytes / sizeof(T) / 2>;
    Half half[2];
    std::memcpy(half, &x, sizeof x);
    return total_<T, Bytes / 2>(half[0] + half[1]);
  }
}

// For each of `count` keys |query - key|², or query . key and |key|²: in the keys' precision, in any order.
template <class T, int Bytes, bool kDifference>
EAML_INLINE void rows_(const T* query, const T* keys, int count, std::int64_t features, T* sum, T* square) {
  constexpr int N = Bytes / sizeof(T);
  using V = Unaligned<T, N>;
  for (int l = 0; l < count; ++l) {
    const T* key = keys + l * features;
    V sums = {}, squares = {};
    std::int64_t i = 0;
    for (; i + N <= features; i += N) {
      const V x = *reinterpret_cast<const V*>(key + i), q = *reinterpret_cast<const V*>(query + i), d = q - x;
      sums += kDifference ? d * d : q * x;
      if constexpr (!kDifference) squares += x * x;
    }
    T last = 0, last_square = 0;
    for (; i < features; ++i) {
      const T x = key[i], q = query[i];
      last += kDifference ? (q - x) * (q - x) : q * x;
      last_square += x * x;
    }
    sum[l] = total_<T, Bytes>(sums) + last;
    if constexpr (!kDifference) square[l] = total_<T, Bytes>(squares) + last_square;
  }
}

#define EAML_DEFINE_FOR(T, TARGET, BYTES)                                                                        \
  TARGET void tile(const T* queries, const T* panel, const T* start, std::int64_t depth, T* scores) {            \
    tile_<T, BYTES>(queries, panel, start, depth, scores);                                                       \
  }                                                                                                              \
  TARGET void pack(const T* keys, int count, std::int64_t features, const T* centre, const T* scale, T* panel,   \
                   T* square) {                                                                                  \
    pack_<T, BYTES>(keys, count, features, centre, scale, panel, square);                                        \
  }                                                                                                              \
  TARGET void difference_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum) {         \
    rows_<T, BYTES, true>(query, keys, count, features, sum, nullptr);                                           \
  }                                                                                                              \
  TARGET void product_rows(const T* query, const T* keys, int count, std::int64_t features, T* sum, T* square) { \
    rows_<T, BYTES, false>(query, keys, count, features, sum, square);                                           \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double square_distance(const T* a, const T* b, std::int64_t features) {             \
    return exact_sum_<T, BYTES, true>(a, b, features);                                                           \
  }                                                                                                              \
  TARGET EAML_NO_CONTRACTION double product(const T* a, const T* b, std::int64_t features) {                     \
    return exact_sum_<T, BYTES, false>(a, b, features);                                                          \
  }
#define EAML_DEFINE(TARGET, BYTES)      \
  EAML_DEFINE_FOR(float, TARGET, BYTES) \
  EAML_DEFINE_FOR(double, TARGET, BYTES)
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE
#undef EAML_DEFINE_FOR

// Whether any of a panel's scores may be among the best.
template <class T>
EAML_INLINE bool any_below_(const T* scores, T threshold) {
  int any = 0;
  for (int l = 0; l < kPanel; ++l) any |= scores[l] <= threshold;
  return any;
}
#define EAML_DEFINE(TARGET, BYTES)                                \
  TARGET bool any_below(const float* scores, float threshold) {   \
    return any_below_(scores, threshold);                         \
  }                                                               \
  TARGET bool any_below(const double* scores, double threshold) { \
    return any_below_(scores, threshold);                         \
  }
EAML_VERSIONS(EAML_DEFINE)
#undef EAML_DEFINE

namespace {

// ---- exact values and their order --------------------------------------------------------------------------------

// The smaller score is the better one: a squared distance less bias, or a negated similarity.
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

// One memory of the problem, and its exact scores.
template <class T>
struct Memory {
  const T* keys;
  const bool* valid;
  const T* bias;
  std::int64_t features;
  Metric metric;

  Memory(const Problem<T>& p, std::int64_t memory)
      : keys(p.keys + memory / p.keys_share * p.size * p.features),
        valid(p.valid ? p.valid + memory / p.valid_share * p.size : nullptr),
        bias(p.bias ? p.bias + memory / p.bias_share * p.size : nullptr),
        features(p.features),
        metric(p.metric) {}

  const T* key(std::int64_t slot) const { return keys + slot * features; }
  bool live(std::int64_t slot) const { return !valid || valid[slot]; }

  T score(const T* query, double query_norm, std::int64_t slot) const {
    const double weight = bias ? bias[slot] : 0;
    if (metric == Metric::kSqeuclidean) return T(square_distance(query, key(slot), features) - weight);
    double value = product(query, key(slot), features);
    if (metric == Metric::kCosine) {
      const double norm = query_norm * std::sqrt(product(key(slot), key(slot), features));
      value = norm == 0 ? 0 : value / norm;
    }
    return T(-(value + weight));
  }
};

// Writes the best k of `ranked`, which it reorders.
template <class T>
void write(std::vector<Ranked<T>>& ranked, std::int64_t k, Metric metric, T* values, std::int64_t* indices) {
  const T sign = metric == Metric::kSqeuclidean ? T(1) : T(-1);
  const std::int64_t count = std::min<std::int64_t>(k, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end());
  for (std::int64_t j = 0; j < count; ++j) values[j] = sign * ranked[j].score, indices[j] = ranked[j].index;
  std::fill(values + count, values + k, sign * std::numeric_limits<T>::infinity());
  std::fill(indices + count, indices + k, std::int64_t(-1));
}

// ---- the short list ----------------------------------------------------------------------------------------------

// Keys that may be among the k best of one query, each with bounds of its score: of what is left out it is certain that
// k others are better. `margin` is the part of the bounds' width that all keys share.
template <class T>
struct Shortlist {
  struct Entry {
    T lower, upper;
    std::int32_t slot;
  };
  std::vector<Entry> entries;
  T threshold, margin;
  std::size_t k, limit, most;

  void reset(std::int64_t k_, T margin_) {
    entries.clear();
    threshold = std::numeric_limits<T>::max();
    margin = margin_;
    k = k_, limit = 2 * k + 64, most = 8 * k + 4096;
    entries.reserve(std::min<std::size_t>(limit, 1024));
  }
  // Too many keys are too close to call: take none, all will be evaluated.
  void give_up() {
    entries.clear();
    threshold = -std::numeric_limits<T>::infinity();
  }
  bool gave_up() const { return threshold == -std::numeric_limits<T>::infinity(); }

  void add(T lower, T upper, std::int32_t slot) {
    if (!(lower <= threshold)) return;
    if (entries.size() >= limit) {
      shrink();
      if (entries.size() > most) return give_up();
      limit = std::max(limit, 2 * entries.size());
    }
    entries.push_back({lower, upper, slot});
  }
  void shrink() {
    if (entries.size() <= k) return;
    const auto kth = entries.begin() + (k - 1);
    std::nth_element(entries.begin(), kth, entries.end(),
                     [](const Entry& a, const Entry& b) { return a.upper < b.upper; });
    threshold = std::min(threshold, kth->upper + margin);
    std::erase_if(entries, [this](const Entry& e) { return !(e.lower <= threshold); });
  }
};

// ---- the fast scores ---------------------------------------------------------------------------------------------

// With q, x the query and key as computed with (centred, or normalised for the cosine), b the bias, the fast score
//   sqeuclidean  (|x|² - b) / 2 - q.x  =  (|q - x|² - b - |q|²) / 2,        otherwise  -b - q.x
// orders keys as the exact score does: it differs from an increasing function of it by a constant of the query alone
// and by an error. With u, v the unit roundoffs of T and double, n features, g' = (n + 1) u / (1 - (n + 1) u) and
// g = (n + 16)(u + v) 5/4:
//   the sum of n + 1 products onto the start, any order           <=  g' (|q||x| + |start|)
//   |x|² likewise, halving and subtracting the bias               <=  g' (|x|² + |b|) / 2
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

template <class T>
class Screen {
 public:
  Screen(const Problem<T>& problem, const Plan& plan)
      : problem_(problem), plan_(plan), bound_(problem.features), depth_(problem.features + 1) {}

  void run(std::int64_t unit, Found<T> found) {
    const std::int64_t key_block = unit % plan_.key_blocks, rest = unit / plan_.key_blocks;
    const std::int64_t memory_index = rest / plan_.query_blocks, query_block = rest % plan_.query_blocks;
    const Memory<T> memory(problem_, memory_index);
    begin_ = key_block * plan_.key_block;
    end_ = std::min(begin_ + plan_.key_block, problem_.size);
    const std::int64_t first = query_block * plan_.query_block;
    count_ = std::min(plan_.query_block, problem_.queries_each - first);
    const std::int64_t row = memory_index * problem_.queries_each + first;
    queries_ = problem_.queries + row * problem_.features;

    lists_.resize(std::max<std::size_t>(lists_.size(), count_));
    if (count_ <= kFew) {
      search_rows(memory);
    } else {
      centre(memory);
      pack_queries();
      for (std::int64_t slot = begin_; slot < end_; slot += kPanel) panel(memory, slot);
    }

    const std::int64_t out = (key_block * problem_.memories * problem_.queries_each + row) * problem_.k;
    for (std::int64_t q = 0; q < count_; ++q)
      finish(memory, q, found.values + out + q * problem_.k, found.indices + out + q * problem_.k);
  }

 private:
  bool cosine() const { return problem_.metric == Metric::kCosine; }
  bool sqeuclidean() const { return problem_.metric == Metric::kSqeuclidean; }

  // 1 / |x| for the cosine; 0 for the zero vector, NaN where the exact stage must decide.
  T scale(const T* x) const {
    if (!cosine()) return 1;
    const double square = product(x, x, problem_.features);
    if (square == 0) return 0;
    const bool safe = square >= Limits<T>::kSquareMin && square <= Limits<T>::kSquareMax;
    return safe ? T(1 / std::sqrt(square)) : std::numeric_limits<T>::quiet_NaN();
  }

  // The mean of a few live keys: any finite centre is right, a good one keeps the norms and so the error small.
  void centre(const Memory<T>& memory) {
    const std::int64_t features = problem_.features, step = std::max<std::int64_t>(1, (end_ - begin_) / 32);
    mean_.assign(features, 0);
    std::int64_t used = 0;
    for (std::int64_t slot = begin_; slot < end_; slot += step) {
      if (!memory.live(slot)) continue;
      const T* key = memory.key(slot);
      const double factor = scale(key);
      if (factor != factor) continue;
      for (std::int64_t i = 0; i < features; ++i) mean_[i] += factor * key[i];
      ++used;
    }
    centre_.resize(features);
    double square = 0;
    for (std::int64_t i = 0; i < features; ++i) {
      const T mean = T(mean_[i] / double(std::max<std::int64_t>(used, 1)));
      centre_[i] = std::abs(mean) <= Limits<T>::kNorm ? mean : 0;
      square += double(centre_[i]) * double(centre_[i]);
    }
    centre_norm_ = std::sqrt(square);
  }

  // The bias of a slot, cut where it is so low that a bound from below is enough: a mask, as it were.
  T weight(const Memory<T>& memory, std::int64_t slot, bool* cut) const {
    const T bias = memory.bias ? memory.bias[slot] : T(0);
    *cut = bias < -Limits<T>::kBias;
    return *cut ? -Limits<T>::kBias : bias;
  }

  // Few queries do not repay the packing. The differences of a squared distance are taken directly and need no centre,
  // so errors are relative: g (|q - x|² + |b|), g (|q||x| + |b|), and 2g (1 + |b|) as |x| is rounded like q.x.
  void search_rows(const Memory<T>& memory) {
    using L = Limits<T>;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const std::int64_t features = problem_.features;
    const T g = T(bound_.own), tiny = T(bound_.tiny);
    for (std::int64_t q = 0; q < count_; ++q) {
      Shortlist<T>& list = lists_[q];
      list.reset(problem_.k, 2 * tiny);
      const T* query = queries_ + q * features;
      if (cosine()) {
        const T factor = scale(query);
        packed_.resize(features);
        for (std::int64_t i = 0; i < features; ++i) packed_[i] = query[i] * factor;
        query = packed_.data();
      }
      const T norm = T(std::sqrt(product(query, query, features)));
      if (!bound_.holds() || !(norm <= L::kNorm)) {
        list.give_up();
        continue;
      }
      T sum[kPanel] = {}, square[kPanel] = {}, extent[kPanel] = {}, lower[kPanel], upper[kPanel];
      for (std::int64_t slot = begin_; slot < end_; slot += kPanel) {
        const int keys = int(std::min<std::int64_t>(kPanel, end_ - slot));
        if (sqeuclidean())
          difference_rows(query, memory.key(slot), keys, features, sum);
        else
          product_rows(query, memory.key(slot), keys, features, sum, square);
        T bias[kPanel] = {}, spread[kPanel] = {};
        for (int l = 0; memory.bias && l < keys; ++l) {
          bool cut;
          bias[l] = weight(memory, slot + l, &cut);
          spread[l] = cut ? kInfinity : 0;
        }
        if (cosine()) {
          for (int l = 0; l < keys; ++l) {
            const bool safe = square[l] >= T(1e-30) && square[l] <= T(1e30);
            sum[l] *= safe ? -1 / std::sqrt(square[l]) : -scale(memory.key(slot + l));
            extent[l] = 2 + std::abs(bias[l]);
          }
        } else if (sqeuclidean()) {
          std::copy(sum, sum + kPanel, extent);
        } else {
          for (int l = 0; l < kPanel; ++l) sum[l] = -sum[l], extent[l] = norm * std::sqrt(square[l] + tiny) * (1 + g);
        }
        for (int l = 0; l < kPanel; ++l) {
          const T value = sum[l] - bias[l], error = g * (extent[l] + std::abs(bias[l]));
          const bool known = std::abs(value) + error <= L::kMax / 4;
          lower[l] = known ? value - error : -L::kMax;
          upper[l] = known ? value + error + spread[l] : kInfinity;
        }
        for (int l = keys; l < kPanel; ++l) lower[l] = kInfinity;
        if (memory.valid)
          for (int l = 0; l < keys; ++l) lower[l] = memory.valid[slot + l] ? lower[l] : kInfinity;
        if (!any_below(lower, list.threshold)) continue;
        for (int l = 0; l < keys; ++l) list.add(lower[l], upper[l], std::int32_t(slot + l - begin_));
      }
    }
  }

  // Negated and transposed, tiles [features + 1][kRows]; the last row is g|q|.
  void pack_queries() {
    const std::int64_t features = problem_.features, tiles = (count_ + kRows - 1) / kRows;
    packed_.assign(tiles * depth_ * kRows, 0);
    slope_.resize(count_);
    for (std::int64_t q = 0; q < count_; ++q) {
      const T* query = queries_ + q * features;
      T* column = packed_.data() + q / kRows * depth_ * kRows + q % kRows;
      const T factor = scale(query);
      double square = 0;
      for (std::int64_t i = 0; i < features; ++i) {
        const T x = sqeuclidean() ? query[i] - centre_[i] : query[i] * factor;
        column[i * kRows] = -x;
        square += double(x) * double(x);
      }
      const double norm = std::sqrt(square);
      slope_[q] = T(bound_.own * norm);
      column[features * kRows] = -slope_[q];
      const double extent = sqeuclidean() ? norm : centre_norm_ + (cosine() ? 1 : 0);
      lists_[q].reset(problem_.k, T(2 * (bound_.shared * norm * extent + bound_.tiny)));
      if (bound_.holds() && norm <= Limits<T>::kNorm) continue;
      lists_[q].give_up();
      for (std::int64_t i = 0; i < depth_; ++i) column[i * kRows] = 0;
    }
  }

  void panel(const Memory<T>& memory, std::int64_t slot) {
    const int keys = int(std::min<std::int64_t>(kPanel, end_ - slot));
    T scales[kPanel], start[kPanel], width[kPanel], square[kPanel];
    panel_.resize(depth_ * kPanel);
    for (int l = 0; l < keys; ++l) scales[l] = scale(memory.key(slot + l));
    pack(memory.key(slot), keys, problem_.features, centre_.data(), scales, panel_.data(), square);
    T* norms = panel_.data() + problem_.features * kPanel;
    bounds(memory, slot, keys, square, norms, start, width);

    alignas(64) T scores[kRows * kPanel];
    for (std::int64_t q = 0; q < count_; q += kRows) {
      tile(packed_.data() + q * depth_, panel_.data(), start, depth_, scores);
      for (int r = 0; r < std::min<std::int64_t>(kRows, count_ - q); ++r) {
        Shortlist<T>& list = lists_[q + r];
        const T* lower = scores + r * kPanel;
        if (!any_below(lower, list.threshold)) continue;
        for (int l = 0; l < keys; ++l)
          list.add(lower[l], lower[l] + width[l] + 2 * slope_[q + r] * norms[l], std::int32_t(slot + l - begin_));
      }
    }
  }

  // Start and width of the keys' bounds, without the part in |q||x|; norms for that.
  void bounds(const Memory<T>& memory, std::int64_t slot, int keys, const T* square, T* norms, T* start, T* width) {
    using L = Limits<T>;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const T g = T(bound_.own), half = sqeuclidean() ? T(0.5) : T(1);
    for (int l = 0; l < kPanel; ++l) {
      start[l] = kInfinity, width[l] = norms[l] = 0;
      if (l >= keys || !memory.live(slot + l)) continue;
      bool cut;
      const T bias = weight(memory, slot + l, &cut);
      norms[l] = std::sqrt(square[l] + T(bound_.tiny)) * (1 + g);
      const T own = sqeuclidean() ? square[l] : T(0), error = g * (own + std::abs(bias));
      start[l] = half * (own - bias) - error, width[l] = cut ? kInfinity : 2 * error;
      if (norms[l] <= L::kNorm && bias <= L::kBias) continue;
      start[l] = -L::kMax, width[l] = kInfinity, norms[l] = 0;  // too large, or not a number: always on the list
      for (std::int64_t i = 0; i < problem_.features; ++i) panel_[i * kPanel + l] = 0;
    }
  }

  void finish(const Memory<T>& memory, std::int64_t q, T* values, std::int64_t* indices) {
    const T* query = queries_ + q * problem_.features;
    const double norm = cosine() ? std::sqrt(product(query, query, problem_.features)) : 0;
    Shortlist<T>& list = lists_[q];
    ranked_.clear();
    list.shrink();
    if (!list.gave_up()) {
      for (const auto& entry : list.entries) {
        const std::int64_t slot = begin_ + entry.slot;
        ranked_.push_back({memory.score(query, norm, slot), slot});
      }
    } else {
      const std::size_t k = std::size_t(problem_.k);
      for (std::int64_t slot = begin_; slot < end_; ++slot) {
        if (!memory.live(slot)) continue;
        const Ranked<T> next{memory.score(query, norm, slot), slot};
        if (ranked_.size() < k) {
          ranked_.push_back(next);
          std::push_heap(ranked_.begin(), ranked_.end());
        } else if (next < ranked_.front()) {
          std::pop_heap(ranked_.begin(), ranked_.end());
          ranked_.back() = next;
          std::push_heap(ranked_.begin(), ranked_.end());
        }
      }
    }
    write(ranked_, problem_.k, problem_.metric, values, indices);
  }

  const Problem<T>& problem_;
  const Plan& plan_;
  const Bound<T> bound_;
  const std::int64_t depth_;  // rows of a panel and of a tile of queries
  std::int64_t begin_ = 0, end_ = 0, count_ = 0;
  const T* queries_ = nullptr;
  double centre_norm_ = 0;
  std::vector<double> mean_;
  std::vector<T> centre_, packed_, slope_, panel_;
  std::vector<Shortlist<T>> lists_;
  std::vector<Ranked<T>> ranked_;
};

}  // namespace

template <class T>
Plan plan(const Problem<T>& p, std::int64_t threads) {
  constexpr std::int64_t kQueryBlock = 40 * kRows, kKeyBlock = 1024, kGrain = 1 << 17, kEntries = 1 << 21;
  const auto ceil = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t entries = std::max<std::int64_t>(1, std::min(p.size, 2 * p.k + 64));
  const std::int64_t most = std::clamp<std::int64_t>(kEntries / entries, 1, kQueryBlock);
  Plan plan;
  plan.query_block = ceil(ceil(p.queries_each, ceil(p.queries_each, most)), kRows) * kRows;
  plan.query_blocks = ceil(p.queries_each, plan.query_block);
  // Few units are made a multiple of the threads by cutting the keys too.
  const std::int64_t whole = p.memories * plan.query_blocks;
  const std::int64_t even = whole < 8 * threads ? threads / std::gcd(whole, threads) : 1;
  const std::int64_t wanted = std::clamp<std::int64_t>(p.size / kKeyBlock, 1, even);
  const std::int64_t blocks = std::max(wanted, ceil(p.size, std::int64_t(1) << 30));  // slots of a block fit 32 bits
  plan.key_block = std::max<std::int64_t>(1, ceil(p.size, blocks));
  plan.key_blocks = std::max<std::int64_t>(1, ceil(p.size, plan.key_block));
  plan.units = whole * plan.key_blocks;
  const std::int64_t work = std::min(plan.query_block, p.queries_each) * plan.key_block * (p.features + 8);
  plan.grain = 1 + kGrain / (1 + work);
  return plan;
}

template <class T>
void search(const Problem<T>& problem, const Plan& plan, std::int64_t first, std::int64_t last, Found<T> found) {
  Screen<T> screen(problem, plan);
  for (std::int64_t unit = first; unit < last; ++unit) screen.run(unit, found);
}

template <class T>
void merge(const Problem<T>& problem, const Plan& plan, Found<T> blocks, Found<T> found) {
  const std::int64_t rows = problem.memories * problem.queries_each, k = problem.k;
  const T sign = problem.metric == Metric::kSqeuclidean ? T(1) : T(-1);
  std::vector<Ranked<T>> ranked;
  for (std::int64_t row = 0; row < rows; ++row) {
    ranked.clear();
    for (std::int64_t block = 0; block < plan.key_blocks; ++block) {
      const std::int64_t from = (block * rows + row) * k;
      for (std::int64_t j = from; j < from + k && blocks.indices[j] >= 0; ++j)
        ranked.push_back({sign * blocks.values[j], blocks.indices[j]});
    }
    write(ranked, k, problem.metric, found.values + row * k, found.indices + row * k);
  }
}

template Plan plan(const Problem<float>&, std::int64_t);
template Plan plan(const Problem<double>&, std::int64_t);
template void search(const Problem<float>&, const Plan&, std::int64_t, std::int64_t, Found<float>);
template void search(const Problem<double>&, const Plan&, std::int64_t, std::int64_t, Found<double>);
template void merge(const Problem<float>&, const Plan&, Found<float>, Found<float>);
template void merge(const Problem<double>&, const Plan&, Found<double>, Found<double>);

}  // namespace eaml::knn
