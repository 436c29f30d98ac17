// The exact search of candidates, and the direct search of queries for which the bounds or the list do not suffice.
#pragma once

#include "knn/cuda/panels.cuh"
#include "knn/cuda/rows.cuh"

namespace eaml::knn {
namespace {

// A key that may be among the k best, with the bounds of its fast score.
struct alignas(16) Candidate {
  float lower, upper;
  uint32_t slot, unused;
};

// Queries with too many candidates, or with numbers too large for the bounds. Kernels of rows.cuh search them directly.
// In a small memory the block that selects does.
struct FailedQueries {
  int64_t* list;          // (rows,) or null: the memory is small
  uint32_t* count;        // (1,)
  Entry<float>* partial;  // (rows, k, num_parts of the direct search)
  int64_t blocks;

  EAML_MEMBER void clear() const {
    if (list != nullptr && cuda::block() == 0 && cuda::thread() == 0) *count = 0;
  }
  // Returns whether another kernel searches the query.
  EAML_MEMBER bool add(int64_t query) const {
    if (list != nullptr && cuda::thread() == 0) list[cuda::add_for_all(count, 1)] = query;
    return list != nullptr;
  }
};

// Calls use(candidate) for all valid keys of a memory, which are divided among the threads of a block.
template <class Use>
EAML_DEVICE void for_each_key(const KnnParams<float>& params, int64_t memory, Use use) {
  const bool* const valid =
      params.valid == nullptr ? nullptr : params.valid + memory / params.valid_share * params.size;
  for (int64_t slot = cuda::thread(); slot < params.size; slot += kThreads)
    if (valid == nullptr || valid[slot]) use(Candidate{-kInfinity<float>, kInfinity<float>, uint32_t(slot), 0});
}

// The threshold of lower bounds, from the k-th least upper bound.
EAML_DEVICE float threshold_of(float upper, float margin) {
  const float most = upper + margin;
  return most <= Limits<float>::kMax ? most : Limits<float>::kMax;
}
// The list must be flushed.
EAML_DEVICE float threshold_of(const TopK<uint64_t>& uppers, float margin) {
  return threshold_of(score_of<float>(uint32_t(uppers.limit >> 32)), margin);
}

// The sum of n over the threads before this one, and over all threads of the block. sums: [kWarps].
EAML_DEVICE uint32_t sum_before(uint32_t n, uint32_t& total, const Shared<uint32_t>& sums) {
  const int lane = cuda::thread() % cuda::kWarp, warp = cuda::thread() / cuda::kWarp;
  uint32_t before = 0, of_warp = 0;
  for (int bit = 0; cuda::ballot(n >> bit != 0) != 0; ++bit) {
    const uint32_t votes = cuda::ballot((n >> bit) % 2 != 0);
    before += cuda::count_bits(votes & ((1u << lane) - 1)) << bit, of_warp += cuda::count_bits(votes) << bit;
  }
  if (lane == 0) sums.set(warp, of_warp);
  cuda::sync_block();
  total = 0;
  EAML_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t sum = sums.get(w);
    before += w < warp ? sum : 0, total += sum;
  }
  return before;
}

// A block evaluates the candidates of a query whose lower bounds are within the threshold, and writes the k best.
// for_each(f) calls f(candidate) for all candidates of the calling thread, in the same order each time. `from` is the
// query's number among all. Shared memory starts with the block's offsets.
template <class ForEach>
EAML_DEVICE void rerank(const KnnParams<float>& params, const KnnOutput<float>& found, int k, int kept, int64_t from,
                        float threshold, BlockOffsets& offsets, ForEach for_each) {
  char* memory_at = cuda::shared_memory() + BlockOffsets::size(1) * sizeof(uint32_t);
  const Shared<uint32_t> waiting{reinterpret_cast<uint32_t*>(memory_at)};  // [kFresh], slots to evaluate
  const Shared<uint32_t> sums = waiting.at(kFresh);                        // [kWarps]
  TopK<uint64_t> lists[1];
  lists[0].start(memory_at + (kFresh + kWarps) * sizeof(uint32_t), k, kept);
  const Memory<float> memory(params, from / params.queries_each);
  const Query<float> query[1] = {{params.queries + from * params.features, params.features}};
  const double norms[1] = {memory.metric == Metric::kCosine ? norm_of(query[0].row, params.features) : 0};
  const auto evaluate = [&](int first, int n) {  // n waiting slots, n <= kThreads
    const int thread = cuda::thread();
    uint64_t entries[1] = {kNone<uint64_t>};
    for (int i = 0; i < 2; ++i) {  // two threads compute two scores together, and each keeps one
      const int at = thread / 2 + i * (kThreads / 2);
      if (i * (kThreads / 2) >= n) break;
      const int64_t slot[1] = {waiting.get(first + (at < n ? at : 0))};
      float score[1][1];
      scores<false>(score, memory, slot, query, norms);
      if (thread % 2 == i && at < n) entries[0] = entry_of(score[0][0], uint32_t(slot[0]));
    }
    push(lists, entries, offsets);
  };
  uint32_t mine = 0, total = 0;
  for_each([&](const Candidate& candidate) { mine += candidate.lower <= threshold; });
  const uint32_t before = sum_before(mine, total, sums);
  for (uint32_t window = 0; window < total; window += kFresh) {
    uint32_t number = before;
    for_each([&](const Candidate& candidate) {
      if (!(candidate.lower <= threshold)) return;
      if (number - window < kFresh) waiting.set(static_cast<int>(number - window), candidate.slot);
      ++number;
    });
    cuda::sync_block();
    const int left = static_cast<int>(total - window < kFresh ? total - window : kFresh);
    evaluate(0, left < kThreads ? left : kThreads);
    if (left > kThreads) evaluate(kThreads, left - kThreads);
    cuda::sync_block();
  }
  lists[0].flush();
  cuda::sync_block();
  write_best(lists[0], params, found, from);
}

// ---- host ----

// Bytes of shared memory of `rerank`, after those of the block's offsets.
inline std::size_t rerank_bytes(int64_t k) {
  return (kFresh + kWarps) * sizeof(uint32_t) + TopK<uint64_t>::bytes(k);
}

// Keys that one block searches directly, which saves the launches of the direct search.
constexpr int64_t kOneBlockKeys = 1 << 15;

// The direct search of failed queries, without its arrays.
inline RowsTask<float> failed_task(const KnnParams<float>& params, KnnOutput<float> found) {
  RowsTask<float> task = rows_task(params, found);
  partition_keys(task, between<int64_t>(1, params.size / 4096, kThreads));
  return task;
}
// Bytes of scratch memory of a query that may fail.
inline int64_t failed_row_bytes(const KnnParams<float>& params) {
  if (params.size <= kOneBlockKeys) return 0;
  const RowsTask<float> task = failed_task(params, {});
  return task.num_parts * task.k * sizeof(Entry<float>) + sizeof(int64_t);
}

// Plans the direct search of up to `rows` failed queries.
inline FailedQueries plan_failed(const KnnParams<float>& params, KnnOutput<float> found, int64_t rows,
                                 Workspace& workspace) {
  FailedQueries failed{};
  if (params.size <= kOneBlockKeys) return failed;
  const RowsTask<float> task = failed_task(params, found);
  failed.blocks = between<int64_t>(1, rows * task.num_parts, kManyBlocks);
  workspace.take(failed.list, rows);
  workspace.take(failed.count, 1);
  workspace.take(failed.partial, rows * task.num_parts * task.k);
  return failed;
}

inline const char* launch_failed(const KnnParams<float>& params, KnnOutput<float> found, const FailedQueries& failed,
                                 void* stream) {
  if (failed.list == nullptr) return nullptr;
  RowsTask<float> task = failed_task(params, found);
  task.blocks = failed.blocks, task.partial = failed.partial, task.list = failed.list, task.list_count = failed.count;
  return launch_rows(task, stream);
}

}  // namespace
}  // namespace eaml::knn
