// The kernels in double precision; a file of their own, so that the two compile side by side.
#define EAML_NUMBER double
#include "selective_scan/cpu/kernel_versions.h"
