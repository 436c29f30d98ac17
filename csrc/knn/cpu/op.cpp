// The CPU kernels of knn on tensors: allocation and threads.
#include <cstddef>

#include "knn/cpu/kernel.h"
#include "knn/op_common.h"

namespace eaml::knn {
namespace {

bool on_device(const Tensor& t) {
  return t.is_cpu();
}

std::int64_t panels_size(std::int64_t size, std::int64_t features, ScalarType type) {
  return panel_count(size) * kPanel * panel_rows(features, type == ScalarType::Float);
}

bool all_exist(const Tensor& slots, std::int64_t capacity) {
  const auto* slot = data<std::int64_t>(slots);
  for (std::int64_t i = 0; i < slots.numel(); ++i)
    if (slot[i] < 0 || slot[i] >= capacity) return false;
  return true;
}

template <class T>
void run_search(const KnnParams<T>& params, Tensor& values, Tensor& indices) {
  const KnnOutput<T> output{mutable_data<T>(values), mutable_data<std::int64_t>(indices)};
  const Plan plan = knn::plan(params, torch::stable::get_num_threads());
  const std::int64_t partial = plan.key_blocks > 1 ? plan.key_blocks * values.numel() : 0;
  const Tensor block_values = partial ? allocate(values, {partial}) : values;
  const Tensor block_indices = partial ? allocate(indices, {partial}) : indices;
  const KnnOutput<T> blocks{mutable_data<T>(block_values), mutable_data<std::int64_t>(block_indices)};
  torch::stable::parallel_for(0, plan.units, plan.grain,
                              [&](std::int64_t begin, std::int64_t end) { search(params, plan, begin, end, blocks); });
  if (partial) merge(params, plan, blocks, output);
}

template <class T>
void run_update(const PackedKeysView<T>& first, std::int64_t memories, const Update& update, const Tensor&) {
  const std::int64_t capacity = first.capacity, features = first.features, count = update.count;
  const std::int64_t element = first.half == Half::kNone ? sizeof(T) : 2;
  const auto at = [](const void* x, std::int64_t bytes) {
    return x ? static_cast<const std::byte*>(x) + bytes : nullptr;
  };
  const auto here = [](void* x, std::int64_t bytes) { return static_cast<std::byte*>(x) + bytes; };
  torch::stable::parallel_for(0, memories, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
      PackedKeysView<T> view = first;
      view.keys = here(first.keys, m * capacity * features * element);
      view.bias = here(first.bias, m * capacity * element);
      view.live += m * capacity;
      view.panels += m * panel_count(capacity) * panel_size<T>(features);
      view.state += m * state_size(features);
      if (update.rebuild)
        repack(view);
      else
        write(view, update.slots + m * count, count, at(update.keys, m * count * features * element),
              at(update.bias, m * count * element));
    }
  });
}

template <class T>
constexpr Functions<T> kFunctions{run_search<T>, run_update<T>};
constexpr Device kDevice{on_device, panels_size, all_exist, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  register_ops<kDevice>(m);
}

// The layout of panels depends on the machine. References have no panels, so this schema is not in Python.
STABLE_TORCH_LIBRARY_FRAGMENT(eaml_ext, m) {
  m.def("_knn_panel_rows(int features, bool is_float) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CompositeExplicitAutograd, m) {
  m.impl("_knn_panel_rows", TORCH_BOX(&panel_rows));
}

}  // namespace eaml::knn
