// The kernels of real states in double precision.
#include "selective_scan/cuda/launch.cuh"

namespace eaml::selective_scan {
namespace real_states {
EAML_DEFINE(double, Real)
}
const char* sum(const SumParams<double>& p, void* stream) {
  return launch_sum(p, stream);
}
}  // namespace eaml::selective_scan
