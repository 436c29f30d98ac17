// The ops of knn on tensors, shared by all devices: each device passes a table of its functions.
//
// Shapes of the tensors of a search; * is any number of leading sizes:
//   queries: (*, num_queries, features)
//   keys: (*, size, features)
//   valid, bias: (*, size)
//   panels: the panels of all memories
//   state: (*, state_size)
//   values, indices: (*, num_queries, k)
// The leading sizes of keys, valid and bias multiply to divisors of those of queries: consecutive rows share a memory.
// Shapes of the tensors of an update of PackedKeys:
//   keys: (*, capacity, features)
//   bias, live: (*, capacity)
//   slots, new_bias: (*, count)
//   new_keys: (*, count, features)
#pragma once

#include <cstdint>
#include <tuple>

#include "common/tensor.h"
#include "knn/params.h"

namespace eaml::knn {

// An update of PackedKeys: writes keys and bias to slots of each memory or, with `rebuild`, computes panels and state.
struct Update {
  bool rebuild;
  const std::int64_t* slots;  // (memories, count)
  std::int64_t count;
  const void* keys;  // (memories, count, features); null: the slots are erased
  const void* bias;  // (memories, count); null: 0
};

// The functions of one device on numbers of T.
template <class T>
struct Functions {
  void (*search)(const KnnParams<T>& params, Tensor& values, Tensor& indices);
  // Updates `memories` consecutive memories from `first` on. `keys` is their tensor of keys.
  void (*update)(const PackedKeysView<T>& first, std::int64_t memories, const Update& update, const Tensor& keys);
};

struct Device {
  bool (*has)(const Tensor& t);
  // Numbers in the panels of a memory. `type` is float32 or float64.
  std::int64_t (*panels_size)(std::int64_t size, std::int64_t features, ScalarType type);
  // Whether all slots lie in a memory. Devices whose kernels skip other slots return true.
  bool (*all_exist)(const Tensor& slots, std::int64_t capacity);
  Functions<float> single_precision;
  Functions<double> double_precision;
};

std::tuple<Tensor, Tensor> knn(const Device& device, Tensor queries, Tensor keys, std::int64_t k, std::int64_t metric,
                               OptionalTensor valid, OptionalTensor bias, OptionalTensor panels, OptionalTensor state);

void knn_write(const Device& device, Tensor keys, Tensor bias, Tensor live, Tensor panels, Tensor state,
               std::int64_t metric, OptionalTensor slots, OptionalTensor new_keys, OptionalTensor new_bias);

// Registers the ops of a device.
template <const Device& kDevice>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("knn", TORCH_BOX(&DeviceOp<&knn>::run<kDevice>));
  m.impl("knn_write", TORCH_BOX(&DeviceOp<&knn_write>::run<kDevice>));
}

}  // namespace eaml::knn
