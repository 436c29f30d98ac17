// Runs knn's filtered searches alone, to count the candidates they select and the queries that they fail on.
#include "knn/cuda/launch.cuh"

#include <vector>

namespace eaml::knn {

// Searches one memory with the filter, whatever its size. queries: (count, features), keys: (size, features), bias:
// (size,) or null. Writes values and indices: (count, k), and counts: (count,), the candidates of each query, if one
// pass takes all tiles. Returns the number of queries of the last pass that were searched directly, or -1 if a kernel
// failed.
extern "C" __attribute__((visibility("default"))) std::int64_t eaml_filter(
    const float* queries, const float* keys, const float* bias, std::int64_t count, std::int64_t size,
    std::int64_t features, std::int64_t k, int metric, std::int64_t tiles, float* values, std::int64_t* indices,
    std::uint32_t* counts) {
  KnnParams<float> params{};
  params.queries = queries, params.keys = keys, params.bias = bias;
  params.keys_share = params.valid_share = params.bias_share = params.memories = 1;
  params.queries_each = count, params.size = size, params.features = features, params.k = k;
  params.metric = static_cast<Metric>(metric), params.half = Half::kNone;
  const KnnOutput<float> found{values, indices};
  Workspace none{nullptr};
  plan_filter(params, found, none);
  std::vector<std::uint64_t> memory(none.used / 8 + 1);
  Workspace workspace{reinterpret_cast<char*>(memory.data())};
  CandidateFilter p = plan_filter(params, found, workspace);
  p.tiles = between<std::int64_t>(1, p.tiles, tiles);
  if (launch_filter(p, nullptr) != nullptr) return -1;
  for (std::int64_t q = 0; q < count && p.tiles == p.tiles_each; ++q) counts[q] = p.count[q];
  const std::int64_t last = (p.tiles_each - 1) / p.tiles * p.tiles;  // the first tile of the last pass
  std::int64_t failed = 0;
  p.first_tile = last;
  for (std::int64_t row = 0; row < (p.tiles_each - last) * p.tile_rows; ++row)
    failed += p.exists(row) && (p.count[row] > p.capacity || p.threshold[row] == -kInfinity<float>);
  return failed;
}

// Searches memories with the one-pass filter. queries: (memories, count, features), keys: (memories, size, features),
// values and indices: (memories, count, k); counts: (memories, count), the candidates of each query, if one pass takes
// all memories. `blocks` bounds the parts of all memories, and `most` the memories of a pass. Returns the number of
// queries of the last pass that were searched directly, or -1 if a kernel failed.
extern "C" __attribute__((visibility("default"))) std::int64_t eaml_one_pass(
    const float* queries, const float* keys, std::int64_t memories, std::int64_t count, std::int64_t size,
    std::int64_t features, std::int64_t k, int metric, std::int64_t blocks, std::int64_t most, float* values,
    std::int64_t* indices, std::int64_t* counts) {
  KnnParams<float> params{};
  params.queries = queries, params.keys = keys;
  params.keys_share = params.valid_share = params.bias_share = 1;
  params.memories = memories, params.queries_each = count, params.size = size, params.features = features, params.k = k;
  params.metric = static_cast<Metric>(metric), params.half = Half::kNone;
  const KnnOutput<float> found{values, indices};
  Workspace none{nullptr};
  plan_one_pass(params, found, none, blocks);
  std::vector<std::uint64_t> memory(none.used / 8 + 1);
  Workspace workspace{reinterpret_cast<char*>(memory.data())};
  OnePassFilter p = plan_one_pass(params, found, workspace, blocks);
  p.memories = between<std::int64_t>(1, p.memories, most);
  if (launch_one_pass(p, nullptr) != nullptr) return -1;
  for (std::int64_t i = 0; i < memories * count && p.memories == memories; ++i) {
    counts[i] = 0;
    for (std::int64_t part = 0; part < p.num_parts; ++part) counts[i] += p.count[i * p.num_parts + part];
  }
  const std::int64_t last = (memories - 1) / p.memories * p.memories;  // the first memory of the last pass
  std::int64_t failed = 0;
  for (std::int64_t row = 0; row < (memories - last) * count; ++row) {
    bool fails = p.margin[row] != p.margin[row];
    for (std::int64_t part = 0; part < p.num_parts; ++part) fails |= p.count[row * p.num_parts + part] > p.capacity;
    failed += fails;
  }
  return failed;
}

// Whether a search of memories of float32 keys takes one pass.
extern "C" __attribute__((visibility("default"))) bool eaml_is_one_pass(std::int64_t count, std::int64_t size,
                                                                        std::int64_t features, std::int64_t k) {
  KnnParams<float> params{};
  params.queries_each = count, params.size = size, params.features = features, params.k = k;
  return is_one_pass(params);
}

}  // namespace eaml::knn
