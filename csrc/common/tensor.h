// Tensors of torch's stable ABI, and the dtypes of their data in kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>

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
