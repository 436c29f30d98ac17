// Products of the one-pass search: a warp multiplies 16 keys, read once and straight into the operands of tensor cores,
// with all queries.
#pragma once

#include "knn/cuda/rerank.cuh"

namespace eaml::knn {
namespace {

constexpr int64_t kMaxOnePassQueries = 16, kMaxOnePassNeighbors = 64;
constexpr int kStep = 512;                           // keys that a block scores between two selections
constexpr int kScoreRow = kStep + 4;                 // padded, so that the threads of a warp write to all banks
constexpr int kGroups = kWarps * kRowKeys;           // groups of a part's keys, each with its least upper bound
static_assert(kMaxOnePassNeighbors <= kGroups / 2);  // the k-th least of the groups is near that of the keys

// A search of up to 16 queries in each memory. A pass covers the memories whose arrays fit in the workspace.
struct OnePassFilter {
  KnnParams<float> params;
  KnnOutput<float> found;
  Packed packed;  // with panels
  int64_t depth, columns;
  int64_t first_memory, memories;  // of this pass
  int64_t num_parts, part_size;    // of the keys of a memory
  int64_t capacity;                // candidates of a query in a part
  int k, kept;
  // Arrays per query of this pass, rows = memories * queries_each.
  float* margin;    // (rows,), NaN if no bound holds
  uint32_t* count;  // (rows, num_parts)
  Candidate* list;  // (rows, capacity, num_parts)
  FailedQueries failed;
};

// The k-th least of the words of a warp; words that are equal count once.
template <int kCount>
EAML_DEVICE uint32_t find_least(uint32_t (&words)[kCount], int k) {
  uint32_t least = 0;
  for (int i = 0; i < k; ++i) {
    least = words[0];
    EAML_UNROLL
    for (int j = 1; j < kCount; ++j) least = words[j] < least ? words[j] : least;
    least = cuda::min_of_warp(least);
    EAML_UNROLL
    for (int j = 0; j < kCount; ++j) words[j] = words[j] == least ? kNone<uint32_t> : words[j];
  }
  return least;
}

// The shared memory of a block, [8 kTiles] queries.
template <int kTiles>
struct OnePassMemory {
  static constexpr int kQueries = 8 * kTiles;
  Shared<uint16_t> queries;             // [columns / 32][kTiles][lane][8], in the order in which a lane reads a key
  Shared<float> centre;                 // [columns], without panels
  Shared<float> slope, extent, margin;  // [kQueries]
  Shared<uint32_t> count;               // [kQueries]
  Shared<float> scales;                 // [kSampledKeys]
  Shared<float> scores, minima;         // [kQueries][kScoreRow] lower bounds, [kQueries][kGroups] upper bounds
  Shared<float> widths;                 // [kStep]
  Shared<uint32_t> norms;               // [kStep]

  EAML_MEMBER OnePassMemory(char* at, int columns) {
    queries.data = reinterpret_cast<uint16_t*>(at);
    centre.data = reinterpret_cast<float*>(queries.data + columns * kQueries);
    scores.data = centre.data + columns;
    minima.data = scores.data + kQueries * kScoreRow;
    widths.data = minima.data + kQueries * kGroups;
    norms.data = reinterpret_cast<uint32_t*>(widths.data + kStep);
    slope.data = widths.data + 2 * kStep;
    extent.data = slope.data + kQueries;
    margin.data = extent.data + kQueries;
    count.data = reinterpret_cast<uint32_t*>(margin.data + kQueries);
    scales.data = margin.data + 2 * kQueries;
  }
  static std::size_t bytes(int64_t columns) {
    return columns * (2 * kQueries + 4) + 4 * (kQueries * (kScoreRow + kGroups + 4) + 2 * kStep + kSampledKeys);
  }
  // The part of the bounds of a score in the norms of a query and a key.
  EAML_MEMBER float error(int query, uint32_t norms) const {
    return slope.get(query) * low(norms) + extent.get(query) * high(norms);
  }
  // The index in `queries` of a column of a query.
  EAML_MEMBER int query_offset(int query, int column) const {
    const int lane = query % 8 * 4 + column % kColumns / 8;
    return ((column / kColumns * kTiles + query / 8) * cuda::kWarp + lane) * 8 + column % 8;
  }
};

// The two keys of a lane, of rows g and g + 8 of a product: the bounds of their scores, except the products.
struct LaneKeys {
  float start[2], width[2];
  uint32_t norms[2];
};

// A warp adds the products of 16 keys and all queries to `sum`, in the layout of multiply_add. Entry i of lane (g, t)
// belongs to key g + i / 2 * 8 and query 2 t + i % 2. The lane reads columns 8 t ... 8 t + 7 of every 32 columns of its
// keys: a permutation of the columns, the same for keys and queries, does not change a product.
template <int kTiles>
EAML_DEVICE void multiply_columns(float (&sum)[kTiles][4], const uint32_t (&a)[2][4], int chunk,
                                  const OnePassMemory<kTiles>& shared) {
  const Shared<uint32_t> queries{reinterpret_cast<uint32_t*>(shared.queries.data)};
  EAML_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    uint32_t b[4];
    queries.get_row(b, ((chunk * kTiles + n) * cuda::kWarp + cuda::thread() % cuda::kWarp) * 4);
    EAML_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint32_t left[4] = {a[0][i], a[1][i], a[0][i + 1], a[1][i + 1]}, right[2] = {b[i], b[i + 1]};
      cuda::multiply_add(sum[n], left, right);
    }
  }
}

// Keys from panels.
template <int kTiles>
EAML_DEVICE void multiply_panel(float (&sum)[kTiles][4], LaneKeys& keys, const OnePassFilter& p, int64_t block,
                                int64_t first, const OnePassMemory<kTiles>& shared) {
  const int lane = cuda::thread() % cuda::kWarp, column = lane % 4 * 8;
  const uint16_t* rows[2];
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t slot = first + lane / 4 + h * 8, at = p.packed.bounds_at(block, slot);
    rows[h] = p.packed.key(block, slot, p.depth) + column;
    keys.start[h] = cuda::load(p.packed.start + at), keys.width[h] = cuda::load(p.packed.width + at);
    keys.norms[h] = cuda::load(p.packed.norm(block, slot));
  }
  constexpr int kBatch = 5;  // reads in flight
  const int chunks = static_cast<int>(p.columns) / kColumns;
  for (int c = 0; c < chunks; c += kBatch) {
    uint32_t a[kBatch][2][4];
    EAML_UNROLL
    for (int b = 0; b < kBatch; ++b)
      for (int h = 0; h < 2; ++h) {
        const int at = (c + b) * kColumns;
        if (at + column < p.depth) {
          cuda::load_row(a[b][h], reinterpret_cast<const uint32_t*>(rows[h] + at));
        } else {
          EAML_UNROLL
          for (int j = 0; j < 4; ++j) a[b][h][j] = 0;
        }
      }
    EAML_UNROLL
    for (int b = 0; b < kBatch; ++b)
      if (c + b < chunks) multiply_columns(sum, a[b], c + b, shared);
  }
}

// Keys from rows, which the warp centres or normalises and rounds to bfloat16, as panels hold them.
template <class Source, int kTiles>
EAML_DEVICE void multiply_rows(float (&sum)[kTiles][4], LaneKeys& keys, const OnePassFilter& p, int64_t memory,
                               int64_t first, const OnePassMemory<kTiles>& shared) {
  const KnnParams<float>& params = p.params;
  const int lane = cuda::thread() % cuda::kWarp;
  const Memory<float> from(params, memory);
  int64_t slots[2];
  float square[2], rounding[2] = {};
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t slot = first + lane / 4 + h * 8;
    slots[h] = slot < params.size ? slot : params.size - 1;
  }
  const auto read_centre = [&](int64_t i, float (&to)[8]) { shared.centre.get_row(to, static_cast<int>(i)); };
  centre_rows<Source>(square, {from.keys, from.features, from.half}, slots, from.metric, read_centre,
                      [&](int64_t i, const float (&x)[2][8]) {
                        uint32_t a[2][4];
                        EAML_UNROLL
                        for (int h = 0; h < 2; ++h)
                          for (int j = 0; j < 4; ++j) a[h][j] = round_pair(rounding[h], x[h][2 * j], x[h][2 * j + 1]);
                        multiply_columns(sum, a, static_cast<int>(i / kColumns), shared);
                      });
  const TensorCoreBound bound(from.features);
  const float error = float(bound.key), underflow = float(bound.underflow);
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float norm = norm_bound(square[h], error, underflow);
    const float rest = norm_bound(sum_of_row(rounding[h]), error, underflow);
    const bool fits = norm <= Limits<float>::kMaxNorm;
    const KeyBounds<float> bounds =
        key_bounds(square[h], from.weight(slots[h]), fits, from.metric == Metric::kSqeuclidean, error);
    keys.start[h] = bounds.start, keys.width[h] = bounds.width, keys.norms[h] = fits ? key_pair(norm, rest) : 0;
    EAML_UNROLL
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 2; ++i) {
        float& product = sum[n][h * 2 + i];
        product = fits ? product - shared.error(n * 8 + lane % 4 * 2 + i, keys.norms[h]) : 0.0f;
      }
  }
}

}  // namespace
}  // namespace eaml::knn
