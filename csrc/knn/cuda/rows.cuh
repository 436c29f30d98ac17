// The direct search: the exact value of every key.
#pragma once

#include "knn/cuda/exact.cuh"

namespace eaml::knn {
namespace {

// A direct search of all queries, or of a list of queries that an earlier kernel wrote.
template <class T>
struct RowsTask {
  KnnParams<T> params;
  KnnOutput<T> found;
  Entry<T>* partial;             // (queries or entries of the list, k, num_parts), if there are several parts
  const int64_t* list;           // (*list_count,) or null: all queries
  const uint32_t* list_count;    // (1,)
  int64_t num_parts, part_size;  // of the keys
  int64_t groups, blocks;        // groups of queries of a memory, blocks of the launch
  int k, kept;
};

template <class T, int kQueries, bool kPlain>
EAML_KERNEL(kThreads, kQueries == 1 ? 2 : 1)
rows_kernel(EAML_CONSTANT RowsTask<T> p) {
  using E = Entry<T>;
  constexpr bool kStaged = kPlain;
  const KnnParams<T>& params = p.params;
  const int64_t features = params.features, padded = (features + 7) / 8 * 8;
  char* memory_at = cuda::shared_memory();
  const Shared<double> staged{reinterpret_cast<double*>(memory_at)};
  if constexpr (kStaged) memory_at += kQueries * padded * sizeof(double);
  BlockOffsets offsets{{reinterpret_cast<uint32_t*>(memory_at)}};
  memory_at += BlockOffsets::size(kQueries) * sizeof(uint32_t);
  const int64_t units = p.num_parts * (p.list == nullptr ? params.memories * p.groups : int64_t(*p.list_count));
  for (int64_t unit = cuda::block(); unit < units; unit += p.blocks) {
    cuda::sync_block();  // the previous unit's shared memory is no longer read
    const int64_t part = unit % p.num_parts, index = unit / p.num_parts;
    const int64_t group = p.list == nullptr ? index % p.groups : 0;
    const int64_t first = p.list == nullptr ? index / p.groups * params.queries_each + group * kQueries : p.list[index];
    const int64_t left = params.queries_each - group * kQueries;
    const int count = static_cast<int>(p.list == nullptr ? (left < kQueries ? left : kQueries) : 1);
    const Memory<T> memory(params, first / params.queries_each);
    std::conditional_t<kStaged, StagedQuery, Query<T>> queries[kQueries];
    TopK<E> lists[kQueries];
    double norms[kQueries];
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const T* row = params.queries + (first + (q < count ? q : 0)) * features;
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
    const int64_t begin = part * p.part_size, next = begin + p.part_size;
    const int64_t end = next < params.size ? next : params.size;
    // Two threads compute the scores of two keys, together if registers suffice; each keeps the score of one key.
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
      push(lists, entries, offsets);
    }
    EAML_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      if (q >= count) continue;
      lists[q].flush();
      if (p.partial == nullptr) {
        write_best(lists[q], params, p.found, first + q);
        continue;
      }
      const int64_t row = p.list == nullptr ? first + q : index;
      cuda::sync_block();
      for (int j = cuda::thread(); j < p.k; j += kThreads)
        p.partial[(row * p.k + j) * p.num_parts + part] = lists[q].best.get(j);
    }
  }
}

// Merges the best entries of the parts.
template <class T>
EAML_KERNEL(kThreads)
merge_kernel(EAML_CONSTANT RowsTask<T> p) {
  using E = Entry<T>;
  const KnnParams<T>& params = p.params;
  BlockOffsets offsets{{reinterpret_cast<uint32_t*>(cuda::shared_memory())}};
  const int64_t rows = p.list == nullptr ? params.memories * params.queries_each : int64_t(*p.list_count);
  for (int64_t row = cuda::block(); row < rows; row += p.blocks) {
    cuda::sync_block();
    TopK<E> lists[1];
    lists[0].start(cuda::shared_memory() + BlockOffsets::size(1) * sizeof(uint32_t), p.k, p.kept);
    cuda::sync_block();
    // Entries are ordered by rank within their part: once no part's next entry is accepted, no later one is.
    const int64_t count = p.num_parts * p.k;
    for (int64_t i = 0; i < count; i += kThreads) {
      const int64_t at = i + cuda::thread();
      const E entries[1] = {at < count ? p.partial[row * count + at] : kNone<E>};
      if (push(lists, entries, offsets) == 0 && p.num_parts <= kThreads) break;
    }
    lists[0].flush();
    cuda::sync_block();
    write_best(lists[0], params, p.found, p.list == nullptr ? row : p.list[row]);
  }
}

// ---- host ----

constexpr int64_t kMaxStagedFeatures = 512;

// The most shared memory of a block: a multiprocessor of a large GPU holds two such blocks, other GPUs may have less.
inline std::size_t max_block_bytes() {
  return between<std::size_t>(0, cuda::max_shared_bytes(), 96 << 10);
}

template <class T, int kQueries, bool kPlain>
std::size_t rows_bytes(const RowsTask<T>& p) {
  const std::size_t staged = kPlain ? (p.params.features + 7) / 8 * 8 * sizeof(double) : 0;
  return kQueries * (staged + TopK<Entry<T>>::bytes(p.k)) + BlockOffsets::size(kQueries) * sizeof(uint32_t);
}

template <class T>
bool is_plain(const KnnParams<T>& p) {
  return p.half == Half::kNone && p.features % 4 == 0 && p.features <= kMaxStagedFeatures &&
         reinterpret_cast<std::uintptr_t>(p.keys) % 16 == 0;
}

// Calls f(queries per block, whether keys are plain), both as constants.
template <class T, class F>
const char* with_rows(const RowsTask<T>& p, F f) {
  constexpr int kGroup = 4;
  const bool plain = is_plain(p.params);
  if (p.list == nullptr && p.params.queries_each > 1) {
    if (plain && rows_bytes<T, kGroup, true>(p) <= max_block_bytes())
      return f(std::integral_constant<int, kGroup>(), std::true_type());
    if (!plain && rows_bytes<T, kGroup, false>(p) <= max_block_bytes())
      return f(std::integral_constant<int, kGroup>(), std::false_type());
  }
  if (plain) return f(std::integral_constant<int, 1>(), std::true_type());
  return f(std::integral_constant<int, 1>(), std::false_type());
}

template <class T>
RowsTask<T> rows_task(const KnnParams<T>& params, KnnOutput<T> found) {
  RowsTask<T> p{};
  p.params = params, p.found = found;
  p.k = static_cast<int>(params.k < params.size ? params.k : params.size);
  if (p.k == 0) p.k = 1;  // no keys: the list stays empty
  p.kept = TopK<Entry<T>>::kept_for(p.k);
  return p;
}

// Divides the keys into parts, each several times larger than its list of best entries.
template <class T>
void partition_keys(RowsTask<T>& p, int64_t wanted) {
  const int64_t least = p.k * 4 > kThreads ? p.k * 4 : kThreads, size = p.params.size > 0 ? p.params.size : 1;
  p.num_parts = between<int64_t>(1, wanted, ceil_div(size, least));
  p.part_size = ceil_div(ceil_div(size, p.num_parts), kThreads) * kThreads;
  p.num_parts = ceil_div(size, p.part_size);
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
  const int64_t rows = p.params.memories * p.params.queries_each;
  RowsTask<T> merge = p;
  merge.blocks = p.list == nullptr ? rows : between<int64_t>(1, rows, kManyBlocks);
  return cuda::launch(merge_kernel<T>, merge.blocks, kThreads,
                      BlockOffsets::size(1) * sizeof(uint32_t) + TopK<Entry<T>>::bytes(p.k), stream, merge);
}

template <class T>
RowsTask<T> plan_rows(const KnnParams<T>& params, KnnOutput<T> found, Workspace& workspace) {
  RowsTask<T> p = rows_task(params, found);
  with_rows(p, [&](auto queries, auto) {
    p.groups = ceil_div(params.queries_each, decltype(queries)::value);
    return nullptr;
  });
  const int64_t units = params.memories * p.groups;
  partition_keys(p, units >= kFewBlocks ? 1 : kManyBlocks / units);
  p.blocks = units * p.num_parts;
  if (p.num_parts > 1) workspace.take(p.partial, params.memories * params.queries_each * p.k * p.num_parts);
  return p;
}

}  // namespace
}  // namespace eaml::knn
