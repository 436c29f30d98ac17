// The search by fast scores on tensor cores; launch.cuh describes it.
#pragma once

#include "knn/cuda/rerank.cuh"

namespace eaml::knn {
namespace {

// ---- packing within a call ----

// A filtered search of all queries, or of the number of tiles that fits into the workspace. A tile has rows of one
// memory.
struct CandidateFilter {
  KnnParams<float> params;
  KnnOutput<float> found;
  Packed packed;
  float* centres;  // (blocks of keys, features)
  bool aligned;    // whether keys are AlignedRows
  int64_t keys_blocks, sets, sets_share, depth;
  int64_t tile_rows, tiles_each, first_tile, tiles;  // queries of a tile, tiles of a memory, tiles of this pass
  int64_t sample, stride, capacity, splits, sample_splits;
  int k, kept, sample_k, sample_kept;
  // Arrays per query of this pass, rows = tiles * tile_rows.
  uint16_t* queries;                           // (rows, depth), negated
  float *slope, *extent, *margin, *threshold;  // (rows,)
  float* sampled;                              // (rows, sample), upper bounds
  uint32_t* count;                             // (rows,), entries of the list
  Candidate* list;                             // (rows, capacity)
  FailedQueries failed;

  EAML_MEMBER int64_t memory(int64_t row) const { return (first_tile + row / tile_rows) / tiles_each; }
  EAML_MEMBER int64_t query(int64_t row) const {
    return (first_tile + row / tile_rows) % tiles_each * tile_rows + row % tile_rows;
  }
  EAML_MEMBER bool exists(int64_t row) const { return query(row) < params.queries_each; }
  EAML_MEMBER KeyRows keys(int64_t block) const {
    const KeyRows all{static_cast<const char*>(params.keys), params.features, params.half};
    return {static_cast<const char*>(all.row(block * params.size)), params.features, params.half};
  }
};

EAML_KERNEL(kThreads)
centre_kernel(EAML_CONSTANT CandidateFilter p) {
  const int64_t block = cuda::block(), memory = block * p.params.keys_share;
  const bool* valid = p.params.valid;
  if (valid != nullptr) valid += memory / p.params.valid_share * p.params.size;
  float* const centre = p.centres + block * p.params.features;
  find_centre(p.keys(block), p.params.size, valid, p.params.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              [&](int64_t i, float mean) { centre[i] = mean; });
}

// A block packs four panels. Each key can have bounds for several memories, with their bias.
constexpr int kPackedKeys = kWarps * kRowKeys;
EAML_INLINE int64_t packing_blocks(int64_t size) {
  return (size + kPackedKeys - 1) / kPackedKeys;
}
EAML_KERNEL(kThreads, 2)
pack_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& params = p.params;
  const int64_t units = packing_blocks(params.size), block = cuda::block() / units;
  const int64_t first = cuda::block() % units * kPackedKeys + cuda::thread() / cuda::kWarp * kRowKeys;
  if (first >= params.size) return;
  const TensorCoreBound bound(params.features);
  float square[2];
  const auto pack = [&](auto source) {
    pack_rows<decltype(source)>(square, p.keys(block), first, params.size, p.centres + block * params.features,
                                params.metric, bound, p.packed, block, p.depth);
  };
  p.aligned ? pack(AlignedRows()) : pack(Rows());
  const int64_t sets_each = p.sets / p.keys_blocks;
  EAML_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t slot = first + cuda::thread() % cuda::kWarp / 4 + h * 8;
    if (slot >= params.size) continue;
    for (int64_t s = cuda::thread() % 4; s < sets_each; s += 4) {
      const int64_t set = block * sets_each + s, at = p.packed.bounds_at(set, slot);
      const int64_t biases = set * p.sets_share / params.bias_share * params.size;
      const float bias = params.bias == nullptr ? 0.0f : params.bias[biases + slot];
      set_bounds(square[h], bias, params.metric, bound, p.packed.start + at, p.packed.width + at);
    }
  }
}

// A warp packs a query. Rows of a tile without a query get zeros.
EAML_KERNEL(kThreads)
queries_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& params = p.params;
  p.failed.clear();
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t row = cuda::block() * kWarps + cuda::thread() / cuda::kWarp, features = params.features;
  if (row >= p.tiles * p.tile_rows) return;
  uint16_t* to = p.queries + row * p.depth;
  if (!p.exists(row)) {
    for (int64_t i = lane; i < p.depth; i += cuda::kWarp) to[i] = 0;
    if (lane == 0) p.threshold[row] = -kInfinity<float>, p.count[row] = 0;
    return;
  }
  const int64_t memory = p.memory(row), block = memory / params.keys_share;
  const KeyRows queries{reinterpret_cast<const char*>(params.queries), features, Half::kNone};
  const auto centre = [&](int64_t i) {
    return params.panels == nullptr ? p.centres[block * features + i]
                                    : float(params.state[block * state_size(features) + i]);
  };
  const QueryBounds bounds = pack_query(queries, memory * params.queries_each + p.query(row), params.metric, p.depth,
                                        centre, [&](int64_t i, uint16_t bits) { to[i] = bits; });
  if (lane != 0) return;
  p.slope[row] = low(bounds.pair.slope), p.extent[row] = low(bounds.pair.norm);
  p.margin[row] = bounds.margin;
  p.threshold[row] = bounds.fits ? Limits<float>::kMax : -kInfinity<float>;
  p.count[row] = 0;
}

// ---- products ----

constexpr int kFilterThreads = 128, kFilterWarps = kFilterThreads / cuda::kWarp;
constexpr int kTileKeys = kFilterWarps * kPanel;  // a warp computes a panel
constexpr int kChunk = 64;                        // columns of the depth that shared memory holds
constexpr int kChunkRow = kChunk + 8;             // padded, so that rows lie in different banks
constexpr int kMaxResidentChunks = 6;             // chunks of queries that stay in shared memory

EAML_INLINE int chunks_of(int64_t depth) {
  return static_cast<int>((depth + kChunk - 1) / kChunk);
}
EAML_INLINE int query_stages(int64_t depth) {
  return chunks_of(depth) <= kMaxResidentChunks ? chunks_of(depth) : 2;
}
template <int kM>
std::size_t filter_bytes(int64_t depth) {
  return (query_stages(depth) * 16 * kM + 2 * kTileKeys) * kChunkRow * 2 + 16 * kFilterThreads * 4;
}

// The slot of key `i` of all keys or of the sample, which takes one pseudo-random slot from each interval of `stride`.
template <bool kSample>
EAML_DEVICE int64_t slot_of(const CandidateFilter& p, int64_t i) {
  if constexpr (!kSample) return i;
  uint32_t mixed = static_cast<uint32_t>(i) * 2654435761u;
  mixed ^= mixed >> 15;
  return i * p.stride + mixed % static_cast<uint32_t>(p.stride);
}

// A block scores a tile of 16 kM queries of one memory against a range of its keys. With kSample it writes the upper
// bounds of sampled keys. Otherwise it appends all keys within the threshold to the queries' lists.
template <int kM, bool kSample>
EAML_KERNEL(kFilterThreads)
filter_kernel(EAML_CONSTANT CandidateFilter p) {
  constexpr int kRows = 16 * kM, kN = kPanel / 8;
  const KnnParams<float>& params = p.params;
  const int64_t splits = kSample ? p.sample_splits : p.splits;
  const int64_t tile = cuda::block() % p.tiles, split = cuda::block() / p.tiles, first_row = tile * kRows;
  const int64_t memory = p.memory(first_row), block = memory / params.keys_share, set = memory / p.sets_share;
  const int64_t size = kSample ? p.sample : params.size, key_tiles = (size + kTileKeys - 1) / kTileKeys;
  const int64_t begin = key_tiles * split / splits, end = key_tiles * (split + 1) / splits;
  const int thread = cuda::thread(), warp = thread / cuda::kWarp, lane = thread % cuda::kWarp;
  const int g = lane / 4, t = lane % 4;  // a thread's row or column of a fragment, and its pair along the other
  const int chunks = chunks_of(p.depth), stages = query_stages(p.depth);
  const bool resident = stages == chunks;
  const int64_t rows = params.queries_each - p.query(first_row);  // queries from the tile's first on

  const Shared<uint16_t> queries{reinterpret_cast<uint16_t*>(cuda::shared_memory())};
  const Shared<uint16_t> keys = queries.at(stages * kRows * kChunkRow);
  const Shared<float> mine{reinterpret_cast<float*>(keys.at(2 * kTileKeys * kChunkRow).data)};  // [16][thread]
  const auto words = [](const Shared<uint16_t>& x) { return Shared<uint32_t>{reinterpret_cast<uint32_t*>(x.data)}; };
  const auto vectors_of = [&](int chunk) {  // 16-byte vectors in a row of a chunk
    const int64_t left = p.depth - chunk * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk) / 8;
  };
  const auto load_rows = [&](const Shared<uint16_t>& to, int count, int chunk, auto row_of) {
    const int each = vectors_of(chunk);
    for (int i = thread; i < count * 8; i += kFilterThreads)
      if (i % 8 < each) to.copy_async(i / 8 * kChunkRow + i % 8 * 8, row_of(i / 8) + chunk * kChunk + i % 8 * 8);
  };
  const auto load_queries = [&](int stage, int chunk) {
    load_rows(queries.at(stage * kRows * kChunkRow), kRows, chunk,
              [&](int r) { return p.queries + (first_row + r) * p.depth; });
  };
  const auto load_step = [&](int64_t step) {  // loads a chunk of a tile of keys
    const int chunk = static_cast<int>(step % chunks), stage = static_cast<int>(step % 2);
    const int64_t first = (begin + step / chunks) * kTileKeys;
    load_rows(keys.at(stage * kTileKeys * kChunkRow), kTileKeys, chunk, [&](int r) {
      const int64_t i = first + r < size ? first + r : size - 1;
      return p.packed.key(block, slot_of<kSample>(p, i), p.depth);
    });
    if (!resident) load_queries(stage, chunk);
    cuda::end_copies();
  };

  float threshold[kM][2];
  EAML_UNROLL
  for (int m = 0; m < kM; ++m)
    for (int i = 0; i < 2; ++i)
      threshold[m][i] = kSample ? 0.0f : cuda::load(p.threshold + first_row + m * 16 + i * 8 + g);
  if (resident)
    for (int c = 0; c < chunks; ++c) load_queries(c, c);
  const int64_t steps = (end - begin) * chunks;
  if (steps > 0) load_step(0);
  float sum[kM][kN][4];
  for (int64_t step = 0; step < steps; ++step) {
    const int chunk = static_cast<int>(step % chunks), stage = static_cast<int>(step % 2);
    const int64_t first = (begin + step / chunks) * kTileKeys + warp * kPanel;  // the warp's first key
    if (step + 1 < steps) {
      load_step(step + 1);
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
    const int products = vectors_of(chunk) / 2;
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
        return params.valid == nullptr || params.valid[memory / params.valid_share * params.size + slot];
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
          for (int i = 0; i < 4 * kN; ++i) mine.set(i * kFilterThreads + thread, sum[m][i / 4][i % 4]);
          for (int i = 0; i < 4 * kN; ++i) {
            const float lower = mine.get(i * kFilterThreads + thread);
            if (!(lower <= (i % 4 < 2 ? threshold[m][0] : threshold[m][1]))) continue;
            const int64_t row = first_row + m * 16 + i % 4 / 2 * 8 + g, slot = first + i / 4 * 8 + 2 * t + i % 2;
            if (!is_live(slot)) continue;
            const uint32_t norms = cuda::load(p.packed.norm(block, slot));
            const float upper = lower + cuda::load(p.packed.width + p.packed.bounds_at(set, slot)) +
                                2 * (cuda::load(p.slope + row) * low(norms) + cuda::load(p.extent + row) * high(norms));
            const uint32_t position = cuda::add_for_all(p.count + row, 1);
            if (position < p.capacity) p.list[row * p.capacity + position] = {lower, upper, uint32_t(slot), 0};
          }
        }
      }
    }
    cuda::sync_block();
  }
}

// ---- selection ----

// A block computes the threshold of a query from its sample.
EAML_KERNEL(kThreads)
threshold_kernel(EAML_CONSTANT CandidateFilter p) {
  const int64_t row = cuda::block();
  if (!p.exists(row) || !(p.threshold[row] > 0)) return;
  BlockOffsets offsets{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  TopK<uint64_t> lists[1];
  lists[0].start(cuda::shared_memory() + BlockOffsets::size(1) * sizeof(uint32_t), p.sample_k, p.sample_kept);
  cuda::sync_block();
  for (int64_t i = 0; i < p.sample; i += kThreads) {
    const int64_t at = i + cuda::thread();
    const uint64_t entries[1] = {at < p.sample ? entry_of(p.sampled[row * p.sample + at], uint32_t(at))
                                               : kNone<uint64_t>};
    push(lists, entries, offsets);
  }
  lists[0].flush();
  if (cuda::thread() == 0) p.threshold[row] = threshold_of(lists[0], p.margin[row]);
}

// A block computes the results of a query from its list. A query with too many candidates is appended to the
// failed queries.
EAML_KERNEL(kThreads, 2)
select_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& params = p.params;
  const int64_t row = cuda::block();
  if (!p.exists(row)) return;
  const int64_t from = p.memory(row) * params.queries_each + p.query(row);
  const int64_t count = p.count[row];
  const bool failed = count > p.capacity || p.threshold[row] == -kInfinity<float>;
  if (failed && p.failed.add(from)) return;
  BlockOffsets offsets{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  const Candidate* const list = p.list + row * p.capacity;
  float threshold = Limits<float>::kMax;
  if (!failed && count > p.k) {
    TopK<uint64_t> lists[1];
    lists[0].start(cuda::shared_memory() + BlockOffsets::size(1) * sizeof(uint32_t), p.k, p.kept);
    cuda::sync_block();
    for (int64_t i = 0; i < count; i += kThreads) {
      const int64_t at = i + cuda::thread();
      const uint64_t entries[1] = {at < count ? entry_of(list[at].upper, uint32_t(at)) : kNone<uint64_t>};
      push(lists, entries, offsets);
    }
    lists[0].flush();
    threshold = threshold_of(lists[0], p.margin[row]);
    cuda::sync_block();
  }
  rerank(params, p.found, p.k, p.kept, from, threshold, offsets, [&](auto use) {
    if (failed) return for_each_key(params, p.memory(row), use);
    EAML_UNROLL_BY(4)
    for (int64_t i = cuda::thread(); i < count; i += kThreads) use(list[i]);
  });
}

}  // namespace
}  // namespace eaml::knn
