// Where an op on CUDA tensors runs: on their device, on the stream that torch has made current there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#if !defined(EAML_CUDA_ON_CPU)
#define EAML_CUDA_KEY CUDA
// Absent from a CPU build of torch, which then still loads this library.
#pragma weak aoti_torch_get_current_cuda_stream
#else
#define EAML_CUDA_KEY CPU
#endif

namespace eaml::cuda {

inline bool on_device(const torch::stable::Tensor& t) {
#if defined(EAML_CUDA_ON_CPU)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

class Place {
 public:
#if defined(EAML_CUDA_ON_CPU)
  explicit Place(const torch::stable::Tensor&) {}
#else
  explicit Place(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("eaml_ext: this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(EAML_CUDA_ON_CPU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// What a launcher returned.
inline void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("eaml_ext: a CUDA kernel did not start: ") + error);
}

}  // namespace eaml::cuda
