// The op eaml_ext::_build_info: a JSON object that describes this library. It has no reference, so its schema is here.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/simd.h"

#define EAML_STRING_(x) #x
#define EAML_STRING(x) EAML_STRING_(x)

namespace eaml {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#if defined(EAML_CUDA_VERSION)
constexpr const char* kCuda = "\"" EAML_STRING(EAML_CUDA_VERSION) " for " EAML_STRING(EAML_CUDA_ARCHS) "\"";
#else
constexpr const char* kCuda = "null";
#endif

std::string build_info() {
  constexpr unsigned long long kTarget = TORCH_TARGET_VERSION;
  const std::string target = std::to_string(kTarget >> 56) + "." + std::to_string((kTarget >> 48) & 0xff);
  return std::string("{\"compiler\": \"") + kCompiler + "\", \"simd\": \"" + simd_name() + "\", \"cuda\": " + kCuda +
         ", \"torch_target\": \"" + target + "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(eaml_ext, m) {
  m.def("_build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CompositeExplicitAutograd, m) {
  m.impl("_build_info", TORCH_BOX(&build_info));
}

}  // namespace eaml
