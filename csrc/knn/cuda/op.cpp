// The CUDA kernels of knn on tensors: limits and allocation. No function synchronises with the GPU and all memory is
// torch's, so that calls can be captured in a CUDA graph.
#include "common/check.h"
#include "common/device_guard.h"
#include "knn/cuda/launch.h"
#include "knn/op_common.h"

namespace eaml::knn {
namespace {

std::int64_t panels_size(std::int64_t size, std::int64_t features, ScalarType) {
  return panel_count(size) * panel_words(features);
}

bool all_exist(const Tensor&, std::int64_t) {
  return true;  // the kernels skip slots outside a memory
}

// Scratch memory of one call. torch reuses freed memory only for later work of the same stream.
Tensor scratch(const Tensor& like, std::int64_t bytes) {
  return allocate(like, {bytes}, ScalarType::Byte);
}

template <class T>
void run_search(const KnnParams<T>& params, Tensor& values, Tensor& indices) {
  EAML_CHECK(params.k <= kMaxNeighbors || params.size <= kMaxNeighbors, "knn: k is ", params.k,
             ", the CUDA kernels find up to ", kMaxNeighbors);
  EAML_CHECK(params.size <= kMaxKeys, "knn: keys has ", params.size, " keys in a memory, the CUDA kernels take up to ",
             kMaxKeys);
  const cuda::DeviceStreamGuard guard(values);
  const Tensor memory = scratch(values, search_bytes(params));
  const KnnOutput<T> found{mutable_data<T>(values), mutable_data<std::int64_t>(indices)};
  cuda::check_launch(search(params, found, memory.mutable_data_ptr(), guard.stream()));
}

template <class T>
void run_update(const PackedKeysView<T>& first, std::int64_t memories, const Update& update, const Tensor& keys) {
  if constexpr (sizeof(T) == 8) {
    EAML_CHECK(false, "knn_write: there are no CUDA panels of float64 keys");
  } else {
    if (memories == 0 || (!update.rebuild && update.count == 0)) return;
    const cuda::DeviceStreamGuard guard(keys);
    const Tensor memory = scratch(keys, write_bytes(first, memories, update.rebuild, update.count));
    cuda::check_launch(write(first, memories, update.rebuild, update.slots, update.count, update.keys, update.bias,
                             memory.mutable_data_ptr(), guard.stream()));
  }
}

template <class T>
constexpr Functions<T> kFunctions{run_search<T>, run_update<T>};
constexpr Device kDevice{cuda::on_device, panels_size, all_exist, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, EAML_CUDA_KEY, m) {
  register_ops<kDevice>(m);
}

}  // namespace eaml::knn
