// The kernels in single precision, once per instruction set.
#include "selective_scan/cpu_kernel_inl.h"

namespace eaml::selective_scan {

template std::int64_t units<float>(const Shape&);

#define EAML_DEFINE(TARGET, BYTES)                                                                                   \
  TARGET void forward(const Shape& shape, const Inputs<float>& in, const Outputs<float>& out, std::int64_t begin,    \
                      std::int64_t end) {                                                                            \
    run_forward(shape, Source<Vec<float, BYTES / sizeof(float)>>{in, nullptr}, out, begin, end);                     \
  }                                                                                                                  \
  TARGET void forward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,               \
                           const Outputs<float>& out, std::int64_t begin, std::int64_t end) {                        \
    run_forward(shape, Source<Dual<Vec<float, BYTES / sizeof(float)>>>{in, &tangents}, out, begin, end);             \
  }                                                                                                                  \
  TARGET void backward(const Shape& shape, const Inputs<float>& in, const Gradients<float>& out, std::int64_t begin, \
                       std::int64_t end) {                                                                           \
    run_backward(shape, Source<Vec<float, BYTES / sizeof(float)>>{in, nullptr}, out, begin, end);                    \
  }                                                                                                                  \
  TARGET void backward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,              \
                            const Gradients<float>& out, std::int64_t begin, std::int64_t end) {                     \
    run_backward(shape, Source<Dual<Vec<float, BYTES / sizeof(float)>>>{in, &tangents}, out, begin, end);            \
  }
EAML_VERSIONS(EAML_DEFINE)

}  // namespace eaml::selective_scan
