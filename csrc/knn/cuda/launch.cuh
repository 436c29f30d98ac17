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

#include "knn/cuda/rows.cuh"
#include "knn/cuda/screen.cuh"
#include "knn/cuda/store.cuh"

namespace eaml::knn {
namespace {

template <class T>
const char* search_by(const KnnParams<T>& problem, KnnOutput<T> found, Pieces& pieces, void* stream) {
  if constexpr (sizeof(T) == 4) {
    if (!is_direct(problem)) {
      const CandidateFilter p = plan_screen(problem, found, pieces);
      return pieces.at == nullptr ? nullptr : launch_screen(p, stream);
    }
  }
  const RowsTask<T> p = plan_rows(problem, found, pieces);
  return pieces.at == nullptr ? nullptr : launch_rows(p, stream);
}

}  // namespace

#define EAML_DEFINE(T)                                                                                  \
  template <>                                                                                           \
  std::int64_t search_bytes<T>(const KnnParams<T>& problem) {                                           \
    Pieces pieces{nullptr};                                                                             \
    search_by<T>(problem, {}, pieces, nullptr);                                                         \
    return pieces.used + 1;                                                                             \
  }                                                                                                     \
  template <>                                                                                           \
  const char* search<T>(const KnnParams<T>& problem, KnnOutput<T> found, void* scratch, void* stream) { \
    Pieces pieces{static_cast<char*>(scratch)};                                                         \
    return search_by<T>(problem, found, pieces, stream);                                                \
  }

}  // namespace eaml::knn
