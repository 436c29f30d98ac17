// The exact search of candidates, and the queries that candidates cannot answer.
#pragma once

#include "knn/cuda/panels.cuh"
#include "knn/cuda/rows.cuh"

namespace eaml::knn {
namespace {

// A key that may be among the k best, with the bounds of its fast score.
struct Candidate {
  float lower, upper;
  uint32_t slot, unused;
};
EAML_DEVICE Candidate no_candidate() {
  return {kInfinity<float>, kInfinity<float>, 0, 0};
}

// Queries with too many candidates, or with numbers too large for the bounds: they are searched directly.
struct FailedQueries {
  int64_t* list;          // (rows,)
  uint32_t* count;        // (1,)
  Entry<float>* partial;  // (rows, k, parts of the direct search)
  int64_t blocks;

  EAML_MEMBER void add(int64_t query) const { list[cuda::add_for_all(count, 1)] = query; }
};

// The threshold of lower bounds, from the k-th least upper bound.
EAML_DEVICE float threshold_of(float upper, float margin) {
  const float most = upper + margin;
  return most <= Limits<float>::kMax ? most : Limits<float>::kMax;
}
// The list must be flushed.
EAML_DEVICE float threshold_of(const TopK<uint64_t>& uppers, float margin) {
  return threshold_of(score_of<float>(uint32_t(uppers.limit >> 32)), margin);
}

// Bytes of shared memory of `rerank`, after those of the block's offsets.
inline std::size_t rerank_bytes(int64_t k) {
  return kFresh * sizeof(uint32_t) + TopK<uint64_t>::bytes(k);
}

// A block evaluates the candidates of a query whose lower bounds are within the threshold, and writes the k best.
// get(i) is candidate i < count, or no_candidate(); `from` is the query's number among all. Shared memory starts with
// the block's offsets.
template <class Get>
EAML_DEVICE void rerank(const KnnParams<float>& params, const KnnOutput<float>& found, int k, int kept, int64_t from,
                        int64_t count, float threshold, BlockOffsets& offsets, Get get) {
  char* memory_at = cuda::shared_memory() + BlockOffsets::size(1) * sizeof(uint32_t);
  const Shared<uint32_t> waiting{
      reinterpret_cast<uint32_t*>(memory_at)};  // [kFresh], slots that wait for their exact values
  TopK<uint64_t> lists[1];
  lists[0].start(memory_at + kFresh * sizeof(uint32_t), k, kept);
  cuda::sync_block();
  const Memory<float> memory(params, from / params.queries_each);
  const Query<float> query[1] = {{params.queries + from * params.features, params.features}};
  const double norms[1] = {memory.metric == Metric::kCosine ? norm_of(query[0].row, params.features) : 0};
  int held = 0;
  const auto evaluate = [&](int n) {  // the first n waiting slots, n <= kThreads
    cuda::sync_block();
    const int thread = cuda::thread();
    uint64_t entries[1] = {kNone<uint64_t>};
    for (int i = 0; i < 2; ++i) {  // two threads compute two scores together, and each keeps one
      const int at = thread / 2 + i * (kThreads / 2);
      if (i * (kThreads / 2) >= n) break;
      const int64_t slot[1] = {waiting.get(at < n ? at : 0)};
      float score[1][1];
      scores<false>(score, memory, slot, query, norms);
      if (thread % 2 == i && at < n) entries[0] = entry_of(score[0][0], uint32_t(slot[0]));
    }
    push(lists, entries, offsets);
  };
  for (int64_t i = 0; i < count; i += kThreads) {
    const Candidate candidate = get(i + cuda::thread());
    const bool yes[1] = {candidate.lower <= threshold};
    int place[1], total[1];
    offsets.find(yes, place, total);
    if (yes[0]) waiting.set(held + place[0], candidate.slot);
    held += total[0];
    if (held < kThreads) continue;
    evaluate(kThreads);
    cuda::sync_block();
    held -= kThreads;
    const uint32_t kept_slot = cuda::thread() < held ? waiting.get(kThreads + cuda::thread()) : 0;
    cuda::sync_block();
    if (cuda::thread() < held) waiting.set(cuda::thread(), kept_slot);
    cuda::sync_block();
  }
  if (held > 0) evaluate(held);
  lists[0].flush();
  cuda::sync_block();
  write_best(lists[0], params, found, from);
}

// ---- host ----

// The direct search of failed queries, without its arrays.
inline RowsTask<float> failed_task(const KnnParams<float>& params, KnnOutput<float> found) {
  RowsTask<float> task = rows_task(params, found);
  partition_keys(task, between<int64_t>(1, params.size / 4096, kThreads));
  return task;
}
// Bytes of scratch memory of a query that may fail.
inline int64_t failed_row_bytes(const KnnParams<float>& params) {
  const RowsTask<float> task = failed_task(params, {});
  return task.parts * task.k * sizeof(Entry<float>) + sizeof(int64_t);
}

// Plans the direct search of up to `rows` failed queries.
inline FailedQueries plan_failed(const KnnParams<float>& params, KnnOutput<float> found, int64_t rows,
                                 Workspace& workspace) {
  FailedQueries failed{};
  const RowsTask<float> task = failed_task(params, found);
  failed.blocks = between<int64_t>(1, rows * task.parts, kManyBlocks);
  workspace.take(failed.list, rows);
  workspace.take(failed.count, 1);
  workspace.take(failed.partial, rows * task.parts * task.k);
  return failed;
}

inline const char* launch_failed(const KnnParams<float>& params, KnnOutput<float> found, const FailedQueries& failed,
                                 void* stream) {
  RowsTask<float> task = failed_task(params, found);
  task.blocks = failed.blocks, task.partial = failed.partial, task.list = failed.list, task.list_count = failed.count;
  return launch_rows(task, stream);
}

}  // namespace
}  // namespace eaml::knn
