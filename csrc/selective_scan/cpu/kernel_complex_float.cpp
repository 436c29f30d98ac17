// The kernels of complex states in single precision, in their own file, so that all compile in parallel.
#define EAML_NUMBER float
#define EAML_COMPLEX
#include "selective_scan/cpu/kernel_versions.h"
