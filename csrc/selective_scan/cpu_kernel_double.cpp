// The kernels in double precision, once per instruction set.
#include "selective_scan/cpu_kernel_inl.h"

namespace eaml::selective_scan {

template std::int64_t units<double>(const Shape&);

#define EAML_DEFINE(TARGET, BYTES)                                                                                     \
  TARGET void forward(const Shape& shape, const Inputs<double>& in, const Outputs<double>& out, std::int64_t begin,    \
                      std::int64_t end) {                                                                              \
    run_forward(shape, Source<Vec<double, BYTES / sizeof(double)>>{in, nullptr}, out, begin, end);                     \
  }                                                                                                                    \
  TARGET void forward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,               \
                           const Outputs<double>& out, std::int64_t begin, std::int64_t end) {                         \
    run_forward(shape, Source<Dual<Vec<double, BYTES / sizeof(double)>>>{in, &tangents}, out, begin, end);             \
  }                                                                                                                    \
  TARGET void backward(const Shape& shape, const Inputs<double>& in, const Gradients<double>& out, std::int64_t begin, \
                       std::int64_t end) {                                                                             \
    run_backward(shape, Source<Vec<double, BYTES / sizeof(double)>>{in, nullptr}, out, begin, end);                    \
  }                                                                                                                    \
  TARGET void backward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,              \
                            const Gradients<double>& out, std::int64_t begin, std::int64_t end) {                      \
    run_backward(shape, Source<Dual<Vec<double, BYTES / sizeof(double)>>>{in, &tangents}, out, begin, end);            \
  }
EAML_VERSIONS(EAML_DEFINE)

}  // namespace eaml::selective_scan
