// The kernels in single precision; double precision is a file of its own, so that the two compile side by side.
#include "selective_scan/cuda_kernel.cuh"

namespace eaml::selective_scan {
EAML_DEFINE(float)
}  // namespace eaml::selective_scan
