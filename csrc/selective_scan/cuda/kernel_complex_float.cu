// The kernels of complex states in single precision.
#include "selective_scan/cuda/launch.cuh"

namespace eaml::selective_scan::complex_states {
EAML_DEFINE(float, Complex)
}
