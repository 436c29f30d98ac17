// The kernels of complex states in double precision; a file of their own, so that all compile side by side.
#define EAML_NUMBER double
#define EAML_COMPLEX
#include "selective_scan/cpu/kernel_versions.h"
