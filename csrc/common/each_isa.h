// Includes EAML_BODY once per instruction set, with EAML_ISA, a name for the namespace of that set's functions, and
// EAML_VECTOR_BYTES, the width of its vectors. All functions that EAML_BODY defines are compiled for the set, templates
// and lambdas too. EAML_BODY includes no header: a header's inline functions would be compiled for the set as well, and
// the linker could keep that copy for all machines.
#include "common/simd.h"

#if EAML_HAS_VERSIONS

#define EAML_ISA baseline
#define EAML_VECTOR_BYTES 16
#include EAML_BODY
#undef EAML_ISA
#undef EAML_VECTOR_BYTES

#define EAML_ISA avx2
#define EAML_VECTOR_BYTES 32
EAML_TARGET_BEGIN(EAML_AVX2)
#include EAML_BODY
EAML_TARGET_END
#undef EAML_ISA
#undef EAML_VECTOR_BYTES

#define EAML_ISA avx512
#define EAML_VECTOR_BYTES 64
EAML_TARGET_BEGIN(EAML_AVX512)
#include EAML_BODY
EAML_TARGET_END
#undef EAML_ISA
#undef EAML_VECTOR_BYTES

#else

#define EAML_ISA native
#if defined(__AVX512DQ__)
#define EAML_VECTOR_BYTES 64
#elif defined(__AVX__)
#define EAML_VECTOR_BYTES 32
#else
#define EAML_VECTOR_BYTES 16
#endif
#include EAML_BODY
#undef EAML_ISA
#undef EAML_VECTOR_BYTES

#endif
#undef EAML_BODY
