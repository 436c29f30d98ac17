// Tensors of torch's stable ABI, and the dtypes of their data in kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/fp16.h"

namespace eaml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// An uninitialised contiguous tensor on the device of `like`, of its dtype or of `dtype`. torch::stable::new_empty
// takes a microsecond longer, because it calls torch's dispatcher.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = {}) {
#if defined(EAML_CUDA_EMULATOR)  // torch's own fills the tensor with NaN, so that tests find what a kernel leaves out
  return torch::stable::new_empty(like, sizes, dtype);
#else
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t i = sizes.size(); i-- > 0; step *= std::max<std::int64_t>(sizes[i], 1)) strides[i] = step;
  std::int32_t number, device;
  if (dtype)
    number = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(*dtype));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &number));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), number, device, like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
#endif
}

inline Tensor to_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Half half_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Half::kBfloat16 : dtype == ScalarType::Half ? Half::kFloat16 : Half::kNone;
}

// Whether kernels have numbers of `dtype`.
inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || half_of(dtype) != Half::kNone;
}

// The dtype of arithmetic on numbers of `dtype`: float32 for reduced precision.
inline ScalarType opmath_type(ScalarType dtype) {
  return half_of(dtype) == Half::kNone ? dtype : ScalarType::Float;
}

// Binds the first argument of an op of op_common.cpp, the table of the functions of a device.
template <auto kOp>
struct DeviceOp;
template <class R, class Device, class... Args, R (*kOp)(const Device&, Args...)>
struct DeviceOp<kOp> {
  template <const Device& kDevice>
  static R run(Args... args) {
    return kOp(kDevice, std::move(args)...);
  }
};

}  // namespace eaml
