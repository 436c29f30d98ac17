// Includes EAML_BODY once per instruction set, with EAML_ISA, a name for the namespace of that set's functions, and
// EAML_VECTOR_BYTES, the width of its vectors. EAML_BODY marks its functions:
//   EAML_SHARED  a function that several places call: compiled once per set
//   EAML_ENTRY   a function that is called from outside the set
// EAML_BODY includes no header: a header's inline functions would be compiled for the set as well, and the linker could
// keep that copy for all machines.
//
// gcc compiles all functions between EAML_TARGET_BEGIN and EAML_TARGET_END for the set, templates and lambdas too.
// clang rejects vectors as arguments between functions of different sets, and functions of headers belong to none:
// there everything is inlined into the entries, and takes three times as long to compile.
#include "common/simd.h"

#define EAML_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define EAML_SHARED EAML_INLINE
#define EAML_ENTRY_OF(SET) __attribute__((target(SET)))
#define EAML_TARGET_BEGIN(SET)
#define EAML_TARGET_END
#else
#define EAML_SHARED EAML_NOINLINE
#define EAML_ENTRY_OF(SET)
#define EAML_TARGET_BEGIN(SET) _Pragma("GCC push_options") EAML_PRAGMA(GCC target(SET))
#define EAML_TARGET_END _Pragma("GCC pop_options")
#endif

#if EAML_HAS_VERSIONS

#define EAML_ISA baseline
#define EAML_VECTOR_BYTES 16
#define EAML_ENTRY
#include EAML_BODY
#undef EAML_ISA
#undef EAML_VECTOR_BYTES
#undef EAML_ENTRY

#define EAML_ISA avx2
#define EAML_VECTOR_BYTES 32
#define EAML_ENTRY EAML_ENTRY_OF(EAML_AVX2)
EAML_TARGET_BEGIN(EAML_AVX2)
#include EAML_BODY
EAML_TARGET_END
#undef EAML_ISA
#undef EAML_VECTOR_BYTES
#undef EAML_ENTRY

#define EAML_ISA avx512
#define EAML_VECTOR_BYTES 64
#define EAML_ENTRY EAML_ENTRY_OF(EAML_AVX512)
EAML_TARGET_BEGIN(EAML_AVX512)
#include EAML_BODY
EAML_TARGET_END
#undef EAML_ISA
#undef EAML_VECTOR_BYTES
#undef EAML_ENTRY

#else

#define EAML_ISA native
#if defined(__AVX512DQ__)
#define EAML_VECTOR_BYTES 64
#elif defined(__AVX__)
#define EAML_VECTOR_BYTES 32
#else
#define EAML_VECTOR_BYTES 16
#endif
#define EAML_ENTRY
#include EAML_BODY
#undef EAML_ISA
#undef EAML_VECTOR_BYTES
#undef EAML_ENTRY

#endif
#undef EAML_BODY
