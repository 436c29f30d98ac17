// The CUDA kernels of knn. A query is searched in one of three ways, with the same bits.
//
// Direct search, rows.cuh: the exact value of every key, in double. A block takes some queries and a range of keys, and
// keeps their best entries in shared memory. It serves float64, and GPUs without tensor cores for
// bfloat16. It also serves searches that do not take one pass and have few queries of each memory, few keys or little
// work in all (`is_direct`).
//
// One pass, one_pass.cuh: up to 16 queries of each memory, at least 1,024 keys and up to 64 neighbours, if shared
// memory suffices for the features (`is_one_pass`). A block takes all queries and a part of the keys of a memory. It
// reads each key once, rounded to bfloat16, and multiplies it with all queries on tensor cores. The k-th least upper
// bound of its keys so far is the threshold of its candidates. `one_pass_select_kernel` reduces the candidates of all
// parts to keys that may be among the k best, and evaluates them in double.
//
// Filtered search, candidate_filter.cuh: all other searches. Keys and queries are centred and rounded to bfloat16, and
// their products on tensor cores give a lower bound of each value. A sample of the keys yields a threshold for each
// query that at least k keys satisfy. All keys whose lower bound is within the threshold are appended to the query's
// list. `select_kernel` reduces the list in the same way.
//
// Queries with too many candidates, or with numbers too large for the bounds, are searched directly: in a small memory
// by the block that would select their candidates.
//
// Kernels synchronise only by their order on the stream. No result depends on the order of threads.
#pragma once

#include "knn/cuda/filter_launch.cuh"
#include "knn/cuda/one_pass.cuh"
#include "knn/cuda/packed_keys_updater.cuh"
#include "knn/cuda/rows.cuh"

namespace eaml::knn {
namespace {

template <class T>
const char* search_by(const KnnParams<T>& params, KnnOutput<T> found, Workspace& workspace, void* stream) {
  if constexpr (sizeof(T) == 4) {
    if (is_one_pass(params)) {
      const OnePassFilter p = plan_one_pass(params, found, workspace);
      return workspace.at == nullptr ? nullptr : launch_one_pass(p, stream);
    }
    if (!is_direct(params)) {
      const CandidateFilter p = plan_filter(params, found, workspace);
      return workspace.at == nullptr ? nullptr : launch_filter(p, stream);
    }
  }
  const RowsTask<T> p = plan_rows(params, found, workspace);
  return workspace.at == nullptr ? nullptr : launch_rows(p, stream);
}

}  // namespace

#define EAML_DEFINE(T)                                                                                 \
  template <>                                                                                          \
  std::int64_t search_bytes<T>(const KnnParams<T>& params) {                                           \
    Workspace workspace{nullptr};                                                                      \
    search_by<T>(params, {}, workspace, nullptr);                                                      \
    return workspace.used + 1;                                                                         \
  }                                                                                                    \
  template <>                                                                                          \
  const char* search<T>(const KnnParams<T>& params, KnnOutput<T> found, void* scratch, void* stream) { \
    Workspace workspace{static_cast<char*>(scratch)};                                                  \
    return search_by<T>(params, found, workspace, stream);                                             \
  }

}  // namespace eaml::knn
