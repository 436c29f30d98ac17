// The CUDA kernels of knn. Two ways lead to the k best of a query, and to the same bits.
//
// `rows`: every key's value in double, directly; a block takes some queries and a range of keys and keeps the best of
// them in shared memory. For few queries, which memory keeps waiting anyway, and for double precision.
//
// `screen`: products on tensor cores, of keys and queries that are centred and rounded to bfloat16, give a lower bound
// of each value. A sample of the keys yields for each query a threshold that k keys are certainly within; all keys with
// a lower bound within it go on the query's list. `select` leaves those of the list that may be among the k best, and
// takes their values in double. Queries whose lists overflow, because too many keys are too close to call, or whose
// numbers are too large for bounds, go the other way.
//
// No kernel waits for another but by their order, and none has a result that depends on the order of its threads.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "common/cuda.h"
#include "common/half.h"
#include "knn/cuda_kernel.h"

namespace eaml::knn {
namespace {

using cuda::Shared;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kThreads = 256, kWarps = kThreads / cuda::kWarp;

// ---- exact values and their order ----

// A score and a slot as one integer: the smaller, the better. A score is a squared distance less bias, or a negated
// similarity; NaN comes last, equal ones in the order of slots.
template <class T>
using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <class T>
using Entry = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;
template <class E>
constexpr E kNone = ~E(0);
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

template <class T>
EAML_DEVICE Word<T> word_of(T score) {
  if (score != score) return ~Word<T>(0);
  const auto bits = __builtin_bit_cast(Word<T>, score + T(0));  // one zero
  constexpr Word<T> kSign = Word<T>(1) << (8 * sizeof(T) - 1);
  return bits & kSign ? ~bits : bits | kSign;
}
template <class T>
EAML_DEVICE T score_of(Word<T> word) {
  if (word == ~Word<T>(0)) return kNaN<T>;
  constexpr Word<T> kSign = Word<T>(1) << (8 * sizeof(T) - 1);
  return __builtin_bit_cast(T, word & kSign ? word & ~kSign : ~word);
}
template <class T>
EAML_DEVICE Entry<T> entry_of(T score, uint32_t slot) {
  return Entry<T>(word_of(score)) << 32 | slot;
}

// One memory of the problem, as exact values need it.
template <class T>
struct Memory {
  const char* keys;
  int64_t features, row_bytes;
  Half half;
  const bool* valid;
  const T* bias;
  Metric metric;

  EAML_MEMBER Memory(const Problem<T>& p, int64_t memory)
      : keys(static_cast<const char*>(p.keys)),
        features(p.features),
        row_bytes(p.features * (p.half == Half::kNone ? sizeof(T) : 2)),
        half(p.half),
        valid(p.valid == nullptr ? nullptr : p.valid + memory / p.valid_share * p.size),
        bias(p.bias == nullptr ? nullptr : p.bias + memory / p.bias_share * p.size),
        metric(p.metric) {
    keys += memory / p.keys_share * p.size * row_bytes;
  }
  EAML_MEMBER bool live(int64_t slot) const { return valid == nullptr || valid[slot]; }
  EAML_MEMBER T weight(int64_t slot) const { return bias == nullptr ? T(0) : cuda::load(bias + slot); }
};

template <class T>
EAML_DEVICE T read_number(const void* row, int64_t i, Half half) {
  if constexpr (sizeof(T) == 4) {
    const auto* from = static_cast<const uint16_t*>(row) + i;
    if (half == Half::kBfloat16) return load_half<Half::kBfloat16, T>(from);
    if (half == Half::kFloat16) return load_half<Half::kFloat16, T>(from);
  }
  return cuda::load(static_cast<const T*>(row) + i);
}

// Features i ... i + 3 of a row, 0 beyond its end. Plain rows are of T, aligned, and of a multiple of four features.
template <bool kPlain, class T>
EAML_DEVICE void read_four(T (&to)[4], const void* row, int64_t i, int64_t features, Half half) {
  if constexpr (kPlain) {
    cuda::load_row(to, static_cast<const T*>(row) + i);
  } else {
    EAML_UNROLL
    for (int j = 0; j < 4; ++j) to[j] = i + j < features ? read_number<T>(row, i + j, half) : T(0);
  }
}

// A query as numbers of T in global memory, or in double in shared memory, padded with zeros.
template <class T>
struct Query {
  const T* row;
  int64_t features;
  EAML_MEMBER void four(double (&to)[4], int64_t i) const {
    EAML_UNROLL
    for (int j = 0; j < 4; ++j) to[j] = i + j < features ? double(cuda::load(row + i + j)) : 0;
  }
};
struct StagedQuery {
  Shared<double> row;
  EAML_MEMBER void four(double (&to)[4], int64_t i) const { row.get_row(to, static_cast<int>(i)); }
};

// Sums over features that two neighbouring threads share: lane l of eight sums features l, l + 8, ..., every product
// rounded before it is added, and lanes join in pairs, in the order of csrc/knn/cpu_vector_inl.h.
EAML_DEVICE int lanes_begin() {
  return cuda::thread() % 2 * 4;
}
EAML_DEVICE double join_lanes(double (&lane)[4]) {
  EAML_UNROLL
  for (int j = 0; j < 4; ++j) lane[j] = lane[j] + cuda::shuffle_xor(lane[j], 1);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// The sums of a metric between keys and queries; `square`: of the keys' squares, for the cosine.
template <Metric kMetric, bool kPlain, class T, class Q, int kKeys, int kQueries>
EAML_DEVICE void sums(double (&sum)[kKeys][kQueries], double (&square)[kKeys], const void* const (&keys)[kKeys],
                      const Q (&queries)[kQueries], int64_t features, Half half) {
  double lane[kKeys][kQueries][4] = {}, squares[kKeys][4] = {};
  EAML_UNROLL_BY((kQueries == 1 && (kKeys == 1 || kMetric != Metric::kCosine) ? 4 : 2))
  for (int64_t i = lanes_begin(); i < features; i += 8) {
    T row[kKeys][4];
    EAML_UNROLL
    for (int k = 0; k < kKeys; ++k) read_four<kPlain>(row[k], keys[k], i, features, half);
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      double query[4];
      queries[q].four(query, i);
      EAML_UNROLL
      for (int k = 0; k < kKeys; ++k) {
        EAML_UNROLL
        for (int j = 0; j < 4; ++j) {
          const double x = row[k][j], d = query[j] - x;
          lane[k][q][j] += kMetric == Metric::kSqeuclidean ? cuda::multiply(d, d) : cuda::multiply(query[j], x);
        }
      }
    }
    if constexpr (kMetric == Metric::kCosine) {
      EAML_UNROLL
      for (int k = 0; k < kKeys; ++k) {
        EAML_UNROLL
        for (int j = 0; j < 4; ++j) squares[k][j] += cuda::multiply(double(row[k][j]), double(row[k][j]));
      }
    }
  }
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) sum[k][q] = join_lanes(lane[k][q]);
    if constexpr (kMetric == Metric::kCosine) square[k] = join_lanes(squares[k]);
  }
}

// The exact scores of keys, for both threads. `norms`: of the queries, for the cosine.
template <bool kPlain, class T, class Q, int kKeys, int kQueries>
EAML_DEVICE void scores(T (&to)[kKeys][kQueries], const Memory<T>& memory, const int64_t (&slots)[kKeys],
                        const Q (&queries)[kQueries], const double (&norms)[kQueries]) {
  const void* keys[kKeys];
  double sum[kKeys][kQueries], square[kKeys] = {}, weight[kKeys];
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k)
    keys[k] = memory.keys + slots[k] * memory.row_bytes, weight[k] = memory.weight(slots[k]);
  if (memory.metric == Metric::kSqeuclidean)
    sums<Metric::kSqeuclidean, kPlain, T>(sum, square, keys, queries, memory.features, memory.half);
  else if (memory.metric == Metric::kCosine)
    sums<Metric::kCosine, kPlain, T>(sum, square, keys, queries, memory.features, memory.half);
  else
    sums<Metric::kInnerProduct, kPlain, T>(sum, square, keys, queries, memory.features, memory.half);
  EAML_UNROLL
  for (int k = 0; k < kKeys; ++k) {
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      double value = sum[k][q];
      if (memory.metric == Metric::kSqeuclidean) {
        to[k][q] = T(value - weight[k]);
        continue;
      }
      if (memory.metric == Metric::kCosine) {
        const double norm = cuda::multiply(norms[q], std::sqrt(square[k]));
        value = norm == 0 ? 0 : value / norm;
      }
      to[k][q] = T(-(value + weight[k]));
    }
  }
}

// |query|, for all threads.
template <class T>
EAML_DEVICE double norm_of(const T* query, int64_t features) {
  double sum[1][1], square[1];
  const void* const keys[1] = {query};
  const Query<T> rows[1] = {{query, features}};
  sums<Metric::kInnerProduct, false, T>(sum, square, keys, rows, features, Half::kNone);
  return std::sqrt(sum[0][0]);
}

// ---- the best k ----

// How a block shares out places: a thread's among those of the block that say yes. One barrier.
struct Places {
  Shared<uint32_t> counts;  // [2][lists][kWarps]
  int parity = 0;

  template <int kLists>
  EAML_MEMBER void find(const bool (&yes)[kLists], int (&place)[kLists], int (&total)[kLists]) {
    const int lane = cuda::thread() % cuda::kWarp, warp = cuda::thread() / cuda::kWarp, at = parity * kLists * kWarps;
    uint32_t votes[kLists];
    EAML_UNROLL
    for (int i = 0; i < kLists; ++i) {
      votes[i] = cuda::ballot(yes[i]);
      if (lane == 0) counts.set(at + i * kWarps + warp, cuda::count_bits(votes[i]));
    }
    cuda::sync_block();
    EAML_UNROLL
    for (int i = 0; i < kLists; ++i) {
      place[i] = cuda::count_bits(votes[i] & ((1u << lane) - 1)), total[i] = 0;
      EAML_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        const int count = counts.get(at + i * kWarps + w);
        place[i] += w < warp ? count : 0, total[i] += count;
      }
    }
    parity ^= 1;  // who is slow still reads these
  }
  EAML_INLINE static constexpr int size(int lists) { return 2 * lists * kWarps; }
};

constexpr int kFresh = 2 * kThreads;

// Between two steps of a sort: threads of a warp exchange what is up to 32 apart.
EAML_DEVICE void settle(int stride, int next) {
  stride <= cuda::kWarp&& next <= cuda::kWarp ? cuda::sync_warp() : cuda::sync_block();
}
template <class E>
EAML_DEVICE void exchange(const Shared<E>& x, int n, int stride, int size) {
  for (int p = cuda::thread(); p < n / 2; p += kThreads) {
    const int i = 2 * p - (p & (stride - 1));
    const E a = x.get(i), b = x.get(i + stride);
    if ((b < a) == ((i & size) == 0)) x.set(i, b), x.set(i + stride, a);
  }
}

// The k least entries that all threads of a block have come with, in shared memory.
template <class E>
struct Best {
  Shared<E> best;   // [kept], in order
  Shared<E> fresh;  // [kFresh], what has come since
  int k = 0, kept = 0, count = 0;
  E limit = kNone<E>;  // what is not less is not among them

  static int kept_for(int64_t k) {
    int kept = 2;
    while (kept < k) kept *= 2;
    return kept;
  }
  static std::size_t bytes(int64_t k) { return (kept_for(k) + kFresh) * sizeof(E); }

  EAML_MEMBER void start(char* memory, int k_, int kept_) {
    best.data = reinterpret_cast<E*>(memory), fresh.data = best.data + kept_;
    k = k_, kept = kept_, count = 0, limit = kNone<E>;
    for (int i = cuda::thread(); i < kept; i += kThreads) best.set(i, kNone<E>);
  }

  EAML_MEMBER void flush() {
    if (count == 0) return;
    cuda::sync_block();
    int n = cuda::kWarp;
    while (n < count) n *= 2;
    for (int i = count + cuda::thread(); i < n; i += kThreads) fresh.set(i, kNone<E>);
    cuda::sync_block();
    for (int size = 2; size <= n; size *= 2)
      for (int stride = size / 2; stride > 0; stride /= 2) {
        exchange(fresh, n, stride, size);
        settle(stride, stride > 1 ? stride / 2 : size < n ? size : kThreads);
      }
    for (int i = cuda::thread(); i < kept; i += kThreads) {
      const int from = kept - 1 - i;  // the least of a sequence and of one in reverse go up, then down
      if (from >= n) continue;
      const E e = fresh.get(from);
      if (e < best.get(i)) best.set(i, e);
    }
    cuda::sync_block();
    for (int stride = kept / 2; stride > 0; stride /= 2) {
      exchange(best, kept, stride, 2 * kept);
      settle(stride, stride > 1 ? stride / 2 : kThreads);
    }
    limit = best.get(k - 1);
    count = 0;
  }
};

// All threads come with an entry for each list, or with none. How many were taken of the first.
template <class E, int kLists>
EAML_DEVICE int push(Best<E> (&lists)[kLists], const E (&entries)[kLists], Places& places) {
  bool yes[kLists];
  int place[kLists], total[kLists];
  EAML_UNROLL
  for (int i = 0; i < kLists; ++i) yes[i] = entries[i] < lists[i].limit;
  places.find(yes, place, total);
  EAML_UNROLL
  for (int i = 0; i < kLists; ++i) {
    if (yes[i]) lists[i].fresh.set(lists[i].count + place[i], entries[i]);
    lists[i].count += total[i];
    if (lists[i].count > kFresh - kThreads) lists[i].flush();
  }
  return total[0];
}

// The results of a query; behind a flush.
template <class T>
EAML_DEVICE void write_best(const Best<Entry<T>>& list, const Problem<T>& p, const Found<T>& found, int64_t row) {
  const T sign = p.metric == Metric::kSqeuclidean ? T(1) : T(-1);
  for (int64_t j = cuda::thread(); j < p.k; j += kThreads) {
    const Entry<T> e = j < list.k ? list.best.get(static_cast<int>(j)) : kNone<Entry<T>>;
    const bool none = e == kNone<Entry<T>>;
    found.values[row * p.k + j] = none ? sign * kInfinity<T> : sign * score_of<T>(Word<T>(e >> 32)) + T(0);
    found.indices[row * p.k + j] = none ? -1 : static_cast<int64_t>(static_cast<uint32_t>(e));
  }
}

// ---- rows ----

// Queries that are searched directly: all, or those of a list of rows that an earlier kernel has written.
template <class T>
struct RowsTask {
  Problem<T> problem;
  Found<T> found;
  Entry<T>* partial;  // (query or place in the list, k, part), where there are several parts
  const int64_t* list;
  const uint32_t* list_count;
  int64_t parts, part, groups, blocks;
  int k, kept;
};

template <class T, int kQueries, bool kPlain>
EAML_KERNEL(kThreads, kQueries == 1 ? 2 : 1)
rows_kernel(EAML_CONSTANT RowsTask<T> p) {
  using E = Entry<T>;
  constexpr bool kStaged = kPlain;
  const Problem<T>& problem = p.problem;
  const int64_t features = problem.features, padded = (features + 7) / 8 * 8;
  char* memory_at = cuda::shared_memory();
  const Shared<double> staged{reinterpret_cast<double*>(memory_at)};
  if constexpr (kStaged) memory_at += kQueries * padded * sizeof(double);
  Places places{{reinterpret_cast<uint32_t*>(memory_at)}};
  memory_at += Places::size(kQueries) * sizeof(uint32_t);
  const int64_t units = p.parts * (p.list == nullptr ? problem.memories * p.groups : int64_t(*p.list_count));
  for (int64_t unit = cuda::block(); unit < units; unit += p.blocks) {
    cuda::sync_block();  // what the unit before has left is still read
    const int64_t part = unit % p.parts, index = unit / p.parts;
    const int64_t group = p.list == nullptr ? index % p.groups : 0;
    const int64_t first =
        p.list == nullptr ? index / p.groups * problem.queries_each + group * kQueries : p.list[index];
    const int64_t left = problem.queries_each - group * kQueries;
    const int count = static_cast<int>(p.list == nullptr ? (left < kQueries ? left : kQueries) : 1);
    const Memory<T> memory(problem, first / problem.queries_each);
    std::conditional_t<kStaged, StagedQuery, Query<T>> queries[kQueries];
    Best<E> lists[kQueries];
    double norms[kQueries];
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const T* row = problem.queries + (first + (q < count ? q : 0)) * features;
      lists[q].start(memory_at + q * (p.kept + kFresh) * sizeof(E), p.k, p.kept);
      norms[q] = memory.metric == Metric::kCosine ? norm_of(row, features) : 0;
      if constexpr (kStaged) {
        queries[q].row = staged.at(static_cast<int>(q * padded));
        for (int64_t i = cuda::thread(); i < padded; i += kThreads)
          queries[q].row.set(static_cast<int>(i), i < features ? double(cuda::load(row + i)) : 0);
      } else {
        queries[q] = {row, features};
      }
    }
    cuda::sync_block();
    const int64_t begin = part * p.part, end = begin + p.part < problem.size ? begin + p.part : problem.size;
    // Two threads take two keys, at once where that leaves registers, and each of them keeps one.
    constexpr int kKeys = kPlain && kQueries == 1 ? 2 : 1;
    for (int64_t slot = begin; slot < end; slot += kThreads) {
      const int64_t mine = slot + cuda::thread(), pair = mine / 2 * 2;
      T score[kQueries];
      for (int k = 0; k < 2; k += kKeys) {
        T found[kKeys][kQueries];
        int64_t slots[kKeys];
        EAML_UNROLL
        for (int i = 0; i < kKeys; ++i) slots[i] = pair + k + i < end ? pair + k + i : end - 1;
        scores<kPlain>(found, memory, slots, queries, norms);
        EAML_UNROLL
        for (int i = 0; i < kKeys; ++i)
          for (int q = 0; q < kQueries; ++q) score[q] = k + i == 0 || cuda::thread() % 2 == 1 ? found[i][q] : score[q];
      }
      const bool live = mine < end && memory.live(mine);
      E entries[kQueries];
      EAML_UNROLL
      for (int q = 0; q < kQueries; ++q)
        entries[q] = live && q < count ? entry_of(score[q], static_cast<uint32_t>(mine)) : kNone<E>;
      push(lists, entries, places);
    }
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      if (q >= count) continue;
      lists[q].flush();
      if (p.partial == nullptr) {
        write_best(lists[q], problem, p.found, first + q);
        continue;
      }
      const int64_t row = p.list == nullptr ? first + q : index;
      cuda::sync_block();
      for (int j = cuda::thread(); j < p.k; j += kThreads)
        p.partial[(row * p.k + j) * p.parts + part] = lists[q].best.get(j);
    }
  }
}

// The best of what the parts have found.
template <class T>
EAML_KERNEL(kThreads)
merge_kernel(EAML_CONSTANT RowsTask<T> p) {
  using E = Entry<T>;
  const Problem<T>& problem = p.problem;
  Places places{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  const int64_t rows = p.list == nullptr ? problem.memories * problem.queries_each : int64_t(*p.list_count);
  for (int64_t row = cuda::block(); row < rows; row += p.blocks) {
    cuda::sync_block();
    Best<E> lists[1];
    lists[0].start(cuda::shared_memory() + Places::size(1) * sizeof(uint32_t), p.k, p.kept);
    cuda::sync_block();
    // Each part's best come first: where no part's next is good enough, none behind it is.
    const int64_t count = p.parts * p.k;
    for (int64_t i = 0; i < count; i += kThreads) {
      const int64_t at = i + cuda::thread();
      const E entries[1] = {at < count ? p.partial[row * count + at] : kNone<E>};
      if (push(lists, entries, places) == 0 && p.parts <= kThreads) break;
    }
    lists[0].flush();
    cuda::sync_block();
    write_best(lists[0], problem, p.found, p.list == nullptr ? row : p.list[row]);
  }
}

// ---- bounds ----

// The bounds are those of csrc/knn/cpu_kernel.cpp for pairs of bfloat16 numbers, where they are derived; but for the
// products, whose sums tensor cores take in steps of 16. A step aligns its 17 terms to the largest and may cut each at
// 24 bits, and the sum too: an error of up to 18 2^-23 times the sum of their magnitudes, 2.25 u a product instead of
// u. kRounding u covers it.
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

// ---- packing inside a call ----

// A screened call, or as many queries of it as its memory has room for, in tiles of the rows of one memory.
struct Screen {
  Problem<float> problem;
  Found<float> found;
  Packed packed;
  float* centres;  // (blocks of keys, features)
  int64_t keys_blocks, sets, sets_share, depth;
  int64_t tile_rows, tiles_each, first_tile, tiles;  // tiles: of rows of queries
  int64_t sample, stride, capacity, splits, sample_splits;
  int k, kept, sample_k, sample_kept;
  // Of a query of these tiles.
  uint16_t* queries;  // negated, [depth]
  float *slope, *extent, *margin, *threshold;
  float* sampled;   // [sample], upper bounds
  uint32_t* count;  // of the list
  struct Candidate {
    float lower, upper;
    uint32_t slot, unused;
  }* list;          // [capacity]
  int64_t* failed;  // queries that are left, of all
  uint32_t* failed_count;
  Entry<float>* partial;  // for those
  int64_t failed_parts, failed_part, failed_blocks;

  EAML_MEMBER int64_t memory(int64_t row) const { return (first_tile + row / tile_rows) / tiles_each; }
  EAML_MEMBER int64_t query(int64_t row) const {
    return (first_tile + row / tile_rows) % tiles_each * tile_rows + row % tile_rows;
  }
  EAML_MEMBER bool exists(int64_t row) const { return query(row) < problem.queries_each; }
  EAML_MEMBER KeyRows keys(int64_t block) const {
    const KeyRows all{static_cast<const char*>(problem.keys), problem.features, problem.half};
    return {static_cast<const char*>(all.row(block * problem.size)), problem.features, problem.half};
  }
};

EAML_KERNEL(kThreads)
centre_kernel(EAML_CONSTANT Screen p) {
  const int64_t block = cuda::block(), memory = block * p.problem.keys_share;
  const bool* valid = p.problem.valid;
  if (valid != nullptr) valid += memory / p.problem.valid_share * p.problem.size;
  find_centre(p.keys(block), p.problem.size, valid, p.problem.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              p.centres + block * p.problem.features);
}

// A block packs a panel; each key may have bounds of several memories.
EAML_KERNEL(kThreads, 2)
pack_kernel(EAML_CONSTANT Screen p) {
  const Problem<float>& problem = p.problem;
  const int64_t panels = panel_count(problem.size), block = cuda::block() / panels;
  const int64_t first = cuda::block() % panels * kPanel;
  const KeyRows keys = p.keys(block);
  const Bound bound(problem.features);
  const int64_t sets_each = p.sets / p.keys_blocks;
  constexpr int kEach = kPanel / kWarps;
  const int64_t mine = first + cuda::thread() / cuda::kWarp * kEach;
  if (mine >= problem.size) return;
  int64_t slots[kEach];
  uint16_t* rows[kEach];
  uint32_t* norms[kEach];
  float square[kEach];
  EAML_UNROLL
  for (int k = 0; k < kEach; ++k) {
    slots[k] = mine + k < problem.size ? mine + k : -1;
    rows[k] = p.packed.key(block, mine + k, p.depth), norms[k] = p.packed.norm(block, mine + k);
  }
  pack_keys(square, keys, slots, rows, norms, p.centres + block * problem.features, problem.metric, bound, p.depth);
  EAML_UNROLL
  for (int k = 0; k < kEach; ++k) {
    for (int64_t s = cuda::thread() % cuda::kWarp; s < sets_each && slots[k] >= 0; s += cuda::kWarp) {
      const int64_t set = block * sets_each + s, at = p.packed.bounds_at(set, slots[k]);
      const int64_t biases = set * p.sets_share / problem.bias_share * problem.size;
      const float bias = problem.bias == nullptr ? 0.0f : problem.bias[biases + slots[k]];
      set_bounds(square[k], bias, problem.metric, bound, p.packed.start + at, p.packed.width + at);
    }
  }
}

// A warp packs a query. All rows of the tiles get one, those that do not exist too.
EAML_KERNEL(kThreads)
queries_kernel(EAML_CONSTANT Screen p) {
  const Problem<float>& problem = p.problem;
  if (cuda::block() == 0 && cuda::thread() == 0) *p.failed_count = 0;
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t row = cuda::block() * kWarps + cuda::thread() / cuda::kWarp, features = problem.features;
  if (row >= p.tiles * p.tile_rows) return;
  uint16_t* to = p.queries + row * p.depth;
  if (!p.exists(row)) {
    for (int64_t i = lane; i < p.depth; i += cuda::kWarp) to[i] = 0;
    if (lane == 0) p.threshold[row] = -kInfinity<float>, p.count[row] = 0;
    return;
  }
  const int64_t memory = p.memory(row), block = memory / problem.keys_share;
  const KeyRows queries{reinterpret_cast<const char*>(problem.queries), features, Half::kNone};
  const int64_t from = memory * problem.queries_each + p.query(row);
  const bool distance = problem.metric == Metric::kSqeuclidean, cosine = problem.metric == Metric::kCosine;
  const float factor = cosine ? scale_of(queries.square(from)) : 1.0f;
  double square = 0, lost = 0, centre_square = 0;
  for (int64_t i = lane; i < features; i += cuda::kWarp) {
    const float centre = problem.panels == nullptr ? p.centres[block * features + i]
                                                   : float(problem.state[block * state_size(features) + i]);
    const float given = queries.get(from, i), x = distance ? given - centre : given * factor;
    const uint32_t bits = to_bfloat16(-x);
    const double rest = double(-x) - double(low(bits));
    square += double(x) * double(x), lost += rest * rest, centre_square += double(centre) * double(centre);
    to[i] = static_cast<uint16_t>(bits);
  }
  square = sum_of_warp(square), lost = sum_of_warp(lost), centre_square = sum_of_warp(centre_square);
  const Bound bound(features);
  const double norm = std::sqrt(square);
  const double rest = std::sqrt(lost) * (1 + bound.own) + kTiny, most = norm * (1 + bound.own);
  const bool fits = bound.holds() && norm <= kMostNorm;
  const uint32_t slope = fits ? round_up(float(2 * bound.own * (most + rest) + rest)) : 0;
  const uint32_t whole = fits ? round_up(float(most) + kTiny) : 0;
  if (!fits)
    for (int64_t i = lane; i < features; i += cuda::kWarp) to[i] = 0;
  for (int64_t i = features + lane; i < p.depth; i += cuda::kWarp) {
    const uint32_t bits = i == features ? slope : i == features + 1 ? whole : 0;
    to[i] = static_cast<uint16_t>(bits == 0 ? 0 : bits | 0x8000u);
  }
  if (lane != 0) return;
  const double extent = distance ? norm : std::sqrt(centre_square) + (cosine ? 1 : 0);
  p.slope[row] = low(slope), p.extent[row] = low(whole);
  p.margin[row] = float(2 * (bound.shared * norm * extent + bound.tiny));
  p.threshold[row] = fits ? kMax : -kInfinity<float>;
  p.count[row] = 0;
}

// ---- products ----

constexpr int kScreenThreads = 128, kScreenWarps = kScreenThreads / cuda::kWarp;
constexpr int kTileKeys = kScreenWarps * kPanel;  // a warp takes a panel
constexpr int kChunk = 64;                        // of the depth, in shared memory
constexpr int kChunkRow = kChunk + 8;             // rows in other banks
constexpr int kMostResident = 6;                  // chunks of queries that stay there

EAML_INLINE int chunks_of(int64_t depth) {
  return static_cast<int>((depth + kChunk - 1) / kChunk);
}
EAML_INLINE int query_stages(int64_t depth) {
  return chunks_of(depth) <= kMostResident ? chunks_of(depth) : 2;
}
template <int kM>
std::size_t screen_bytes(int64_t depth) {
  return (query_stages(depth) * 16 * kM + 2 * kTileKeys) * kChunkRow * 2 + 16 * kScreenThreads * 4;
}

// The slot of key `i` of a sample, or of all: each of the sample is any of its own stretch of slots.
template <bool kSample>
EAML_DEVICE int64_t slot_of(const Screen& p, int64_t i) {
  if constexpr (!kSample) return i;
  uint32_t mixed = static_cast<uint32_t>(i) * 2654435761u;
  mixed ^= mixed >> 15;
  return i * p.stride + mixed % static_cast<uint32_t>(p.stride);
}

// A block takes a tile of queries, kM times 16 of one memory, along a range of its keys. kSample: of the sample, whose
// upper bounds are written; otherwise of all keys, of which those within the threshold go on the lists.
template <int kM, bool kSample>
EAML_KERNEL(kScreenThreads)
screen_kernel(EAML_CONSTANT Screen p) {
  constexpr int kRows = 16 * kM, kN = kPanel / 8;
  const Problem<float>& problem = p.problem;
  const int64_t splits = kSample ? p.sample_splits : p.splits;
  const int64_t tile = cuda::block() % p.tiles, split = cuda::block() / p.tiles, first_row = tile * kRows;
  const int64_t memory = p.memory(first_row), block = memory / problem.keys_share, set = memory / p.sets_share;
  const int64_t size = kSample ? p.sample : problem.size, key_tiles = (size + kTileKeys - 1) / kTileKeys;
  const int64_t begin = key_tiles * split / splits, end = key_tiles * (split + 1) / splits;
  const int thread = cuda::thread(), warp = thread / cuda::kWarp, lane = thread % cuda::kWarp;
  const int g = lane / 4, t = lane % 4;  // a thread's row or column of a fragment, and its pair along the other
  const int chunks = chunks_of(p.depth), stages = query_stages(p.depth);
  const bool resident = stages == chunks;
  const int64_t rows = problem.queries_each - p.query(first_row);  // from the tile's first on

  const Shared<uint16_t> queries{reinterpret_cast<uint16_t*>(cuda::shared_memory())};
  const Shared<uint16_t> keys = queries.at(stages * kRows * kChunkRow);
  const Shared<float> mine{reinterpret_cast<float*>(keys.at(2 * kTileKeys * kChunkRow).data)};  // [16][thread]
  const auto words = [](const Shared<uint16_t>& x) { return Shared<uint32_t>{reinterpret_cast<uint32_t*>(x.data)}; };
  const auto pieces = [&](int chunk) {  // of 16 bytes
    const int64_t left = p.depth - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk) / 8;
  };
  const auto bring = [&](const Shared<uint16_t>& to, int count, int chunk, auto row_of) {
    const int each = pieces(chunk);
    for (int i = thread; i < count * 8; i += kScreenThreads)
      if (i % 8 < each) to.copy_async(i / 8 * kChunkRow + i % 8 * 8, row_of(i / 8) + chunk * kChunk + i % 8 * 8);
  };
  const auto bring_queries = [&](int stage, int chunk) {
    bring(queries.at(stage * kRows * kChunkRow), kRows, chunk,
          [&](int r) { return p.queries + (first_row + r) * p.depth; });
  };
  const auto bring_step = [&](int64_t step) {  // a chunk of a tile of keys
    const int chunk = static_cast<int>(step % chunks), stage = static_cast<int>(step % 2);
    const int64_t first = (begin + step / chunks) * kTileKeys;
    bring(keys.at(stage * kTileKeys * kChunkRow), kTileKeys, chunk, [&](int r) {
      const int64_t i = first + r < size ? first + r : size - 1;
      return p.packed.key(block, slot_of<kSample>(p, i), p.depth);
    });
    if (!resident) bring_queries(stage, chunk);
    cuda::end_copies();
  };

  float threshold[kM][2];
  EAML_UNROLL
  for (int m = 0; m < kM; ++m)
    for (int i = 0; i < 2; ++i)
      threshold[m][i] = kSample ? 0.0f : cuda::load(p.threshold + first_row + m * 16 + i * 8 + g);
  if (resident)
    for (int c = 0; c < chunks; ++c) bring_queries(c, c);
  const int64_t steps = (end - begin) * chunks;
  if (steps > 0) bring_step(0);
  float sum[kM][kN][4];
  for (int64_t step = 0; step < steps; ++step) {
    const int chunk = static_cast<int>(step % chunks), stage = static_cast<int>(step % 2);
    const int64_t first = (begin + step / chunks) * kTileKeys + warp * kPanel;  // of the warp
    if (step + 1 < steps) {
      bring_step(step + 1);
      cuda::wait_for_copies<1>();
    } else {
      cuda::wait_for_copies<0>();
    }
    if (chunk == 0) {
      EAML_UNROLL
      for (int n = 0; n < kN; ++n)
        for (int i = 0; i < 2; ++i) {
          const int64_t key = first + n * 8 + 2 * t + i;
          const float start = key < size
                                  ? cuda::load(p.packed.start + p.packed.bounds_at(set, slot_of<kSample>(p, key)))
                                  : kInfinity<float>;
          EAML_UNROLL
          for (int m = 0; m < kM; ++m) sum[m][n][i] = sum[m][n][2 + i] = start;
        }
    }
    cuda::sync_block();
    const auto a_words = words(queries.at((resident ? chunk : stage) * kRows * kChunkRow));
    const auto b_words = words(keys.at((stage * kTileKeys + warp * kPanel) * kChunkRow));
    const int products = pieces(chunk) / 2;
    for (int k = 0; k < products; ++k) {
      uint32_t a[kM][4], b[kN][2];
      EAML_UNROLL
      for (int m = 0; m < kM; ++m)
        for (int i = 0; i < 4; ++i)
          a[m][i] = a_words.get((m * 16 + g + i % 2 * 8) * (kChunkRow / 2) + k * 8 + t + i / 2 * 4);
      EAML_UNROLL
      for (int n = 0; n < kN; ++n)
        for (int i = 0; i < 2; ++i) b[n][i] = b_words.get((n * 8 + g) * (kChunkRow / 2) + k * 8 + t + i * 4);
      EAML_UNROLL
      for (int m = 0; m < kM; ++m)
        for (int n = 0; n < kN; ++n) cuda::multiply_add(sum[m][n], a[m], b[n]);
    }
    if (chunk + 1 == chunks) {
      const auto is_live = [&](int64_t slot) {
        return problem.valid == nullptr || problem.valid[memory / problem.valid_share * problem.size + slot];
      };
      if constexpr (kSample) {
        EAML_UNROLL
        for (int i = 0; i < 2 * kN; ++i) {
          const int64_t key = first + i / 2 * 8 + 2 * t + i % 2;
          if (key >= size) continue;
          const int64_t slot = slot_of<true>(p, key);
          const uint32_t norms = cuda::load(p.packed.norm(block, slot));
          const float width =
              is_live(slot) ? cuda::load(p.packed.width + p.packed.bounds_at(set, slot)) : kInfinity<float>;
          EAML_UNROLL
          for (int m = 0; m < kM; ++m)
            for (int h = 0; h < 2; ++h) {
              const int64_t row = first_row + m * 16 + h * 8 + g;
              if (m * 16 + h * 8 + g < rows)
                p.sampled[row * p.sample + key] =
                    sum[m][i / 2][h * 2 + i % 2] + width +
                    2 * (cuda::load(p.slope + row) * low(norms) + cuda::load(p.extent + row) * high(norms));
            }
        }
      } else {
        bool any = false;
        EAML_UNROLL
        for (int m = 0; m < kM; ++m)
          for (int n = 0; n < kN; ++n)
            for (int i = 0; i < 4; ++i) any |= sum[m][n][i] <= threshold[m][i / 2];
        EAML_UNROLL
        for (int m = 0; m < kM; ++m) {
          if (!any) break;
          EAML_UNROLL
          for (int i = 0; i < 4 * kN; ++i) mine.set(i * kScreenThreads + thread, sum[m][i / 4][i % 4]);
          for (int i = 0; i < 4 * kN; ++i) {
            const float lower = mine.get(i * kScreenThreads + thread);
            if (!(lower <= (i % 4 < 2 ? threshold[m][0] : threshold[m][1]))) continue;
            const int64_t row = first_row + m * 16 + i % 4 / 2 * 8 + g, slot = first + i / 4 * 8 + 2 * t + i % 2;
            if (!is_live(slot)) continue;
            const uint32_t norms = cuda::load(p.packed.norm(block, slot));
            const float upper = lower + cuda::load(p.packed.width + p.packed.bounds_at(set, slot)) +
                                2 * (cuda::load(p.slope + row) * low(norms) + cuda::load(p.extent + row) * high(norms));
            const uint32_t place = cuda::add_for_all(p.count + row, 1);
            if (place < p.capacity) p.list[row * p.capacity + place] = {lower, upper, uint32_t(slot), 0};
          }
        }
      }
    }
    cuda::sync_block();
  }
}

// ---- selection ----

// What k of the upper bounds do not exceed, behind a flush: a threshold of lower bounds.
EAML_DEVICE float threshold_of(const Best<uint64_t>& uppers, float margin) {
  if (uppers.limit == kNone<uint64_t>) return kMax;
  const float most = score_of<float>(uint32_t(uppers.limit >> 32)) + margin;
  return most <= kMax ? most : kMax;
}

// A block finds the threshold of a query from its sample.
EAML_KERNEL(kThreads)
threshold_kernel(EAML_CONSTANT Screen p) {
  const int64_t row = cuda::block();
  if (!p.exists(row) || !(p.threshold[row] > 0)) return;
  Places places{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  Best<uint64_t> lists[1];
  lists[0].start(cuda::shared_memory() + Places::size(1) * sizeof(uint32_t), p.sample_k, p.sample_kept);
  cuda::sync_block();
  for (int64_t i = 0; i < p.sample; i += kThreads) {
    const int64_t at = i + cuda::thread();
    const uint64_t entries[1] = {at < p.sample ? entry_of(p.sampled[row * p.sample + at], uint32_t(at))
                                               : kNone<uint64_t>};
    push(lists, entries, places);
  }
  lists[0].flush();
  if (cuda::thread() == 0) p.threshold[row] = threshold_of(lists[0], p.margin[row]);
}

// A block finds the results of a query from its list, or puts it on the list of those that have failed.
EAML_KERNEL(kThreads, 2)
select_kernel(EAML_CONSTANT Screen p) {
  const Problem<float>& problem = p.problem;
  const int64_t row = cuda::block();
  if (!p.exists(row)) return;
  const int64_t from = p.memory(row) * problem.queries_each + p.query(row);
  const int64_t count = p.count[row];
  if (count > p.capacity || p.threshold[row] == -kInfinity<float>) {
    if (cuda::thread() == 0) p.failed[cuda::add_for_all(p.failed_count, 1)] = from;
    return;
  }
  char* memory_at = cuda::shared_memory();
  Places places{{reinterpret_cast<uint32_t*>(memory_at)}};
  memory_at += Places::size(1) * sizeof(uint32_t);
  const Shared<uint32_t> waiting{reinterpret_cast<uint32_t*>(memory_at)};  // [kFresh], slots
  memory_at += kFresh * sizeof(uint32_t);
  Best<uint64_t> lists[1];
  const Screen::Candidate* const list = p.list + row * p.capacity;
  float threshold = kMax;
  if (count > p.k) {
    lists[0].start(memory_at, p.k, p.kept);
    cuda::sync_block();
    for (int64_t i = 0; i < count; i += kThreads) {
      const int64_t at = i + cuda::thread();
      const uint64_t entries[1] = {at < count ? entry_of(list[at].upper, uint32_t(at)) : kNone<uint64_t>};
      push(lists, entries, places);
    }
    lists[0].flush();
    threshold = threshold_of(lists[0], p.margin[row]);
    cuda::sync_block();
  }

  lists[0].start(memory_at, p.k, p.kept);
  cuda::sync_block();
  const Memory<float> memory(problem, p.memory(row));
  const Query<float> query[1] = {{problem.queries + from * problem.features, problem.features}};
  const double norms[1] = {memory.metric == Metric::kCosine ? norm_of(query[0].row, problem.features) : 0};
  int held = 0;
  const auto evaluate = [&](int n) {  // the first n that wait, up to kThreads
    cuda::sync_block();
    const int thread = cuda::thread();
    uint64_t entries[1] = {kNone<uint64_t>};
    for (int k = 0; k < 2; ++k) {  // two threads take two of them, and each of them keeps one
      const int at = thread / 2 + k * (kThreads / 2);
      if (k * (kThreads / 2) >= n) break;
      const int64_t slot[1] = {waiting.get(at < n ? at : 0)};
      float score[1][1];
      scores<false>(score, memory, slot, query, norms);
      if (thread % 2 == k && at < n) entries[0] = entry_of(score[0][0], uint32_t(slot[0]));
    }
    push(lists, entries, places);
  };
  for (int64_t i = 0; i < count; i += kThreads) {
    const int64_t at = i + cuda::thread();
    const bool yes[1] = {at < count && list[at].lower <= threshold};
    int place[1], total[1];
    places.find(yes, place, total);
    if (yes[0]) waiting.set(held + place[0], list[at].slot);
    held += total[0];
    if (held < kThreads) continue;
    evaluate(kThreads);
    cuda::sync_block();
    held -= kThreads;
    const uint32_t kept = cuda::thread() < held ? waiting.get(kThreads + cuda::thread()) : 0;
    cuda::sync_block();
    if (cuda::thread() < held) waiting.set(cuda::thread(), kept);
    cuda::sync_block();
  }
  if (held > 0) evaluate(held);
  lists[0].flush();
  cuda::sync_block();
  write_best(lists[0], problem, p.found, from);
}

// ---- stores ----

// Keys and bias that go to slots, of several memories; `anew`: what is derived of them all is made anew.
struct Writing {
  Store<float> store;  // of the first memory
  bool anew;
  int64_t memories, count;  // slots of each
  const int64_t* slots;
  const void *keys, *bias;
  Packed packed;
  int64_t depth, parts;
  double* partial;  // (memories, parts, features + 2): changes of the state's sums
  uint32_t* moved;  // (memories): whether the centre has
  int64_t blocks;

  EAML_MEMBER KeyRows rows(const void* data, int64_t first) const {
    const KeyRows all{static_cast<const char*>(data), store.features, store.half};
    return {static_cast<const char*>(all.row(first)), store.features, store.half};
  }
  EAML_MEMBER KeyRows stored(int64_t memory) const { return rows(store.keys, memory * store.capacity); }
  EAML_MEMBER KeyRows given(int64_t memory) const {
    return anew ? stored(memory) : rows(keys, keys == nullptr ? 0 : memory * count);
  }
  // Who has claimed a slot last, less the claims of those before: 0 between two calls.
  EAML_MEMBER uint32_t* claim(int64_t memory, int64_t slot) const { return packed.norm(memory, slot) + 3 * kPanel; }
  EAML_MEMBER int64_t slot(int64_t memory, int64_t i) const { return anew ? i : slots[memory * count + i]; }
  // Whether entry i is the last one to its slot, which exists.
  EAML_MEMBER bool counts(int64_t memory, int64_t i) const {
    const int64_t s = slot(memory, i);
    return s >= 0 && s < store.capacity && (anew || *claim(memory, s) == uint32_t(i + 1));
  }
  EAML_MEMBER bool live(int64_t memory, int64_t slot) const { return store.live[memory * store.capacity + slot]; }
  EAML_MEMBER double* state(int64_t memory) const { return store.state + memory * state_size(store.features); }
  EAML_MEMBER float scale(const KeyRows& keys, int64_t row) const {
    return store.metric == Metric::kCosine ? scale_of(keys.square(row)) : 1.0f;
  }
};

template <bool kTake>
EAML_KERNEL(kThreads)
claim_kernel(EAML_CONSTANT Writing p) {
  const int64_t i = cuda::block() * kThreads + cuda::thread();
  if (i >= p.memories * p.count) return;
  const int64_t memory = i / p.count, slot = p.slots[i];
  if (slot < 0 || slot >= p.store.capacity) return;
  if constexpr (kTake)
    cuda::max_for_all(p.claim(memory, slot), uint32_t(i % p.count + 1));
  else
    *p.claim(memory, slot) = 0;
}

// A block gives a memory that has no keys a centre: of those that are written.
EAML_KERNEL(kThreads)
begin_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block(), features = p.store.features;
  double* const state = p.state(memory);
  const bool empty = state[2 * features + 1] == 0;
  cuda::sync_block();
  if (!p.anew && (!empty || p.keys == nullptr)) return;
  for (int64_t i = cuda::thread(); i < state_size(features); i += kThreads) state[i] = 0;
  cuda::sync_block();
  if (p.anew) return;
  find_centre(p.given(memory), p.count, nullptr, p.store.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              state);
}

// A block sums what a part of the slots change in a memory's sums, each feature by one thread, in order.
constexpr int kTallied = 32;  // at a time
EAML_KERNEL(kThreads)
tally_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block() / p.parts, part = cuda::block() % p.parts, features = p.store.features;
  const int64_t begin = p.count * part / p.parts, end = p.count * (part + 1) / p.parts;
  const int warp = cuda::thread() / cuda::kWarp, lane = cuda::thread() % cuda::kWarp;
  // Of the key that goes and of the one that comes: its scale, NaN where it is none that counts, and its square.
  const Shared<float> scales{reinterpret_cast<float*>(cuda::shared_memory())};
  const Shared<float> squares = scales.at(2 * kTallied);
  const KeyRows both[2] = {p.stored(memory), p.given(memory)};
  const double* const centre = p.state(memory);
  double* const sums = p.partial + (memory * p.parts + part) * (features + 2);
  for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) sums[f] = 0;
  for (int64_t first = begin; first < end; first += kTallied) {
    cuda::sync_block();
    for (int i = warp; i < 2 * kTallied; i += kWarps) {
      const int64_t at = first + i / 2;
      bool used = at < end && p.counts(memory, at);
      const int64_t slot = used ? p.slot(memory, at) : 0;
      if (used) used = i % 2 == 0 ? !p.anew && p.live(memory, slot) : p.anew ? p.live(memory, slot) : p.keys != nullptr;
      float scale = kNaN<float>, square = 0;
      if (used) {
        const int64_t row = i % 2 == 0 ? slot : at;
        scale = p.scale(both[i % 2], row);
        for (int64_t f = lane; f < features; f += cuda::kWarp) {
          const float x = both[i % 2].get(row, f) * scale - float(centre[f]);
          square += x * x;
        }
        square = sum_of_warp(square);
        if (!(square <= kMostNorm * kMostNorm)) scale = kNaN<float>;  // no centre serves it
      }
      if (lane == 0) scales.set(i, scale), squares.set(i, square);
    }
    cuda::sync_block();
    for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) {
      double sum = sums[f];
      for (int i = 0; i < 2 * kTallied; ++i) {
        const float scale = scales.get(i);
        if (scale != scale) continue;
        const double sign = i % 2 == 0 ? -1 : 1;
        const int64_t at = first + i / 2, row = i % 2 == 0 ? p.slot(memory, at) : at;
        sum += sign * (f < features    ? double(both[i % 2].get(row, f) * scale - float(centre[f]))
                       : f == features ? double(squares.get(i))
                                       : 1.0);
      }
      sums[f] = sum;
    }
  }
}

// A warp writes a slot.
EAML_KERNEL(kThreads)
put_kernel(EAML_CONSTANT Writing p) {
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t index = cuda::block() * kWarps + cuda::thread() / cuda::kWarp, features = p.store.features;
  if (index >= p.memories * p.count) return;
  const int64_t memory = index / p.count, i = index % p.count;
  if (!p.counts(memory, i)) return;
  const int64_t slot = p.slot(memory, i), at = memory * p.store.capacity + slot;
  if (lane == 0) p.store.live[at] = p.keys != nullptr;
  if (p.keys == nullptr) return;
  const KeyRows given = p.given(memory);
  const auto copy = [&](auto* to, const auto* from, int64_t to_row, int64_t from_row, int64_t count) {
    for (int64_t f = lane; f < count; f += cuda::kWarp)
      to[to_row * count + f] = from == nullptr ? 0 : from[from_row * count + f];
  };
  if (p.store.half == Half::kNone) {
    copy(static_cast<uint32_t*>(p.store.keys), static_cast<const uint32_t*>(p.keys), at, index, features);
    copy(static_cast<uint32_t*>(p.store.bias), static_cast<const uint32_t*>(p.bias), at, index, 1);
  } else {
    copy(static_cast<uint16_t*>(p.store.keys), static_cast<const uint16_t*>(p.keys), at, index, features);
    copy(static_cast<uint16_t*>(p.store.bias), static_cast<const uint16_t*>(p.bias), at, index, 1);
  }
  const Bound bound(features);
  const float bias = p.bias == nullptr ? 0.0f : read_number<float>(p.bias, index, p.store.half);
  const float square = pack_key(given, i, p.state(memory), p.store.metric, bound, p.depth,
                                p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
  const int64_t bounds = p.packed.bounds_at(memory, slot);
  if (lane == 0) set_bounds(square, bias, p.store.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
}

// A block brings a memory's state up to date. Where the mean is farther from the centre than keys are from the mean, or
// everything is made anew, the mean becomes the centre.
EAML_KERNEL(kThreads)
finish_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block(), features = p.store.features;
  const Shared<double> totals{reinterpret_cast<double*>(cuda::shared_memory())};  // [2][kThreads]
  double *const centre = p.state(memory), *const sum = centre + features;
  const double* const parts = p.partial + memory * p.parts * (features + 2);
  double about[3] = {sum[features], sum[features + 1], sum[features + 2]};  // squares, keys, changes
  for (int64_t part = 0; part < p.parts; ++part)
    for (int i = 0; i < 2; ++i) about[i] += parts[part * (features + 2) + features + i];
  about[2] += double(p.count);
  const double count = about[1] > 0 ? about[1] : 1;
  double offset = 0,
         change = 0;  // |sum|², and what moving the centre by d takes from the squares: 2 sum.d - count |d|²
  for (int64_t f = cuda::thread(); f < features; f += kThreads) {
    double s = sum[f];
    for (int64_t part = 0; part < p.parts; ++part) s += parts[part * (features + 2) + f];
    sum[f] = s;
    const float mean = float(centre[f] + s / count);
    const double d = (std::abs(mean) <= kMostNorm ? double(mean) : 0.0) - centre[f];
    offset += s * s, change += 2 * s * d - count * d * d;
  }
  totals.set(cuda::thread(), offset), totals.set(kThreads + cuda::thread(), change);
  cuda::sync_block();
  offset = change = 0;
  for (int i = 0; i < kThreads; ++i) offset += totals.get(i), change += totals.get(kThreads + i);
  const bool moves = p.anew || (8 * about[2] >= about[1] && about[1] > 0 && 2 * offset > about[0] * about[1]);
  if (moves) {
    for (int64_t f = cuda::thread(); f < features; f += kThreads) {
      const float mean = float(centre[f] + sum[f] / count);
      const double to = std::abs(mean) <= kMostNorm ? double(mean) : 0.0;
      sum[f] -= about[1] * (to - centre[f]), centre[f] = to;
    }
    about[0] = about[0] > change ? about[0] - change : 0, about[2] = 0;
  }
  if (cuda::thread() != 0) return;
  for (int i = 0; i < 3; ++i) sum[features + i] = about[i];
  p.moved[memory] = moves;
}

// Live keys around a centre that has moved.
EAML_KERNEL(kThreads)
repack_kernel(EAML_CONSTANT Writing p) {
  const int64_t panels = panel_count(p.store.capacity), features = p.store.features;
  const Bound bound(features);
  for (int64_t unit = cuda::block(); unit < p.memories * panels; unit += p.blocks) {
    const int64_t memory = unit / panels, first = unit % panels * kPanel;
    if (p.moved[memory] == 0) continue;
    for (int64_t i = cuda::thread() / cuda::kWarp; i < kPanel && first + i < p.store.capacity; i += kWarps) {
      const int64_t slot = first + i, bounds = p.packed.bounds_at(memory, slot);
      if (!p.live(memory, slot)) continue;
      const float bias = read_number<float>(p.store.bias, memory * p.store.capacity + slot, p.store.half);
      const float square = pack_key(p.stored(memory), slot, p.state(memory), p.store.metric, bound, p.depth,
                                    p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
      if (cuda::thread() % cuda::kWarp == 0)
        set_bounds(square, bias, p.store.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
    }
  }
}

// ---- launchers: what runs on the host ----

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
template <class V>
constexpr V between(V least, V x, V most) {
  return x < least ? least : x > most ? most : x;
}

// Memory, one piece behind the other; without memory, how much it takes.
struct Pieces {
  char* at;
  int64_t used = 0;
  template <class V>
  void take(V*& to, int64_t count) {
    to = at == nullptr ? nullptr : reinterpret_cast<V*>(at + used);
    used += ceil_div(count * sizeof(V), 256) * 256;
  }
};

constexpr std::size_t kMostShared = 96 << 10;  // as much as a block has on the smaller GPUs
constexpr int64_t kMostStagedFeatures = 512;
constexpr int64_t kFewBlocks = 132, kManyBlocks = 528;  // that do not fill a large GPU; that fill it several times over

template <class T, int kQueries, bool kPlain>
std::size_t rows_bytes(const RowsTask<T>& p) {
  const std::size_t staged = kPlain ? (p.problem.features + 7) / 8 * 8 * sizeof(double) : 0;
  return kQueries * (staged + Best<Entry<T>>::bytes(p.k)) + Places::size(kQueries) * sizeof(uint32_t);
}

template <class T>
bool is_plain(const Problem<T>& p) {
  return p.half == Half::kNone && p.features % 4 == 0 && p.features <= kMostStagedFeatures &&
         reinterpret_cast<std::uintptr_t>(p.keys) % 16 == 0;
}

// Calls f(number of queries of a block, whether keys are plain), both as constants.
template <class T, class F>
const char* with_rows(const RowsTask<T>& p, F f) {
  constexpr int kGroup = 4;
  const bool plain = is_plain(p.problem);
  if (p.list == nullptr && p.problem.queries_each > 1) {
    if (plain && rows_bytes<T, kGroup, true>(p) <= kMostShared)
      return f(std::integral_constant<int, kGroup>(), std::true_type());
    if (!plain && rows_bytes<T, kGroup, false>(p) <= kMostShared)
      return f(std::integral_constant<int, kGroup>(), std::false_type());
  }
  if (plain) return f(std::integral_constant<int, 1>(), std::true_type());
  return f(std::integral_constant<int, 1>(), std::false_type());
}

template <class T>
RowsTask<T> rows_task(const Problem<T>& problem, Found<T> found) {
  RowsTask<T> p{};
  p.problem = problem, p.found = found;
  p.k = static_cast<int>(problem.k < problem.size ? problem.k : problem.size);
  if (p.k == 0) p.k = 1;  // no keys: a list that stays empty
  p.kept = Best<Entry<T>>::kept_for(p.k);
  return p;
}

// Parts of the keys, none so small that its best are most of it.
template <class T>
void cut_keys(RowsTask<T>& p, int64_t wanted) {
  const int64_t least = p.k * 4 > kThreads ? p.k * 4 : kThreads, size = p.problem.size > 0 ? p.problem.size : 1;
  p.parts = between<int64_t>(1, wanted, ceil_div(size, least));
  p.part = ceil_div(ceil_div(size, p.parts), kThreads) * kThreads;
  p.parts = ceil_div(size, p.part);
}

template <class T>
const char* launch_rows(const RowsTask<T>& p, void* stream) {
  const char* error = with_rows(p, [&](auto queries, auto plain) {
    constexpr int kQueries = decltype(queries)::value;
    constexpr bool kPlain = decltype(plain)::value;
    return cuda::launch(rows_kernel<T, kQueries, kPlain>, p.blocks, kThreads, rows_bytes<T, kQueries, kPlain>(p),
                        stream, p);
  });
  if (error != nullptr || p.partial == nullptr) return error;
  const int64_t rows = p.problem.memories * p.problem.queries_each;
  RowsTask<T> merge = p;
  merge.blocks = p.list == nullptr ? rows : between<int64_t>(1, rows, kManyBlocks);
  return cuda::launch(merge_kernel<T>, merge.blocks, kThreads,
                      Places::size(1) * sizeof(uint32_t) + Best<Entry<T>>::bytes(p.k), stream, merge);
}

template <class T>
RowsTask<T> plan_rows(const Problem<T>& problem, Found<T> found, Pieces& pieces) {
  RowsTask<T> p = rows_task(problem, found);
  with_rows(p, [&](auto queries, auto) {
    p.groups = ceil_div(problem.queries_each, decltype(queries)::value);
    return nullptr;
  });
  const int64_t units = problem.memories * p.groups;
  cut_keys(p, units >= kFewBlocks ? 1 : kManyBlocks / units);
  p.blocks = units * p.parts;
  if (p.parts > 1) pieces.take(p.partial, problem.memories * problem.queries_each * p.k * p.parts);
  return p;
}

// Whether values in double, of all keys, take less time than packing and screening them.
inline bool is_direct(const Problem<float>& p) {
  if (p.queries_each == 1 || p.size <= kTileKeys) return true;
  const int64_t ratio = cuda::singles_to_a_double();
  const int64_t few = p.panels == nullptr ? between<int64_t>(1, 8 / ratio, 4) : 1;
  const double work = double(p.memories) * double(p.queries_each) * double(p.size) * double(p.features + 8);
  return p.queries_each <= few || work <= double(1 << 28) / double(ratio * ratio);
}

constexpr int64_t kScreenMemory = 256 << 20;  // of queries that are searched at a time

inline Screen plan_screen(const Problem<float>& problem, Found<float> found, Pieces& pieces) {
  Screen p{};
  const int64_t size = problem.size, panels = panel_count(size);
  p.problem = problem, p.found = found, p.depth = depth_of(problem.features);
  p.keys_blocks = problem.memories / problem.keys_share;
  p.sets_share = problem.panels != nullptr || problem.bias == nullptr
                     ? problem.keys_share
                     : std::gcd(problem.keys_share, problem.bias_share);
  p.sets = problem.memories / p.sets_share;
  if (problem.panels != nullptr) {
    p.packed = panels_at(problem.panels, size, problem.features);
  } else {
    p.packed.keys_panel = kPanel * p.depth, p.packed.norms_panel = p.packed.bounds_panel = kPanel;
    p.packed.keys_stride = p.packed.keys_panel * panels;
    p.packed.norms_stride = p.packed.bounds_stride = kPanel * panels;
    pieces.take(p.centres, p.keys_blocks * problem.features);
    pieces.take(p.packed.keys, p.keys_blocks * p.packed.keys_stride);
    pieces.take(p.packed.norms, p.keys_blocks * p.packed.norms_stride);
    pieces.take(p.packed.start, p.sets * p.packed.bounds_stride);
    pieces.take(p.packed.width, p.sets * p.packed.bounds_stride);
  }

  // The k-th of a sample of s keys is near the k-th n / s of all n; a few more make outliers rare.
  p.k = static_cast<int>(problem.k < size ? problem.k : size);
  p.kept = Best<uint64_t>::kept_for(p.k);
  p.sample_k = p.k + 8;
  p.sample_kept = Best<uint64_t>::kept_for(p.sample_k);
  const auto wanted = static_cast<int64_t>(2 * std::sqrt(double(p.sample_k) * double(size))) + size / 128;
  p.capacity = size;
  if (2 * wanted < size) {
    p.stride = size / wanted, p.sample = size / p.stride;
    p.capacity = between<int64_t>(1, 8 * p.sample_k * p.stride + 2048, size);
  }

  p.tile_rows = problem.queries_each <= 16 ? 16 : 64;
  p.tiles_each = ceil_div(problem.queries_each, p.tile_rows);
  RowsTask<float> failed = rows_task(problem, found);
  cut_keys(failed, size / 4096);
  p.failed_parts = failed.parts, p.failed_part = failed.part;
  const int64_t all = problem.memories * p.tiles_each;
  const int64_t row_bytes = p.capacity * sizeof(Screen::Candidate) + p.sample * 4 + p.depth * 2 +
                            p.failed_parts * p.k * sizeof(Entry<float>) + 32;
  p.tiles = between<int64_t>(1, kScreenMemory / (row_bytes * p.tile_rows), all);
  p.tiles = ceil_div(all, ceil_div(all, p.tiles));
  p.splits = between<int64_t>(1, 2 * kManyBlocks / p.tiles, ceil_div(size, kTileKeys));
  p.sample_splits = between<int64_t>(1, 2 * kManyBlocks / p.tiles, ceil_div(p.sample, kTileKeys));
  p.failed_blocks = between<int64_t>(1, p.tiles * p.tile_rows * p.failed_parts, kManyBlocks);
  const int64_t rows = p.tiles * p.tile_rows;
  pieces.take(p.queries, rows * p.depth);
  for (float** each : {&p.slope, &p.extent, &p.margin, &p.threshold}) pieces.take(*each, rows);
  pieces.take(p.sampled, rows * p.sample);
  pieces.take(p.count, rows);
  pieces.take(p.list, rows * p.capacity);
  pieces.take(p.failed, rows);
  pieces.take(p.failed_count, 1);
  pieces.take(p.partial, rows * p.failed_parts * p.k);
  return p;
}

template <int kM>
const char* launch_tiles(const Screen& p, void* stream) {
  const std::size_t bytes = screen_bytes<kM>(p.depth);
  const std::size_t list_bytes = Places::size(1) * sizeof(uint32_t);
  const int64_t rows = p.tiles * p.tile_rows;
  const char* error = cuda::launch(queries_kernel, ceil_div(rows, kWarps), kThreads, 0, stream, p);
  if (error == nullptr && p.sample > 0) {
    error = cuda::launch(screen_kernel<kM, true>, p.tiles * p.sample_splits, kScreenThreads, bytes, stream, p);
    if (error == nullptr)
      error = cuda::launch(threshold_kernel, rows, kThreads, list_bytes + Best<uint64_t>::bytes(p.sample_k), stream, p);
  }
  if (error == nullptr)
    error = cuda::launch(screen_kernel<kM, false>, p.tiles * p.splits, kScreenThreads, bytes, stream, p);
  if (error == nullptr)
    error = cuda::launch(select_kernel, rows, kThreads,
                         list_bytes + kFresh * sizeof(uint32_t) + Best<uint64_t>::bytes(p.k), stream, p);
  return error;
}

inline const char* launch_screen(Screen p, void* stream) {
  const char* error = nullptr;
  if (p.problem.panels == nullptr) {
    error = cuda::launch(centre_kernel, p.keys_blocks, kThreads, kSampled * sizeof(float), stream, p);
    if (error == nullptr)
      error = cuda::launch(pack_kernel, p.keys_blocks * panel_count(p.problem.size), kThreads, 0, stream, p);
  }
  const int64_t all = p.problem.memories * p.tiles_each, most = p.tiles;
  for (; error == nullptr && p.first_tile < all; p.first_tile += most) {
    p.tiles = between<int64_t>(1, all - p.first_tile, most);
    error = p.tile_rows == 16 ? launch_tiles<1>(p, stream) : launch_tiles<4>(p, stream);
    if (error != nullptr) break;
    RowsTask<float> failed = rows_task(p.problem, p.found);
    failed.parts = p.failed_parts, failed.part = p.failed_part, failed.blocks = p.failed_blocks;
    failed.partial = p.partial, failed.list = p.failed, failed.list_count = p.failed_count;
    error = launch_rows(failed, stream);
  }
  return error;
}

template <class T>
const char* search_by(const Problem<T>& problem, Found<T> found, Pieces& pieces, void* stream) {
  if constexpr (sizeof(T) == 4) {
    if (!is_direct(problem)) {
      const Screen p = plan_screen(problem, found, pieces);
      return pieces.at == nullptr ? nullptr : launch_screen(p, stream);
    }
  }
  const RowsTask<T> p = plan_rows(problem, found, pieces);
  return pieces.at == nullptr ? nullptr : launch_rows(p, stream);
}

inline Writing plan_write(const Store<float>& first, int64_t memories, bool anew, int64_t count, Pieces& pieces) {
  Writing p{};
  p.store = first, p.memories = memories, p.anew = anew, p.count = anew ? first.capacity : count;
  p.packed = panels_at(first.panels, first.capacity, first.features), p.depth = depth_of(first.features);
  p.parts = between<int64_t>(1, p.count / (2 * kTallied), between<int64_t>(1, kManyBlocks / memories, 64));
  p.blocks = between<int64_t>(1, memories * panel_count(first.capacity), 4 * kManyBlocks);
  pieces.take(p.partial, memories * p.parts * (first.features + 2));
  pieces.take(p.moved, memories);
  return p;
}

inline const char* launch_write(const Writing& p, void* stream) {
  const int64_t entries = p.memories * p.count, blocks = ceil_div(entries, kThreads);
  const char* error = nullptr;
  const auto then = [&](auto kernel, int64_t blocks, std::size_t bytes) {
    if (error == nullptr) error = cuda::launch(kernel, blocks, kThreads, bytes, stream, p);
  };
  if (!p.anew) then(claim_kernel<true>, blocks, 0);
  then(begin_kernel, p.memories, kSampled * sizeof(float));
  then(tally_kernel, p.memories * p.parts, 4 * kTallied * sizeof(float));
  if (!p.anew) then(put_kernel, ceil_div(entries, kWarps), 0);
  then(finish_kernel, p.memories, 2 * kThreads * sizeof(double));
  if (!p.anew) then(claim_kernel<false>, blocks, 0);
  then(repack_kernel, p.blocks, 0);
  return error;
}

}  // namespace

#define EAML_DEFINE(T)                                                                            \
  template <>                                                                                     \
  std::int64_t search_bytes<T>(const Problem<T>& problem) {                                       \
    Pieces pieces{nullptr};                                                                       \
    search_by<T>(problem, {}, pieces, nullptr);                                                   \
    return pieces.used + 1;                                                                       \
  }                                                                                               \
  template <>                                                                                     \
  const char* search<T>(const Problem<T>& problem, Found<T> found, void* scratch, void* stream) { \
    Pieces pieces{static_cast<char*>(scratch)};                                                   \
    return search_by<T>(problem, found, pieces, stream);                                          \
  }

}  // namespace eaml::knn
