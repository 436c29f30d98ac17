// The kernel that adds partial sums of gradients.
#pragma once

#include "common/cuda_compat.h"
#include "selective_scan/cuda/launch.h"

namespace eaml::selective_scan {
namespace {

// The second stage of the reductions. A block computes kSumColumns sums, each on kSumRows threads, in a fixed order.
constexpr int kSumColumns = 32, kSumRows = 8;
template <class T>
EAML_KERNEL(kSumColumns* kSumRows)
sum_kernel(EAML_CONSTANT SumParams<T> p) {
  const int64_t per_outer = (p.inner + kSumColumns - 1) / kSumColumns;
  const int64_t outer = cuda::block() / per_outer;
  const int column = cuda::thread() % kSumColumns, row = cuda::thread() / kSumColumns;
  const int64_t k = cuda::block() % per_outer * kSumColumns + column;
  const Shared<T> partial{reinterpret_cast<T*>(cuda::shared_memory())};
  T total = T(0);
  if (k < p.inner)
    for (int64_t j = row; j < p.middle; j += kSumRows) total += p.from[(outer * p.middle + j) * p.inner + k];
  partial.set(row * kSumColumns + column, total);
  cuda::sync_block();
  if (row > 0 || k >= p.inner) return;
  for (int r = 1; r < kSumRows; ++r) total += partial.get(r * kSumColumns + column);
  const int64_t entry = k / p.num_components, columns = p.rows == 0 ? 1 : p.inner / p.num_components / p.rows;
  const int64_t at =
      p.rows == 0 ? k : (entry % p.rows * columns + entry / p.rows) * p.num_components + k % p.num_components;
  p.to[outer * p.inner + at] = total;
}

}  // namespace
}  // namespace eaml::selective_scan
