// The kernels of real states in single precision. Each precision has its own file, so that they compile in parallel.
#include "selective_scan/cuda/launch.cuh"

namespace eaml::selective_scan {
namespace real_states {
EAML_DEFINE(float, Real)
}
const char* sum(const SumParams<float>& p, void* stream) {
  return launch_sum(p, stream);
}
}  // namespace eaml::selective_scan
