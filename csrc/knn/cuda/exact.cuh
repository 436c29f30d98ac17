// Exact values of keys, their order, and the k best entries of a block.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/cuda_compat.h"
#include "common/fp16.h"
#include "knn/cuda/launch.h"

namespace eaml::knn {
namespace {

using cuda::Shared;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

constexpr int kThreads = 256, kWarps = kThreads / cuda::kWarp;

// ---- exact values and their order ----

// A score and a slot as one integer: smaller is better. A score is a squared distance minus bias, or a negated
// similarity. NaN comes last, and equal scores are ordered by slot.
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
  const auto bits = __builtin_bit_cast(Word<T>, score + T(0));  // -0 becomes 0
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

// One memory, as exact values read it.
template <class T>
struct Memory {
  const char* keys;  // (size, features)
  int64_t features, row_bytes;
  Half half;
  const bool* valid;  // (size,) or null
  const T* bias;      // (size,) or null
  Metric metric;

  EAML_MEMBER Memory(const KnnParams<T>& p, int64_t memory)
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

// Reads features i ... i + 3 of a row, 0 beyond its end. Plain rows have dtype T, aligned rows and a multiple of four
// features.
template <bool kPlain, class T>
EAML_DEVICE void read_four(T (&to)[4], const void* row, int64_t i, int64_t features, Half half) {
  if constexpr (kPlain) {
    cuda::load_row(to, static_cast<const T*>(row) + i);
  } else {
    EAML_UNROLL
    for (int j = 0; j < 4; ++j) to[j] = i + j < features ? read_number<T>(row, i + j, half) : T(0);
  }
}

// A query in global memory, of T.
template <class T>
struct Query {
  const T* row;
  int64_t features;
  EAML_MEMBER void four(double (&to)[4], int64_t i) const {
    EAML_UNROLL
    for (int j = 0; j < 4; ++j) to[j] = i + j < features ? double(cuda::load(row + i + j)) : 0;
  }
};
// A query in shared memory, in double, padded with zeros.
struct StagedQuery {
  Shared<double> row;
  EAML_MEMBER void four(double (&to)[4], int64_t i) const { row.get_row(to, static_cast<int>(i)); }
};

// Sums over features on two adjacent threads. Lane l of eight sums features l, l + 8, ..., and every product is rounded
// before it is added. Then lanes are added in pairs, in the order of csrc/knn/cpu/rows_inl.h.
EAML_DEVICE int lanes_begin() {
  return cuda::thread() % 2 * 4;
}
EAML_DEVICE double join_lanes(double (&lane)[4]) {
  EAML_UNROLL
  for (int j = 0; j < 4; ++j) lane[j] = lane[j] + cuda::shuffle_xor(lane[j], 1);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// The sums of a metric for each pair of keys and queries; for the cosine also `square`, the keys' |x|².
template <Metric kMetric, bool kPlain, class T, class Q, int kKeys, int kQueries>
EAML_DEVICE void sums(double (&sum)[kKeys][kQueries], double (&square)[kKeys], const void* const (&keys)[kKeys],
                      const Q (&queries)[kQueries], int64_t features, Half half) {
  double lane[kKeys][kQueries][4] = {}, squares[kKeys][4] = {};
  // More reads in flight would spill registers.
  EAML_UNROLL_BY((kQueries == 1 && (kKeys == 1 || (kMetric != Metric::kCosine && sizeof(T) == 4)) ? 4 : 2))
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

// The exact scores of keys, on both threads. `norms` are |q| of the queries, read for the cosine.
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

// |query|, on all threads.
template <class T>
EAML_DEVICE double norm_of(const T* query, int64_t features) {
  double sum[1][1], square[1];
  const void* const keys[1] = {query};
  const Query<T> rows[1] = {{query, features}};
  sums<Metric::kInnerProduct, false, T>(sum, square, keys, rows, features, Half::kNone);
  return std::sqrt(sum[0][0]);
}

// ---- the best k ----

// Offsets of the threads of a block that vote yes: an exclusive prefix sum of votes, with one barrier.
struct BlockOffsets {
  Shared<uint32_t> counts;  // [2][lists][kWarps]
  int parity = 0;

  template <int kLists>
  EAML_MEMBER void find(const bool (&yes)[kLists], int (&position)[kLists], int (&total)[kLists]) {
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
      position[i] = cuda::count_bits(votes[i] & ((1u << lane) - 1)), total[i] = 0;
      EAML_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        const int count = counts.get(at + i * kWarps + w);
        position[i] += w < warp ? count : 0, total[i] += count;
      }
    }
    parity ^= 1;  // slower threads may still read these counts
  }
  EAML_INLINE static constexpr int size(int lists) { return 2 * lists * kWarps; }
};

constexpr int kFresh = 2 * kThreads;

// A barrier between two steps of a sort. Exchanges at strides up to a warp need only the warp's barrier.
EAML_DEVICE void sync_for_stride(int stride, int next) {
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

// The k least entries that the threads of a block pushed, in shared memory.
template <class E>
struct TopK {
  Shared<E> best;   // [kept], sorted
  Shared<E> fresh;  // [kFresh], entries since the last flush
  int k = 0, kept = 0, count = 0;
  E limit = kNone<E>;  // only smaller entries can be among the k least

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
        sync_for_stride(stride, stride > 1 ? stride / 2 : size < n ? size : kThreads);
      }
    for (int i = cuda::thread(); i < kept; i += kThreads) {
      const int from = kept - 1 - i;  // minima of a sorted and a reversed sequence form a bitonic sequence
      if (from >= n) continue;
      const E e = fresh.get(from);
      if (e < best.get(i)) best.set(i, e);
    }
    cuda::sync_block();
    for (int stride = kept / 2; stride > 0; stride /= 2) {
      exchange(best, kept, stride, 2 * kept);
      sync_for_stride(stride, stride > 1 ? stride / 2 : kThreads);
    }
    limit = best.get(k - 1);
    count = 0;
  }
};

// Each thread pushes an entry, or kNone, to each list. Returns the number of entries that the first list accepted.
template <class E, int kLists>
EAML_DEVICE int push(TopK<E> (&lists)[kLists], const E (&entries)[kLists], BlockOffsets& offsets) {
  bool yes[kLists];
  int position[kLists], total[kLists];
  EAML_UNROLL
  for (int i = 0; i < kLists; ++i) yes[i] = entries[i] < lists[i].limit;
  offsets.find(yes, position, total);
  EAML_UNROLL
  for (int i = 0; i < kLists; ++i) {
    if (yes[i]) lists[i].fresh.set(lists[i].count + position[i], entries[i]);
    lists[i].count += total[i];
    if (lists[i].count > kFresh - kThreads) lists[i].flush();
  }
  return total[0];
}

// Writes the results of a query. The list must be flushed.
template <class T>
EAML_DEVICE void write_best(const TopK<Entry<T>>& list, const KnnParams<T>& p, const KnnOutput<T>& found, int64_t row) {
  const T sign = p.metric == Metric::kSqeuclidean ? T(1) : T(-1);
  for (int64_t j = cuda::thread(); j < p.k; j += kThreads) {
    const Entry<T> e = j < list.k ? list.best.get(static_cast<int>(j)) : kNone<Entry<T>>;
    const bool none = e == kNone<Entry<T>>;
    found.values[row * p.k + j] = none ? sign * kInfinity<T> : sign * score_of<T>(Word<T>(e >> 32)) + T(0);
    found.indices[row * p.k + j] = none ? -1 : static_cast<int64_t>(static_cast<uint32_t>(e));
  }
}

// ---- host ----

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
template <class V>
constexpr V between(V least, V x, V most) {
  return x < least ? least : x > most ? most : x;
}

// Divides the scratch memory of a call into arrays. With null memory, only counts the bytes.
struct Workspace {
  char* at;
  int64_t used = 0;
  template <class V>
  void take(V*& to, int64_t count) {
    to = at == nullptr ? nullptr : reinterpret_cast<V*>(at + used);
    used += ceil_div(count * sizeof(V), 256) * 256;
  }
};

// Blocks that do not fill a large GPU, and blocks that fill it several times.
constexpr int64_t kFewBlocks = 132, kManyBlocks = 528;

}  // namespace
}  // namespace eaml::knn
