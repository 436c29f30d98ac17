// Launchers of the filtered search, on the host: the size of a pass and of its arrays, and its kernels in order.
#pragma once

#include <numeric>

#include "knn/cuda/candidate_filter.cuh"

namespace eaml::knn {
namespace {

// Returns whether exact values of all keys take less time than packing and filtering.
inline bool is_direct(const KnnParams<float>& p) {
  if (p.queries_each == 1 || p.size <= kTileKeys || !cuda::multiplies_bfloat16()) return true;
  const int64_t ratio = cuda::singles_to_a_double();
  const int64_t few = p.panels == nullptr ? between<int64_t>(1, 8 / ratio, 4) : 1;
  const double work = double(p.memories) * double(p.queries_each) * double(p.size) * double(p.features + 8);
  return p.queries_each <= few || work <= double(1 << 28) / double(ratio * ratio);
}

constexpr int64_t kFilterMemory = 256 << 20;  // bytes of the arrays of one pass

inline CandidateFilter plan_filter(const KnnParams<float>& params, KnnOutput<float> found, Workspace& workspace) {
  CandidateFilter p{};
  const int64_t size = params.size, panels = panel_count(size);
  p.params = params, p.found = found, p.depth = depth_of(params.features);
  p.keys_blocks = params.memories / params.keys_share;
  p.sets_share = params.panels != nullptr || params.bias == nullptr ? params.keys_share
                                                                    : std::gcd(params.keys_share, params.bias_share);
  p.sets = params.memories / p.sets_share;
  if (params.panels != nullptr) {
    p.packed = panels_at(params.panels, size, params.features);
  } else {
    p.aligned = has_aligned_rows(params);
    p.packed.keys_panel = kPanel * p.depth, p.packed.norms_panel = p.packed.bounds_panel = kPanel;
    p.packed.keys_stride = p.packed.keys_panel * panels;
    p.packed.norms_stride = p.packed.bounds_stride = kPanel * panels;
    workspace.take(p.centres, p.keys_blocks * params.features);
    workspace.take(p.packed.keys, p.keys_blocks * p.packed.keys_stride);
    workspace.take(p.packed.norms, p.keys_blocks * p.packed.norms_stride);
    workspace.take(p.packed.start, p.sets * p.packed.bounds_stride);
    workspace.take(p.packed.width, p.sets * p.packed.bounds_stride);
  }

  // The k-th best of a sample of s keys is near the (k n / s)-th best of all n keys; a larger k makes outliers rare.
  p.k = static_cast<int>(params.k < size ? params.k : size);
  p.kept = TopK<uint64_t>::kept_for(p.k);
  p.sample_k = p.k + 8;
  p.sample_kept = TopK<uint64_t>::kept_for(p.sample_k);
  const auto wanted = static_cast<int64_t>(2 * std::sqrt(double(p.sample_k) * double(size))) + size / 128;
  p.capacity = size;
  if (2 * wanted < size) {
    p.stride = size / wanted, p.sample = size / p.stride;
    p.capacity = between<int64_t>(1, 8 * p.sample_k * p.stride + 2048, size);
  }

  p.tile_rows = params.queries_each <= 16 ? 16 : 64;
  p.tiles_each = ceil_div(params.queries_each, p.tile_rows);
  const int64_t all = params.memories * p.tiles_each;
  const int64_t row_bytes = p.capacity * sizeof(Candidate) + p.sample * 4 + p.depth * 2 + failed_row_bytes(params) + 32;
  p.tiles = between<int64_t>(1, kFilterMemory / (row_bytes * p.tile_rows), all);
  p.tiles = ceil_div(all, ceil_div(all, p.tiles));
  p.splits = between<int64_t>(1, 2 * kManyBlocks / p.tiles, ceil_div(size, kTileKeys));
  p.sample_splits = between<int64_t>(1, 2 * kManyBlocks / p.tiles, ceil_div(p.sample, kTileKeys));
  const int64_t rows = p.tiles * p.tile_rows;
  workspace.take(p.queries, rows * p.depth);
  for (float** array : {&p.slope, &p.extent, &p.margin, &p.threshold}) workspace.take(*array, rows);
  workspace.take(p.sampled, rows * p.sample);
  workspace.take(p.count, rows);
  workspace.take(p.list, rows * p.capacity);
  p.failed = plan_failed(params, found, rows, workspace);
  return p;
}

template <int kM>
const char* launch_tiles(const CandidateFilter& p, void* stream) {
  const std::size_t bytes = filter_bytes<kM>(p.depth);
  const std::size_t list_bytes = BlockOffsets::size(1) * sizeof(uint32_t);
  const int64_t rows = p.tiles * p.tile_rows;
  const char* error = cuda::launch(queries_kernel, ceil_div(rows, kWarps), kThreads, 0, stream, p);
  if (error == nullptr && p.sample > 0) {
    error = cuda::launch(filter_kernel<kM, true>, p.tiles * p.sample_splits, kFilterThreads, bytes, stream, p);
    if (error == nullptr)
      error = cuda::launch(threshold_kernel, rows, kThreads, list_bytes + TopK<uint64_t>::bytes(p.sample_k), stream, p);
  }
  if (error == nullptr)
    error = cuda::launch(filter_kernel<kM, false>, p.tiles * p.splits, kFilterThreads, bytes, stream, p);
  if (error == nullptr) error = cuda::launch(select_kernel, rows, kThreads, list_bytes + rerank_bytes(p.k), stream, p);
  return error;
}

inline const char* launch_filter(CandidateFilter p, void* stream) {
  const char* error = nullptr;
  if (p.params.panels == nullptr) {
    error = cuda::launch(centre_kernel, p.keys_blocks, kThreads, kSampledKeys * sizeof(float), stream, p);
    if (error == nullptr)
      error = cuda::launch(pack_kernel, p.keys_blocks * packing_blocks(p.params.size), kThreads, 0, stream, p);
  }
  const int64_t all = p.params.memories * p.tiles_each, most = p.tiles;
  for (; error == nullptr && p.first_tile < all; p.first_tile += most) {
    p.tiles = between<int64_t>(1, all - p.first_tile, most);
    error = p.tile_rows == 16 ? launch_tiles<1>(p, stream) : launch_tiles<4>(p, stream);
    if (error == nullptr) error = launch_failed(p.params, p.found, p.failed, stream);
  }
  return error;
}

}  // namespace
}  // namespace eaml::knn
