// The CUDA kernels of the causal convolution.
#include "causal_conv1d/cuda/kernels.cuh"

namespace eaml::causal_conv1d {
EAML_DEFINE(float)
EAML_DEFINE(double)
}  // namespace eaml::causal_conv1d
