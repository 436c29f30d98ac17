// Launchers of the CUDA kernels, free of torch's headers. They return nullptr or an error message.
#pragma once

#include "causal_conv1d/params.h"

namespace eaml::causal_conv1d {

// Where steps are adjacent in memory, the threads of a warp share a channel; else each thread has its own. The choice
// and the segments depend on length and strides of x alone, so that sums do not depend on the batch or the device.
template <class T>
bool shares_channel(const ConvParams<T>& p) {
  constexpr int64_t kMinLength = 64;  // shorter rows would leave most threads of a warp without steps
  return p.x.inner == 1 && p.x.channel != 1 && p.runs.length >= kMinLength;
}
// Steps of a segment of time, by the number of threads that share a channel.
template <int kLanes>
constexpr int64_t kSegment = kLanes == 1 ? 128 : 1024;

// Sums over rows and segments of each task: gradients of weight (tasks, dim, width) and of bias (tasks, dim) or null.
template <class T>
struct SumParams {
  const T* partial;  // (tasks, middle, width + 1, dim)
  T *grad_weight, *grad_bias;
  int64_t tasks, middle, dim;
  int width;
};

#define EAML_DECLARE(T)                                       \
  const char* forward(const ConvParams<T>& p, void* stream);  \
  const char* backward(const ConvParams<T>& p, void* stream); \
  const char* sum(const SumParams<T>& p, void* stream);
EAML_DECLARE(float)
EAML_DECLARE(double)
#undef EAML_DECLARE

}  // namespace eaml::causal_conv1d
