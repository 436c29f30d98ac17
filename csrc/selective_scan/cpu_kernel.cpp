// The kernels in single precision, once per instruction set.
#include "selective_scan/cpu_kernel_inl.h"

namespace eaml::selective_scan {

template std::int64_t units<float>(const Shape&);

EAML_CLONES void forward(const Shape& shape, const Inputs<float>& in, const Outputs<float>& out, std::int64_t begin,
                         std::int64_t end) {
  run_forward(shape, Source<float>{in, nullptr}, out, begin, end);
}
EAML_CLONES void forward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,
                              const Outputs<float>& out, std::int64_t begin, std::int64_t end) {
  run_forward(shape, Source<Dual<float>>{in, &tangents}, out, begin, end);
}
EAML_CLONES void backward(const Shape& shape, const Inputs<float>& in, const Gradients<float>& out, std::int64_t begin,
                          std::int64_t end) {
  run_backward(shape, Source<float>{in, nullptr}, out, begin, end);
}
EAML_CLONES void backward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,
                               const Gradients<float>& out, std::int64_t begin, std::int64_t end) {
  run_backward(shape, Source<Dual<float>>{in, &tangents}, out, begin, end);
}

}  // namespace eaml::selective_scan
