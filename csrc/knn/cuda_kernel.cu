// The kernels of knn, in both precisions.
#include "knn/cuda_kernel.cuh"

namespace eaml::knn {
EAML_DEFINE(float)
EAML_DEFINE(double)
}  // namespace eaml::knn
