// The kernels in double precision.
#include "selective_scan/cuda_kernel.cuh"

namespace eaml::selective_scan {
EAML_DEFINE(double)
}  // namespace eaml::selective_scan
