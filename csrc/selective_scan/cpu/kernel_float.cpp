// The kernels in single precision; a file of their own, so that the two compile side by side.
#define EAML_NUMBER float
#include "selective_scan/cpu/kernel_versions.h"
