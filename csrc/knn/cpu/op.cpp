// The CPU kernel of eaml_ext::knn: tensors in, tensors out.
#include <cstddef>

#include "knn/cpu/kernel.h"
#include "knn/op_common.h"

namespace eaml::knn {
namespace {

bool on_device(const Tensor& t) {
  return t.is_cpu();
}

std::int64_t panels_size(std::int64_t size, std::int64_t features, ScalarType wide) {
  return panel_count(size) * kPanel * panel_rows(features, wide == ScalarType::Float);
}

bool all_exist(const Tensor& slots, std::int64_t capacity) {
  const auto* slot = static_cast<const std::int64_t*>(slots.const_data_ptr());
  for (std::int64_t i = 0; i < slots.numel(); ++i)
    if (slot[i] < 0 || slot[i] >= capacity) return false;
  return true;
}

template <class T>
void run(const KnnParams<T>& problem, Tensor& values, Tensor& indices) {
  const KnnOutput<T> found{static_cast<T*>(values.mutable_data_ptr()),
                           static_cast<std::int64_t*>(indices.mutable_data_ptr())};
  const Plan cut = plan(problem, torch::stable::get_num_threads());
  const std::int64_t partial = cut.key_blocks > 1 ? cut.key_blocks * values.numel() : 0;
  const Tensor block_values = partial ? torch::stable::new_empty(values, {partial}) : values;
  const Tensor block_indices = partial ? torch::stable::new_empty(indices, {partial}) : indices;
  const KnnOutput<T> blocks{static_cast<T*>(block_values.mutable_data_ptr()),
                            static_cast<std::int64_t*>(block_indices.mutable_data_ptr())};
  torch::stable::parallel_for(0, cut.units, cut.grain,
                              [&](std::int64_t begin, std::int64_t end) { search(problem, cut, begin, end, blocks); });
  if (partial) merge(problem, cut, blocks, found);
}

template <class T>
void change(const PackedKeysView<T>& first, std::int64_t memories, const Update& what, const Tensor&) {
  const std::int64_t capacity = first.capacity, features = first.features, count = what.count;
  const std::int64_t element = first.half == Half::kNone ? sizeof(T) : 2;
  const auto at = [](const void* x, std::int64_t bytes) {
    return x ? static_cast<const std::byte*>(x) + bytes : nullptr;
  };
  const auto here = [](void* x, std::int64_t bytes) { return static_cast<std::byte*>(x) + bytes; };
  torch::stable::parallel_for(0, memories, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
      PackedKeysView<T> store = first;
      store.keys = here(first.keys, m * capacity * features * element);
      store.bias = here(first.bias, m * capacity * element);
      store.live += m * capacity;
      store.panels += m * panel_count(capacity) * panel_size<T>(features);
      store.state += m * state_size(features);
      if (what.rebuild)
        repack(store);
      else
        write(store, what.slots + m * count, count, at(what.keys, m * count * features * element),
              at(what.bias, m * count * element));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("knn_write", TORCH_BOX(&knn_write));
}

}  // namespace eaml::knn
