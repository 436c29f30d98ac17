// Fast scores that skip nearly all keys for certain, exact scores for the rest.
#include "knn/cpu/kernel.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "knn/cpu/vector_inl.h"

namespace eaml::knn {

bool has_pairs(bool is_float) {
  return is_float && pairs_supported();
}

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

// Rows of numbers of T, or of a half type that are read as T.
template <class T>
struct Rows {
  const void* data;
  std::int64_t features;
  Half half;

  const std::byte* address(std::int64_t row) const {
    return static_cast<const std::byte*>(data) + row * features * (half == Half::kNone ? sizeof(T) : 2);
  }
  // `count` rows in place, or as T in `scratch`.
  const T* read(std::int64_t row, std::int64_t count, std::vector<T>& scratch) const {
    if constexpr (sizeof(T) == 4) {
      if (half != Half::kNone) {
        scratch.resize(count * features);
        const auto* from = reinterpret_cast<const std::uint16_t*>(address(row));
        if (half == Half::kBfloat16)
          widen_bfloat16(from, count * features, scratch.data());
        else
          widen_float16(from, count * features, scratch.data());
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

// One memory of the problem, and its exact scores.
template <class T>
struct Memory {
  Rows<T> keys;
  const bool* valid;
  const T* bias;
  Metric metric;

  Memory(const Problem<T>& p, std::int64_t memory)
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

// Writes the best k of `ranked`, which it reorders.
template <class T>
void write_best(std::vector<Ranked<T>>& ranked, std::int64_t k, Metric metric, T* values, std::int64_t* indices) {
  const T sign = metric == Metric::kSqeuclidean ? T(1) : T(-1);
  const std::int64_t count = std::min<std::int64_t>(k, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end());
  for (std::int64_t j = 0; j < count; ++j) values[j] = sign * ranked[j].score, indices[j] = ranked[j].index;
  std::fill(values + count, values + k, sign * std::numeric_limits<T>::infinity());
  std::fill(indices + count, indices + k, std::int64_t(-1));
}

// ---- the short list ----------------------------------------------------------------------------------------------

// Keys that may be among the k best of one query: of what is left out it is certain that k others are better. `margin`
// is the part of the bounds' width that all keys share.
template <class T>
struct Shortlist {
  struct Entry {
    T lower;
    std::int32_t slot;
  };
  std::vector<Entry> entries;
  std::vector<T> best;  // the k least upper bounds met, in order
  T threshold, margin;
  std::size_t k, limit, most;

  void reset(std::int64_t k_, T margin_) {
    entries.clear();
    best.clear();
    threshold = std::numeric_limits<T>::max();
    margin = margin_;
    k = k_, limit = 2 * k + 256, most = 8 * k + 4096;
  }
  // Too many keys are too close to call.
  void give_up() {
    entries.clear();
    threshold = -std::numeric_limits<T>::infinity();
  }
  bool gave_up() const { return threshold == -std::numeric_limits<T>::infinity(); }

  void add(T lower, T upper, std::int32_t slot) {
    if (!(lower <= threshold)) return;
    if (entries.size() >= limit) {
      prune();
      if (entries.size() > most) return give_up();
      limit = std::max(limit, 2 * entries.size());
    }
    entries.push_back({lower, slot});
    if (best.size() == k) {
      if (!(upper < best.back())) return;
      best.pop_back();
    }
    best.insert(std::upper_bound(best.begin(), best.end(), upper), upper);
    if (best.size() == k) threshold = std::min(threshold, best.back() + margin);
  }
  void prune() {
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

// What the bounds of a key are made from: g, the underflow, and whether |x|² is part of the score.
template <class T>
struct KeyBounds {
  T g, tiny;
  bool square;

  KeyBounds(const Bound<T>& bound, Metric metric)
      : g(T(bound.own)), tiny(T(bound.tiny)), square(metric == Metric::kSqeuclidean) {}

  // Norm, start and width of a key's bounds, without the part in |q||x|; `lost` is |x - y|². A bias so low that a bound
  // from below is enough (a mask, as it were) is cut. False: too large, or not a number; the key will always be on the
  // list.
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

// 1 / |x| for the cosine; 0 for the zero vector, NaN where the exact stage must decide.
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

// Packs `count` keys and their bounds; lanes beyond them can never be found.
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

// The centre: of a few keys, the mean. Any finite one is right; a good one keeps the norms and so the error small.
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

constexpr std::int64_t kSample = 32;  // keys of a centre

template <class T>
class Screen {
 public:
  Screen(const Problem<T>& problem, const Plan& plan)
      : problem_(problem),
        plan_(plan),
        bound_(problem.features),
        key_bounds_(bound_, problem.metric),
        pairs_(has_pairs(sizeof(T) == 4)),
        depth_(key_rows(problem.features, pairs_) + 1) {}

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
    if (count_ <= few()) {
      for (std::int64_t q = 0; q < count_; ++q) search_rows(memory, q);
    } else {
      search_panels(memory, memory_index / problem_.keys_share);
      for (std::int64_t q = 0; q < count_; ++q)
        if (lists_[q].gave_up()) search_rows(memory, q);
    }

    const std::int64_t out = (key_block * problem_.memories * problem_.queries_each + row) * problem_.k;
    for (std::int64_t q = 0; q < count_; ++q)
      finish(memory, q, found.values + out + q * problem_.k, found.indices + out + q * problem_.k);
  }

 private:
  // Queries that are searched key by key: as many as do not repay packing, and one where memory is what takes time,
  // because the candidates are at hand when they are evaluated.
  std::int64_t few() const {
    constexpr std::int64_t kFew = 4, kCached = std::int64_t(1) << 25;
    if (!problem_.panels) return kFew;
    const std::int64_t keys = problem_.memories / problem_.keys_share * problem_.size * problem_.features;
    return !pairs_ && problem_.half == Half::kNone && keys * std::int64_t(sizeof(T)) > kCached ? 1 : 0;
  }

  bool cosine() const { return problem_.metric == Metric::kCosine; }
  bool sqeuclidean() const { return problem_.metric == Metric::kSqeuclidean; }

  // One query against keys as they are. The differences of a squared distance are taken directly and need no centre, so
  // errors are relative: g (|q - x|² + |b|), g (|q||x| + |b|), and 2g (1 + |b|) as |x| is rounded like q.x.
  void search_rows(const Memory<T>& memory, std::int64_t q) {
    using L = Limits<T>;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const std::int64_t features = problem_.features;
    const T g = T(bound_.own), tiny = T(bound_.tiny);
    Shortlist<T>& list = lists_[q];
    list.reset(problem_.k, 2 * tiny);
    const T* query = queries_ + q * features;
    if (cosine()) {
      const T factor = scale_of(query, features, problem_.metric);
      row_query_.resize(features);
      for (std::int64_t i = 0; i < features; ++i) row_query_[i] = query[i] * factor;
      query = row_query_.data();
    }
    const T norm = T(std::sqrt(product(query, query, features)));
    if (!bound_.holds() || !(norm <= L::kNorm)) return list.give_up();
    T sum[kPanel] = {}, square[kPanel] = {}, extent[kPanel] = {}, lower[kPanel], upper[kPanel];
    for (std::int64_t slot = begin_; slot < end_; slot += kPanel) {
      const int count = int(std::min<std::int64_t>(kPanel, end_ - slot));
      if (live_bits(memory, slot, count) == 0) continue;
      const T* keys = memory.keys.read(slot, count, wide_);
      if (sqeuclidean())
        difference_rows(query, keys, count, features, sum);
      else
        product_rows(query, keys, count, features, sum, square);
      T bias[kPanel] = {}, spread[kPanel] = {};
      for (int l = 0; memory.bias && l < count; ++l) {
        bias[l] = memory.bias[slot + l];
        if (bias[l] < -L::kBias) bias[l] = -L::kBias, spread[l] = kInfinity;  // cut, as in KeyBounds
      }
      if (cosine()) {
        for (int l = 0; l < count; ++l) {
          const bool safe = square[l] >= T(1e-30) && square[l] <= T(1e30);
          sum[l] *= safe ? -1 / std::sqrt(square[l]) : -scale_of(keys + l * features, features, problem_.metric);
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
      for (int l = count; l < kPanel; ++l) lower[l] = kInfinity;
      if (memory.valid)
        for (int l = 0; l < count; ++l) lower[l] = memory.valid[slot + l] ? lower[l] : kInfinity;
      if (!any_below(lower, list.threshold)) continue;
      for (int l = 0; l < count; ++l) list.add(lower[l], upper[l], std::int32_t(slot + l - begin_));
    }
  }

  // A bit for each live key from `slot` on.
  static std::uint32_t live_bits(const Memory<T>& memory, std::int64_t slot, int count) {
    const std::uint32_t all = ~std::uint32_t(0) >> (kPanel - count);
    if (!memory.valid) return all;
    bool live[kPanel] = {};
    std::copy_n(memory.valid + slot, count, live);
    std::uint32_t bits = 0;
    for (int l = 0; l < kPanel; l += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, live + l, 8);
      bits |= std::uint32_t(eight * 0x0102040810204080u >> 56) << l;  // the byte of a true bool is 1
    }
    return bits;
  }

  void search_panels(const Memory<T>& memory, std::int64_t keys_block) {
    const std::int64_t features = problem_.features;
    centre_.resize(features);
    const T* panels = nullptr;
    if (problem_.panels) {
      panels = problem_.panels + keys_block * panel_count(problem_.size) * panel_size<T>(features);
      const double* state = problem_.state + keys_block * state_size(features);
      for (std::int64_t i = 0; i < features; ++i) centre_[i] = T(state[i]);
    } else {
      const std::int64_t step = std::max<std::int64_t>(1, (end_ - begin_) / kSample);
      Centre<T> centre(features, problem_.metric);
      for (std::int64_t slot = begin_; slot < end_; slot += step)
        if (memory.live(slot)) centre.add(memory.keys.read(slot, 1, wide_));
      centre.write(centre_.data());
      panel_.resize(panel_size<T>(features));
    }
    pack_queries();
    for (std::int64_t slot = begin_; slot < end_; slot += kPanel) {
      const int count = int(std::min<std::int64_t>(kPanel, end_ - slot));
      const std::uint32_t live = live_bits(memory, slot, count);
      if (live == 0) continue;
      if (panels) {
        const T* panel = panels + slot / kPanel * panel_size<T>(features);
        screen(slot, live, panel, slot + kPanel < end_ ? panel + panel_size<T>(features) : panel);
      } else {
        const T* keys = memory.keys.read(slot, count, wide_);
        pack_panel(keys, memory.bias ? memory.bias + slot : nullptr, count, features, centre_.data(), problem_.metric,
                   key_bounds_, wide_panel_, Panel<T>(panel_.data(), features));
        screen(slot, live, panel_.data(), panel_.data());
      }
    }
  }

  // Tiles of nearly equal heights.
  std::int64_t tiles() const { return (count_ + kRows - 1) / kRows; }
  std::int64_t tile_begin(std::int64_t tile) const { return tile * count_ / tiles(); }

  // Negated and transposed, tiles [features + 1][rows]; the last row is g|q|.
  void pack_queries() {
    const std::int64_t features = problem_.features;
    double centre_square = 0;
    for (const T x : centre_) centre_square += double(x) * double(x);
    packed_.resize(count_ * depth_);
    slope_.resize(count_);
    extent_.resize(count_);
    thresholds_.resize(count_);
    for (std::int64_t tile = 0; tile < tiles(); ++tile) {
      const std::int64_t first = tile_begin(tile), rows = tile_begin(tile + 1) - first;
      for (std::int64_t q = first; q < first + rows; ++q) {
        const T* query = queries_ + q * features;
        T* column = packed_.data() + first * depth_ + (q - first);
        const T factor = scale_of(query, features, problem_.metric);
        double squares[4] = {}, lost = 0;
        for (std::int64_t i = 0; i < features; ++i) {
          const T x = sqeuclidean() ? query[i] - centre_[i] : query[i] * factor;
          squares[i % 4] += double(x) * double(x);
          if (pairs_)
            lost += put_pair(column + i / 2 * rows, i % 2, float(-x));
          else
            column[i * rows] = -x;
        }
        if (pairs_ && features % 2) put_pair(column + features / 2 * rows, 1, 0);
        const double norm = std::sqrt((squares[0] + squares[1]) + (squares[2] + squares[3]));
        T* last = column + (depth_ - 1) * rows;
        slope_[q] = T(bound_.own * norm), extent_[q] = 0;
        *last = -slope_[q];
        if constexpr (sizeof(T) == 4) {
          if (pairs_) {
            const double rest = std::sqrt(lost) * (1 + bound_.own) + Limits<T>::kTiny, most = norm * (1 + bound_.own);
            const std::uint32_t slope = round_up(float(2 * bound_.own * (most + rest) + rest)),
                                whole = round_up(float(most) + Limits<T>::kTiny);
            slope_[q] = low(slope), extent_[q] = low(whole);
            *last = std::bit_cast<float>(slope | whole << 16 | 0x80008000u);
          }
        }
        const double extent = sqeuclidean() ? norm : std::sqrt(centre_square) + (cosine() ? 1 : 0);
        lists_[q].reset(problem_.k, T(2 * (bound_.shared * norm * extent + bound_.tiny)));
        if (!bound_.holds() || !(norm <= Limits<T>::kNorm)) {
          lists_[q].give_up();
          for (std::int64_t i = 0; i < depth_; ++i) column[i * rows] = 0;
        }
        thresholds_[q] = lists_[q].threshold;
      }
    }
  }

  // Half of a pair of bfloat16; returns what rounding took, squared.
  static double put_pair(T* pair, int half, float x) {
    const std::uint32_t bits = to_pairs(x);
    const auto part = std::uint16_t(bits);
    std::memcpy(reinterpret_cast<std::byte*>(pair) + 2 * half, &part, 2);
    const double rest = double(x) - double(std::bit_cast<float>(bits << 16));
    return rest * rest;
  }

  // Twice the part of the bounds in |q||x|.
  T spread(std::int64_t q, T norm) const {
    if constexpr (sizeof(T) == 4) {
      if (pairs_) {
        const auto pair = std::bit_cast<std::uint32_t>(norm);
        return 2 * (slope_[q] * low(pair) + extent_[q] * high(pair));
      }
    }
    return 2 * slope_[q] * norm;
  }

  std::uint32_t products(int rows, const Tile<T>& tile) const {
    if constexpr (sizeof(T) == 4) {
      if (pairs_) return tile_of_pairs(rows, tile);
    }
    return knn::tile(rows, tile);
  }

  // All queries against one panel; the one after it is on its way meanwhile. Dead keys are left out where they hit: to
  // mask them all beforehand would cost as much as the products of a few queries.
  void screen(std::int64_t slot, std::uint32_t live, const T* at, const T* ahead) {
    const Panel<const T> panel(at, problem_.features);
    alignas(kAlignment) T scores[kRows * kPanel];
    std::uint32_t hits[kRows];
    Tile<T> tile{nullptr, panel.keys, panel.start, nullptr, ahead, depth_, scores, hits};
    for (std::int64_t t = 0; t < tiles(); ++t, tile.ahead = at) {
      const std::int64_t first = tile_begin(t);
      const int rows = int(tile_begin(t + 1) - first);
      tile.queries = packed_.data() + first * depth_;
      tile.thresholds = thresholds_.data() + first;
      if (products(rows, tile) == 0) continue;
      for (int r = 0; r < rows; ++r) {
        if ((hits[r] & live) == 0) continue;
        Shortlist<T>& list = lists_[first + r];
        for (std::uint32_t bits = hits[r] & live; bits != 0; bits &= bits - 1) {
          const int l = std::countr_zero(bits);
          const T lower = scores[r * kPanel + l];
          list.add(lower, lower + panel.width[l] + spread(first + r, panel.norms[l]), std::int32_t(slot + l - begin_));
        }
        thresholds_[first + r] = list.threshold;
      }
    }
  }

  void finish(const Memory<T>& memory, std::int64_t q, T* values, std::int64_t* indices) {
    const T* query = queries_ + q * problem_.features;
    const double norm = cosine() ? std::sqrt(product(query, query, problem_.features)) : 0;
    Shortlist<T>& list = lists_[q];
    ranked_.clear();
    list.prune();
    if (!list.gave_up()) {
      for (const auto& entry : list.entries) memory.keys.prefetch(begin_ + entry.slot);
      for (const auto& entry : list.entries) {
        const std::int64_t slot = begin_ + entry.slot;
        ranked_.push_back({memory.score(query, norm, slot, wide_), slot});
      }
    } else {
      const std::size_t k = std::size_t(problem_.k);
      for (std::int64_t slot = begin_; slot < end_; ++slot) {
        if (!memory.live(slot)) continue;
        const Ranked<T> next{memory.score(query, norm, slot, wide_), slot};
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
    write_best(ranked_, problem_.k, problem_.metric, values, indices);
  }

  const Problem<T>& problem_;
  const Plan& plan_;
  const Bound<T> bound_;
  const KeyBounds<T> key_bounds_;
  const bool pairs_;
  const std::int64_t depth_;  // rows of a panel that the products run over
  std::int64_t begin_ = 0, end_ = 0, count_ = 0;
  const T* queries_ = nullptr;
  std::vector<T> centre_, packed_, slope_, extent_, thresholds_, panel_, wide_panel_, row_query_, wide_;
  std::vector<Shortlist<T>> lists_;
  std::vector<Ranked<T>> ranked_;
};

// ---- stores ------------------------------------------------------------------------------------------------------

template <class T>
class Writer {
 public:
  explicit Writer(const Store<T>& store)
      : store_(store),
        rows_{store.keys, store.features, store.half},
        biases_{store.bias, 1, store.half},
        bounds_(Bound<T>(store.features), store.metric),
        sum_(store.state + store.features),
        square_(sum_[store.features]),
        count_(sum_[store.features + 1]),
        stale_(sum_[store.features + 2]),
        centre_(store.features) {
    for (std::int64_t i = 0; i < store.features; ++i) centre_[i] = T(store.state[i]);
  }

  void write(const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias) {
    if (keys && count_ == 0) {
      Centre<T> centre(store_.features, store_.metric);
      const Rows<T> given{keys, store_.features, store_.half};
      for (std::int64_t i = 0; i < count; i += std::max<std::int64_t>(1, count / kSample))
        centre.add(given.read(i, 1, wide_));
      centre.write(centre_.data());
      restart();
    }
    for (std::int64_t i = 0, run; i < count; i += run) {
      const std::int64_t slot = slots[i];
      run = keys ? run_length(slots + i, count - i) : 1;
      for (std::int64_t s = slot; s < slot + run; ++s) {
        if (store_.live[s]) tally(s, -1);
        store_.live[s] = keys != nullptr;
      }
      if (!keys) continue;
      copy(rows_, slot, keys, i, run);
      copy(biases_, slot, bias, i, run);
      if (run == kPanel)
        pack_panel_at(slot);
      else
        pack_slot(slot);
      for (std::int64_t s = slot; s < slot + run; ++s) tally(s, 1);
    }
    stale_ += double(count);
    if (8 * stale_ >= count_ && drifted()) recentre();
  }

  void repack() {
    std::fill(centre_.begin(), centre_.end(), T(0));
    restart();
    tally_all();
    recentre();
  }

 private:
  // Slots packed at once: a panel, where the next slots are one.
  std::int64_t run_length(const std::int64_t* slots, std::int64_t left) const {
    if (slots[0] % kPanel != 0 || left < kPanel) return 1;
    for (int l = 1; l < kPanel; ++l)
      if (slots[l] != slots[0] + l) return 1;
    return kPanel;
  }

  // Of 0 where there is nothing to copy from.
  static void copy(const Rows<T>& to, std::int64_t row, const void* from, std::int64_t first, std::int64_t count) {
    const auto bytes = std::size_t(to.address(row + count) - to.address(row));
    void* target = const_cast<std::byte*>(to.address(row));
    if (from)
      std::memcpy(target, Rows<T>{from, to.features, to.half}.address(first), bytes);
    else
      std::memset(target, 0, bytes);
  }

  Panel<T> panel_at(std::int64_t slot) const {
    return {store_.panels + slot / kPanel * panel_size<T>(store_.features), store_.features};
  }

  void pack_panel_at(std::int64_t slot) {
    const auto count = std::min<std::int64_t>(kPanel, store_.capacity - slot);
    pack_panel(rows_.read(slot, count, wide_), biases_.read(slot, count, wide_bias_), int(count), store_.features,
               centre_.data(), store_.metric, bounds_, wide_panel_, panel_at(slot));
  }

  void pack_slot(std::int64_t slot) {
    const std::int64_t features = store_.features;
    const int lane = int(slot % kPanel);
    const T* key = rows_.read(slot, 1, wide_);
    const T scale = scale_of(key, features, store_.metric);
    const Panel<T> panel = panel_at(slot);
    T square = 0, lost = 0;
    for (std::int64_t i = 0; i < features; ++i) {
      const T x = key[i] * scale - centre_[i];
      square += x * x;
      if (has_pairs(sizeof(T) == 4)) {
        const std::uint32_t bits = to_pairs(float(x));
        const T rest = x - T(std::bit_cast<float>(bits << 16));
        const auto part = std::uint16_t(bits);
        std::memcpy(reinterpret_cast<std::byte*>(panel.keys + i / 2 * kPanel + lane) + 2 * (i % 2), &part, 2);
        lost += rest * rest;
      } else {
        panel.keys[i * kPanel + lane] = x;
      }
    }
    const T bias = *biases_.read(slot, 1, wide_bias_);
    if (!bounds_.set(square, lost, bias, panel, lane)) clear(panel, lane);
  }

  void restart() {
    std::fill(sum_, sum_ + store_.features + 3, 0.0);
    std::copy(centre_.begin(), centre_.end(), store_.state);
  }

  // Adds a key to the sums, or takes it away. Keys that no centre serves are left out.
  void tally(std::int64_t slot, int sign) {
    const T* key = rows_.read(slot, 1, wide_);
    const T scale = scale_of(key, store_.features, store_.metric);
    const double square = offset_square(key, scale, centre_.data(), store_.features);
    if (!(square <= double(Limits<T>::kNorm) * double(Limits<T>::kNorm))) return;
    accumulate(key, scale, centre_.data(), T(sign), store_.features, sum_);
    square_ += sign * square;
    count_ += sign;
  }
  void tally_all() {
    for (std::int64_t slot = 0; slot < store_.capacity; ++slot)
      if (store_.live[slot]) tally(slot, 1);
  }

  // Whether the mean is farther from the centre than keys are from the mean.
  bool drifted() const {
    double offset = 0;
    for (std::int64_t i = 0; i < store_.features; ++i) offset += sum_[i] * sum_[i];
    return count_ > 0 && 2 * offset > square_ * count_;
  }

  void recentre() {
    for (std::int64_t i = 0; i < store_.features; ++i) {
      const T mean = T(centre_[i] + sum_[i] / std::max(count_, 1.0));
      centre_[i] = std::abs(mean) <= Limits<T>::kNorm ? mean : 0;
    }
    restart();
    for (std::int64_t slot = 0; slot < store_.capacity; slot += kPanel) {
      const auto count = std::min<std::int64_t>(kPanel, store_.capacity - slot);
      if (std::memchr(store_.live + slot, 1, count)) pack_panel_at(slot);
    }
    tally_all();
  }

  const Store<T>& store_;
  const Rows<T> rows_, biases_;
  const KeyBounds<T> bounds_;
  double *sum_, &square_, &count_, &stale_;
  std::vector<T> centre_, wide_, wide_bias_, wide_panel_;
};

}  // namespace

template <class T>
Plan plan(const Problem<T>& p, std::int64_t threads) {
  constexpr std::int64_t kQueryBytes = 1 << 19, kKeyBlock = 1024, kGrain = 1 << 17, kEntries = 1 << 21;
  const auto ceil = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t entries = std::max<std::int64_t>(1, std::min(p.size, 2 * p.k + 64));
  const std::int64_t cached = std::max<std::int64_t>(kRows, kQueryBytes / std::int64_t(sizeof(T) * (p.features + 1)));
  const std::int64_t most = std::clamp<std::int64_t>(kEntries / entries, 1, cached);
  Plan plan;
  plan.query_block = ceil(ceil(p.queries_each, ceil(p.queries_each, most)), kRows) * kRows;
  plan.query_blocks = ceil(p.queries_each, plan.query_block);
  // Few units are made a multiple of the threads by cutting the keys too, between panels.
  const std::int64_t whole = p.memories * plan.query_blocks;
  const std::int64_t even = whole < 8 * threads ? threads / std::gcd(whole, threads) : 1;
  const std::int64_t wanted = std::clamp<std::int64_t>(p.size / kKeyBlock, 1, even);
  const std::int64_t blocks = std::max(wanted, ceil(p.size, std::int64_t(1) << 30));  // slots of a block fit 32 bits
  plan.key_block = std::max<std::int64_t>(1, ceil(ceil(p.size, blocks), kPanel)) * kPanel;
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
    write_best(ranked, k, problem.metric, found.values + row * k, found.indices + row * k);
  }
}

template <class T>
void write(const Store<T>& store, const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias) {
  Writer<T>(store).write(slots, count, keys, bias);
}

template <class T>
void repack(const Store<T>& store) {
  Writer<T>(store).repack();
}

#define EAML_INSTANTIATE(T)                                                                          \
  template Plan plan(const Problem<T>&, std::int64_t);                                               \
  template void search(const Problem<T>&, const Plan&, std::int64_t, std::int64_t, Found<T>);        \
  template void merge(const Problem<T>&, const Plan&, Found<T>, Found<T>);                           \
  template void write(const Store<T>&, const std::int64_t*, std::int64_t, const void*, const void*); \
  template void repack(const Store<T>&);
EAML_INSTANTIATE(float)
EAML_INSTANTIATE(double)

}  // namespace eaml::knn
