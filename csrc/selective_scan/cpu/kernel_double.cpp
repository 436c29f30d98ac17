// The kernels of real states in double precision, in their own file, so that all compile in parallel.
#define EAML_NUMBER double
#include "selective_scan/cpu/kernel_versions.h"
