// The kernels of complex states in double precision.
#include "selective_scan/cuda/launch.cuh"

namespace eaml::selective_scan::complex_states {
EAML_DEFINE(double, Complex)
}
