// The pybind11 module eaml_ext._C. Loading it registers the ops with torch's dispatcher.
#include <pybind11/pybind11.h>

#include "common/simd.h"
#include "knn/cpu/kernel.h"

#define EAML_STRING_(x) #x
#define EAML_STRING(x) EAML_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " EAML_STRING(_MSC_VER);
#endif
  info["simd"] = eaml::simd_name();
#if defined(EAML_CUDA_VERSION)
  info["cuda"] = EAML_STRING(EAML_CUDA_VERSION) " for " EAML_STRING(EAML_CUDA_ARCHS);
#else
  info["cuda"] = pybind11::none();
#endif
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of eaml_ext; loading it registers them with torch's dispatcher.";
  m.def("build_info", &build_info, "What was compiled: compiler, SIMD level in use, CUDA version, torch ABI target.");
  m.def("knn_panel_rows", &eaml::knn::panel_rows, "Rows of 32 numbers in a panel of keys; is_float: they are float32.");
}
