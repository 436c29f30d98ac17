// What the results of knn do not show: how many keys its screen leaves, and which queries it gives up.
#include "knn/cuda/launch.cuh"

#include <vector>

namespace eaml::knn {

// Screens one memory on the stand-in, whatever way its size would go. counts: candidates of each query; returns how
// many queries went the other way, or -1 where a kernel failed, or -2 where there were too many queries for one pass.
extern "C" __attribute__((visibility("default"))) std::int64_t eaml_screen(
    const float* queries, const float* keys, const float* bias, std::int64_t count, std::int64_t size,
    std::int64_t features, std::int64_t k, int metric, std::int64_t tiles, float* values, std::int64_t* indices,
    std::uint32_t* counts) {
  KnnParams<float> problem{};
  problem.queries = queries, problem.keys = keys, problem.bias = bias;
  problem.keys_share = problem.valid_share = problem.bias_share = problem.memories = 1;
  problem.queries_each = count, problem.size = size, problem.features = features, problem.k = k;
  problem.metric = static_cast<Metric>(metric), problem.half = Half::kNone;
  const KnnOutput<float> found{values, indices};
  Pieces none{nullptr};
  plan_screen(problem, found, none);
  std::vector<std::uint64_t> memory(none.used / 8 + 1);
  Pieces pieces{reinterpret_cast<char*>(memory.data())};
  CandidateFilter p = plan_screen(problem, found, pieces);
  p.tiles = between<std::int64_t>(1, p.tiles, tiles);
  if (launch_screen(p, nullptr) != nullptr) return -1;
  for (std::int64_t q = 0; q < count && p.tiles == p.tiles_each; ++q) counts[q] = p.count[q];
  return *p.failed_count;
}

}  // namespace eaml::knn
