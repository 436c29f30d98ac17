// The CPU kernels of knn: fast scores exclude nearly all keys by a proven error bound, exact scores order the rest.
#include "knn/cpu/kernel.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "knn/cpu/candidate_filter.h"
#include "knn/cpu/packed_keys_updater.h"

namespace eaml::knn {

bool has_pairs(bool is_float) {
  return is_float && pairs_supported();
}

template <class T>
Plan plan(const KnnParams<T>& p, std::int64_t threads) {
  constexpr std::int64_t kQueryBytes = 1 << 19, kKeyBlock = 1024, kGrain = 1 << 17, kEntries = 1 << 21;
  const auto ceil = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  const std::int64_t entries = std::max<std::int64_t>(1, std::min(p.size, 2 * p.k + 64));
  const std::int64_t cached = std::max<std::int64_t>(kRows, kQueryBytes / std::int64_t(sizeof(T) * (p.features + 1)));
  const std::int64_t most = std::clamp<std::int64_t>(kEntries / entries, 1, cached);
  Plan plan;
  plan.query_block = ceil(ceil(p.queries_each, ceil(p.queries_each, most)), kRows) * kRows;
  plan.query_blocks = ceil(p.queries_each, plan.query_block);
  // If units are few, keys are divided too, between panels, so that the units are a multiple of the threads.
  const std::int64_t whole = p.memories * plan.query_blocks;
  const std::int64_t even = whole < 8 * threads ? threads / std::gcd(whole, threads) : 1;
  const std::int64_t wanted = std::clamp<std::int64_t>(p.size / kKeyBlock, 1, even);
  const std::int64_t blocks =
      std::max(wanted, ceil(p.size, std::int64_t(1) << 30));  // slots of a block fit into 32 bits
  plan.key_block = std::max<std::int64_t>(1, ceil(ceil(p.size, blocks), kPanel)) * kPanel;
  plan.key_blocks = std::max<std::int64_t>(1, ceil(p.size, plan.key_block));
  plan.units = whole * plan.key_blocks;
  const std::int64_t work = std::min(plan.query_block, p.queries_each) * plan.key_block * (p.features + 8);
  plan.grain = 1 + kGrain / (1 + work);
  return plan;
}

template <class T>
void search(const KnnParams<T>& params, const Plan& plan, std::int64_t first, std::int64_t last, KnnOutput<T> output) {
  CandidateFilter<T> filter(params, plan);
  for (std::int64_t unit = first; unit < last; ++unit) filter.run(unit, output);
}

template <class T>
void merge(const KnnParams<T>& params, const Plan& plan, KnnOutput<T> blocks, KnnOutput<T> output) {
  const std::int64_t rows = params.memories * params.queries_each, k = params.k;
  const T sign = params.metric == Metric::kSqeuclidean ? T(1) : T(-1);
  std::vector<Ranked<T>> ranked;
  for (std::int64_t row = 0; row < rows; ++row) {
    ranked.clear();
    for (std::int64_t block = 0; block < plan.key_blocks; ++block) {
      const std::int64_t from = (block * rows + row) * k;
      for (std::int64_t j = from; j < from + k && blocks.indices[j] >= 0; ++j)
        ranked.push_back({sign * blocks.values[j], blocks.indices[j]});
    }
    write_best(ranked, k, params.metric, output.values + row * k, output.indices + row * k);
  }
}

template <class T>
void write(const PackedKeysView<T>& view, const std::int64_t* slots, std::int64_t count, const void* keys,
           const void* bias) {
  PackedKeysUpdater<T>(view).write(slots, count, keys, bias);
}

template <class T>
void repack(const PackedKeysView<T>& view) {
  PackedKeysUpdater<T>(view).repack();
}

#define EAML_INSTANTIATE(T)                                                                                   \
  template Plan plan(const KnnParams<T>&, std::int64_t);                                                      \
  template void search(const KnnParams<T>&, const Plan&, std::int64_t, std::int64_t, KnnOutput<T>);           \
  template void merge(const KnnParams<T>&, const Plan&, KnnOutput<T>, KnnOutput<T>);                          \
  template void write(const PackedKeysView<T>&, const std::int64_t*, std::int64_t, const void*, const void*); \
  template void repack(const PackedKeysView<T>&);
EAML_INSTANTIATE(float)
EAML_INSTANTIATE(double)

}  // namespace eaml::knn
