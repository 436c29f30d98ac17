// Queries that are screened by products on tensor cores; see launch.cuh.
#pragma once

#include <numeric>

#include "knn/cuda/pack.cuh"
#include "knn/cuda/rows.cuh"

namespace eaml::knn {
namespace {

// ---- packing inside a call ----

// A screened call, or as many queries of it as its memory has room for, in tiles of the rows of one memory.
struct CandidateFilter {
  KnnParams<float> problem;
  KnnOutput<float> found;
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
centre_kernel(EAML_CONSTANT CandidateFilter p) {
  const int64_t block = cuda::block(), memory = block * p.problem.keys_share;
  const bool* valid = p.problem.valid;
  if (valid != nullptr) valid += memory / p.problem.valid_share * p.problem.size;
  find_centre(p.keys(block), p.problem.size, valid, p.problem.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              p.centres + block * p.problem.features);
}

// A block packs a panel; each key may have bounds of several memories.
EAML_KERNEL(kThreads, 2)
pack_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& problem = p.problem;
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
queries_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& problem = p.problem;
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
EAML_DEVICE int64_t slot_of(const CandidateFilter& p, int64_t i) {
  if constexpr (!kSample) return i;
  uint32_t mixed = static_cast<uint32_t>(i) * 2654435761u;
  mixed ^= mixed >> 15;
  return i * p.stride + mixed % static_cast<uint32_t>(p.stride);
}

// A block takes a tile of queries, kM times 16 of one memory, along a range of its keys. kSample: of the sample, whose
// upper bounds are written; otherwise of all keys, of which those within the threshold go on the lists.
template <int kM, bool kSample>
EAML_KERNEL(kScreenThreads)
screen_kernel(EAML_CONSTANT CandidateFilter p) {
  constexpr int kRows = 16 * kM, kN = kPanel / 8;
  const KnnParams<float>& problem = p.problem;
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
threshold_kernel(EAML_CONSTANT CandidateFilter p) {
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
select_kernel(EAML_CONSTANT CandidateFilter p) {
  const KnnParams<float>& problem = p.problem;
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
  const CandidateFilter::Candidate* const list = p.list + row * p.capacity;
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

// ---- what runs on the host ----

// Whether values in double, of all keys, take less time than packing and screening them.
inline bool is_direct(const KnnParams<float>& p) {
  if (p.queries_each == 1 || p.size <= kTileKeys || !cuda::multiplies_bfloat16()) return true;
  const int64_t ratio = cuda::singles_to_a_double();
  const int64_t few = p.panels == nullptr ? between<int64_t>(1, 8 / ratio, 4) : 1;
  const double work = double(p.memories) * double(p.queries_each) * double(p.size) * double(p.features + 8);
  return p.queries_each <= few || work <= double(1 << 28) / double(ratio * ratio);
}

constexpr int64_t kScreenMemory = 256 << 20;  // of queries that are searched at a time

inline CandidateFilter plan_screen(const KnnParams<float>& problem, KnnOutput<float> found, Pieces& pieces) {
  CandidateFilter p{};
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
  cut_keys(failed, between<int64_t>(1, size / 4096, kThreads));
  p.failed_parts = failed.parts, p.failed_part = failed.part;
  const int64_t all = problem.memories * p.tiles_each;
  const int64_t row_bytes = p.capacity * sizeof(CandidateFilter::Candidate) + p.sample * 4 + p.depth * 2 +
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
const char* launch_tiles(const CandidateFilter& p, void* stream) {
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

inline const char* launch_screen(CandidateFilter p, void* stream) {
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

}  // namespace
}  // namespace eaml::knn
