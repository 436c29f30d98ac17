// Makes the device of a tensor current and returns torch's current stream on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(EAML_CUDA_EMULATOR)
#define EAML_CUDA_KEY CPU
#else
#define EAML_CUDA_KEY CUDA
// torch declares this C function in CUDA builds alone. The symbol is weak, so that a CPU build of torch can load this
// library.
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
#endif

namespace eaml::cuda {

inline bool on_device(const torch::stable::Tensor& t) {
#if defined(EAML_CUDA_EMULATOR)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

class DeviceStreamGuard {
 public:
#if defined(EAML_CUDA_EMULATOR)
  explicit DeviceStreamGuard(const torch::stable::Tensor&) {}
#else
  explicit DeviceStreamGuard(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("eaml_ext: this torch has no CUDA");
    if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) != 0)
      throw std::runtime_error("eaml_ext: torch has no current CUDA stream on this device");
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(EAML_CUDA_EMULATOR)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Raises the error that a launcher returned.
inline void check_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("eaml_ext: a CUDA kernel did not start: ") + error);
}

}  // namespace eaml::cuda
