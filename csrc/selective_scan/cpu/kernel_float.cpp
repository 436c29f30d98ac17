// The kernels of real states in single precision, in their own file, so that all compile in parallel.
#define EAML_NUMBER float
#include "selective_scan/cpu/kernel_versions.h"
