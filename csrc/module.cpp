// The pybind11 module eaml_ext._C: a thin binding that calls ops of the library of kernels through torch's dispatcher.
// Nothing in the package needs it, and wheels for every Python leave it out.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace {

template <class Result, class... Args>
Result call(const char* op, Args... args) {
  std::array<StableIValue, std::max<std::size_t>(1, sizeof...(Args))> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

std::string build_info() {
  return call<std::string>("eaml_ext::_build_info");
}

std::int64_t knn_panel_rows(std::int64_t features, bool is_float) {
  return call<std::int64_t>("eaml_ext::_knn_panel_rows", features, is_float);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const pybind11::object error = pybind11::module_::import("eaml_ext.ops._library").attr("load_error");
  if (!error.is_none())
    throw pybind11::import_error("eaml_ext._C needs the kernels: " + std::string(pybind11::str(error)));
  m.doc() = "Functions of the library of kernels, which loads with this module and registers the ops.";
  m.def("build_info", &build_info, "JSON: compiler, SIMD level in use, CUDA version, torch ABI target.");
  m.def("knn_panel_rows", &knn_panel_rows, "Rows of 32 numbers in a panel of keys; is_float: they are float32.");
}
