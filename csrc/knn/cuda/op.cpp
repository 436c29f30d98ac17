// Tensors in, tensors out: what the CUDA knn is given, and the memory that it needs. Nothing here waits for the GPU,
// and all memory is torch's, so that calls can be captured in a CUDA graph.
#include "common/device_guard.h"
#include "knn/cuda/launch.h"
#include "knn/op_common.h"

namespace eaml::knn {
namespace {

bool on_device(const Tensor& t) {
  return cuda::on_device(t);
}

std::int64_t panels_size(std::int64_t size, std::int64_t features, ScalarType) {
  return panel_count(size) * panel_words(features);
}

bool all_exist(const Tensor&, std::int64_t) {
  return true;  // the kernels look
}

// Memory of one call. What is let go of, torch gives to later work of the same stream alone.
Tensor scratch(const Tensor& like, std::int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

template <class T>
void run(const KnnParams<T>& problem, Tensor& values, Tensor& indices) {
  EAML_CHECK(problem.k <= kMostNeighbors || problem.size <= kMostNeighbors, "knn: k is ", problem.k,
             ", the CUDA kernels find up to ", kMostNeighbors);
  EAML_CHECK(problem.size <= kMostKeys, "knn: keys has ", problem.size,
             " keys in a memory, the CUDA kernels take up to ", kMostKeys);
  const cuda::DeviceStreamGuard guard(values);
  const Tensor memory = scratch(values, search_bytes(problem));
  const KnnOutput<T> found{static_cast<T*>(values.mutable_data_ptr()),
                           static_cast<std::int64_t*>(indices.mutable_data_ptr())};
  cuda::check_launch(search(problem, found, memory.mutable_data_ptr(), guard.stream()));
}

template <class T>
void change(const PackedKeysView<T>& first, std::int64_t memories, const Update& what, const Tensor& keys) {
  if constexpr (sizeof(T) == 8) {
    EAML_CHECK(false, "knn_write: there are no CUDA panels of float64 keys");
  } else {
    if (memories == 0 || (!what.rebuild && what.count == 0)) return;
    const cuda::DeviceStreamGuard guard(keys);
    const Tensor memory = scratch(keys, write_bytes(first, memories, what.rebuild, what.count));
    cuda::check_launch(write(first, memories, what.rebuild, what.slots, what.count, what.keys, what.bias,
                             memory.mutable_data_ptr(), guard.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, EAML_CUDA_KEY, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("knn_write", TORCH_BOX(&knn_write));
}

}  // namespace eaml::knn
