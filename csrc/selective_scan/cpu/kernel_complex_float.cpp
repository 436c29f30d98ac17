// The kernels of complex states in single precision; a file of their own, so that all compile side by side.
#define EAML_NUMBER float
#define EAML_COMPLEX
#include "selective_scan/cpu/kernel_versions.h"
