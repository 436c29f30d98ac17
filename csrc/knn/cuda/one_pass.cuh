// The search of few queries: each key is read once, by a kernel that keeps the candidates of every query.
#pragma once

#include "knn/cuda/one_pass_products.cuh"

namespace eaml::knn {
namespace {

// A block searches a part of a memory: it keeps all keys that may be among the k best of the part.
template <class Source, int kTiles>
EAML_KERNEL(kThreads, std::is_same_v<Source, Rows> ? 1 : 2)
one_pass_kernel(EAML_CONSTANT OnePassFilter p) {
  constexpr int kQueries = 8 * kTiles;
  const KnnParams<float>& params = p.params;
  const int warp = cuda::thread() / cuda::kWarp, lane = cuda::thread() % cuda::kWarp, g = lane / 4, t = lane % 4;
  const int64_t part = cuda::block() % p.num_parts, in_pass = cuda::block() / p.num_parts;
  const int64_t memory = p.first_memory + in_pass;
  const int64_t block = memory / params.keys_share, features = params.features;
  const int queries_each = static_cast<int>(params.queries_each), columns = static_cast<int>(p.columns);
  const bool* valid = params.valid == nullptr ? nullptr : params.valid + memory / params.valid_share * params.size;
  const OnePassMemory<kTiles> shared(cuda::shared_memory(), columns);
  p.failed.clear();

  if constexpr (!std::is_same_v<Source, Panels>) {
    const KeyRows all{static_cast<const char*>(params.keys), features, params.half};
    const KeyRows keys{static_cast<const char*>(all.row(block * params.size)), features, params.half};
    for (int i = static_cast<int>(features) + cuda::thread(); i < columns; i += kThreads) shared.centre.set(i, 0);
    find_centre(keys, params.size, valid, params.metric, shared.scales,
                [&](int64_t i, float mean) { shared.centre.set(static_cast<int>(i), mean); });
    cuda::sync_block();
  }
  for (int query = warp; query < kQueries; query += kWarps) {  // the same warp selects the query's candidates
    const auto set = [&](int64_t i, uint16_t bits) {
      shared.queries.set(shared.query_offset(query, static_cast<int>(i)), bits);
    };
    QueryBounds bounds{};
    if (query < queries_each) {
      const KeyRows queries{reinterpret_cast<const char*>(params.queries), features, Half::kNone};
      const auto centre = [&](int64_t i) {
        return std::is_same_v<Source, Panels> ? float(params.state[block * state_size(features) + i])
                                              : shared.centre.get(static_cast<int>(i));
      };
      bounds = pack_query(queries, memory * queries_each + query, params.metric, columns, centre, set);
    } else {
      for (int64_t i = lane; i < columns; i += cuda::kWarp) set(i, 0);
    }
    const float margin = bounds.fits ? bounds.margin : kNaN<float>;
    if (lane != 0) continue;
    shared.slope.set(query, low(bounds.pair.slope)), shared.extent.set(query, low(bounds.pair.norm));
    shared.margin.set(query, margin), shared.count.set(query, 0);
    if (part == 0 && query < queries_each) p.margin[in_pass * queries_each + query] = margin;
  }
  cuda::sync_block();

  const int64_t begin = part * p.part_size, end = begin + p.part_size < params.size ? begin + p.part_size : params.size;
  float minima[kTiles][4];
  EAML_UNROLL
  for (int n = 0; n < kTiles; ++n)
    for (int i = 0; i < 4; ++i) minima[n][i] = kInfinity<float>;
  for (int64_t step = begin; step < end; step += kStep) {
    const int size = static_cast<int>(end - step < kStep ? end - step : kStep);
    for (int tile = warp * kRowKeys; tile < size; tile += kWarps * kRowKeys) {
      float sum[kTiles][4] = {};
      LaneKeys keys;
      if constexpr (std::is_same_v<Source, Panels>)
        multiply_panel(sum, keys, p, block, step + tile, shared);
      else
        multiply_rows<Source>(sum, keys, p, memory, step + tile, shared);
      EAML_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int key = tile + h * 8 + g;
        const bool live = key < size && (valid == nullptr || valid[step + key]);
        if (t == 0) shared.widths.set(key, keys.width[h]), shared.norms.set(key, keys.norms[h]);
        EAML_UNROLL
        for (int n = 0; n < kTiles; ++n)
          for (int i = 0; i < 2; ++i) {
            const int query = n * 8 + 2 * t + i;
            const float lower = live ? keys.start[h] + sum[n][h * 2 + i] : kInfinity<float>;
            const float upper = lower + keys.width[h] + 2 * shared.error(query, keys.norms[h]);
            float& least = minima[n][h * 2 + i];
            least = upper < least ? upper : least;
            shared.scores.set(query * kScoreRow + key, lower);
          }
      }
    }
    EAML_UNROLL
    for (int n = 0; n < kTiles; ++n)
      for (int i = 0; i < 4; ++i)
        shared.minima.set((n * 8 + 2 * t + i % 2) * kGroups + warp * kRowKeys + i / 2 * 8 + g, minima[n][i]);
    cuda::sync_block();
    for (int query = warp; query < queries_each; query += kWarps) {
      const float margin = shared.margin.get(query);
      if (margin != margin) continue;
      uint32_t count = shared.count.get(query);
      Candidate* const list = p.list + (in_pass * queries_each + query) * p.capacity * p.num_parts + part;
      uint32_t words[kGroups / cuda::kWarp];
      EAML_UNROLL
      for (int j = 0; j < kGroups / cuda::kWarp; ++j)
        words[j] = word_of(shared.minima.get(query * kGroups + j * cuda::kWarp + lane));
      const float threshold = threshold_of(score_of<float>(find_least(words, p.k)), margin);
      for (int first = 0; first < size; first += 4 * cuda::kWarp) {
        float lower[4];
        const int mine = first + 4 * lane;
        shared.scores.get_row(lower, query * kScoreRow + mine);
        bool any = false;
        EAML_UNROLL
        for (int i = 0; i < 4; ++i) any |= mine + i < size && lower[i] <= threshold;
        if (cuda::ballot(any) == 0) continue;
        EAML_UNROLL
        for (int i = 0; i < 4; ++i) {
          const bool yes = mine + i < size && lower[i] <= threshold;
          const uint32_t votes = cuda::ballot(yes);
          const uint32_t position = count + cuda::count_bits(votes & ((1u << lane) - 1));
          count += cuda::count_bits(votes);
          if (!yes || position >= p.capacity) continue;
          const float width = shared.widths.get(mine + i) + 2 * shared.error(query, shared.norms.get(mine + i));
          list[position * p.num_parts] = {lower[i], lower[i] + width, uint32_t(step + mine + i), 0};
        }
      }
      cuda::sync_warp();  // all lanes have read the count
      if (lane == 0) shared.count.set(query, count);
    }
    cuda::sync_block();
  }
  for (int query = warp; query < queries_each; query += kWarps)
    if (lane == 0) p.count[(in_pass * queries_each + query) * p.num_parts + part] = shared.count.get(query);
}

// A block computes the results of a query from the candidates of all parts.
EAML_KERNEL(kThreads, 2)
one_pass_select_kernel(EAML_CONSTANT OnePassFilter p) {
  const int64_t row = cuda::block(), from = p.first_memory * p.params.queries_each + row;
  const int thread = cuda::thread(), lane = thread % cuda::kWarp, num_parts = static_cast<int>(p.num_parts);
  const uint32_t* const counts = p.count + row * p.num_parts;
  const Candidate* const list = p.list + row * p.capacity * p.num_parts;
  BlockOffsets offsets{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  const Shared<uint32_t> minima = offsets.counts.at(BlockOffsets::size(1)), longest = minima.at(kThreads);
  uint32_t most = 0;  // candidates of a part
  for (int part = thread; part < num_parts; part += kThreads) most = counts[part] > most ? counts[part] : most;
  most = ~cuda::min_of_warp(~most);
  if (lane == 0) longest.set(thread / cuda::kWarp, most);
  cuda::sync_block();
  EAML_UNROLL
  for (int w = 0; w < kWarps; ++w) most = longest.get(w) > most ? longest.get(w) : most;
  const float margin = p.margin[row];
  const bool failed = most > p.capacity || margin != margin;
  if (failed && p.failed.add(from)) return;
  // Candidates are divided among threads without regard to parts, because there may be few parts.
  const int size = failed ? 0 : static_cast<int>(most) * num_parts;
  const auto for_each = [&](auto use) {
    int part = thread % num_parts, j = thread / num_parts;
    EAML_UNROLL_BY(8)
    for (int i = thread; i < size; i += kThreads) {
      if (j < static_cast<int>(counts[part])) use(list[i]);
      part += kThreads % num_parts, j += kThreads / num_parts;
      if (part >= num_parts) part -= num_parts, ++j;
    }
  };
  uint32_t least = kNone<uint32_t>;
  for_each([&](const Candidate& candidate) {
    const uint32_t word = word_of(candidate.upper);
    least = word < least ? word : least;
  });
  minima.set(thread, least);
  cuda::sync_block();
  uint32_t words[kWarps];
  EAML_UNROLL
  for (int j = 0; j < kWarps; ++j) words[j] = minima.get(j * cuda::kWarp + lane);
  const float threshold = threshold_of(score_of<float>(find_least(words, p.k)), margin);
  cuda::sync_block();
  rerank(p.params, p.found, p.k, p.kept, from, threshold, offsets,
         [&](auto use) { failed ? for_each_key(p.params, from / p.params.queries_each, use) : for_each(use); });
}

// ---- host ----

template <int kTiles>
using Tiles = std::integral_constant<int, kTiles>;

inline int64_t one_pass_columns(const KnnParams<float>& p) {
  return ceil_div(p.panels == nullptr ? p.features : depth_of(p.features), kColumns) * kColumns;
}

// Returns whether a search takes one pass. It must have few queries and neighbours and many keys. The error bound must
// hold for the features, shared memory must suffice, and the device must have tensor cores for bfloat16.
inline bool is_one_pass(const KnnParams<float>& p) {
  constexpr int64_t kMinKeys = 1024;
  return p.size >= kMinKeys && p.queries_each <= kMaxOnePassQueries && p.k <= kMaxOnePassNeighbors &&
         TensorCoreBound(p.features).holds() && OnePassMemory<2>::bytes(one_pass_columns(p)) <= max_block_bytes() &&
         cuda::multiplies_bfloat16();
}

constexpr int64_t kPassMemory = 256 << 20;  // bytes of the arrays of one pass

inline OnePassFilter plan_one_pass(const KnnParams<float>& params, KnnOutput<float> found, Workspace& workspace,
                                   int64_t wanted_blocks = 2 * kFewBlocks) {
  OnePassFilter p{};
  p.params = params, p.found = found;
  if (params.panels != nullptr) p.packed = panels_at(params.panels, params.size, params.features);
  p.depth = depth_of(params.features), p.columns = one_pass_columns(params);
  p.k = static_cast<int>(params.k < params.size ? params.k : params.size);
  p.kept = TopK<uint64_t>::kept_for(p.k);
  constexpr int64_t kLeast = kWarps * kRowKeys;  // keys of a part: a product for each warp
  const int64_t memories = params.memories > 0 ? params.memories : 1;
  const int64_t wanted = between<int64_t>(1, wanted_blocks / memories, ceil_div(params.size, kLeast));
  p.part_size = ceil_div(ceil_div(params.size, wanted), kLeast) * kLeast;
  p.num_parts = ceil_div(params.size, p.part_size);
  p.capacity = between<int64_t>(1, 4 * p.k + 512, p.part_size);
  const int64_t row_bytes = p.num_parts * (p.capacity * sizeof(Candidate) + 4) + failed_row_bytes(params) + 4;
  p.memories = between<int64_t>(1, kPassMemory / (row_bytes * params.queries_each), memories);
  const int64_t rows = p.memories * params.queries_each;
  workspace.take(p.margin, rows);
  workspace.take(p.count, rows * p.num_parts);
  workspace.take(p.list, rows * p.capacity * p.num_parts);
  p.failed = plan_failed(params, found, rows, workspace);
  return p;
}

// Calls f(source of keys, Tiles), both as types.
template <class F>
const char* with_source(const KnnParams<float>& p, F f) {
  const auto with_tiles = [&](auto source) {
    return p.queries_each <= 8 ? f(source, Tiles<1>()) : f(source, Tiles<2>());
  };
  if (p.panels != nullptr) return with_tiles(Panels());
  if (has_aligned_rows(p)) return with_tiles(AlignedRows());
  return with_tiles(Rows());
}

inline const char* launch_one_pass(OnePassFilter p, void* stream) {
  const char* error = nullptr;
  const int64_t memories = p.memories;
  for (; error == nullptr && p.first_memory < p.params.memories; p.first_memory += memories) {
    p.memories = between<int64_t>(1, p.params.memories - p.first_memory, memories);
    error = with_source(p.params, [&](auto source, auto tiles) {
      using Source = decltype(source);
      constexpr int kTiles = decltype(tiles)::value;
      return cuda::launch(one_pass_kernel<Source, kTiles>, p.memories * p.num_parts, kThreads,
                          OnePassMemory<kTiles>::bytes(p.columns), stream, p);
    });
    if (error == nullptr)
      error = cuda::launch(one_pass_select_kernel, p.memories * p.params.queries_each, kThreads,
                           BlockOffsets::size(1) * sizeof(uint32_t) + rerank_bytes(p.k), stream, p);
    if (error == nullptr) error = launch_failed(p.params, p.found, p.failed, stream);
  }
  return error;
}

}  // namespace
}  // namespace eaml::knn
