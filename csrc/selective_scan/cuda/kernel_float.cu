// The kernels in single precision; a file of their own, so that all compile side by side.
#include "selective_scan/cuda/kernel.cuh"

namespace eaml::selective_scan {
namespace real_states {
EAML_DEFINE(float, Real)
}
const char* sum(const Sum<float>& p, void* stream) {
  return launch_sum(p, stream);
}
}  // namespace eaml::selective_scan
