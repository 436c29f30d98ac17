// The kernels in double precision, once per instruction set.
#include "selective_scan/cpu_kernel_inl.h"

namespace eaml::selective_scan {

template std::int64_t units<double>(const Shape&);

EAML_CLONES void forward(const Shape& shape, const Inputs<double>& in, const Outputs<double>& out, std::int64_t begin,
                         std::int64_t end) {
  run_forward(shape, Source<double>{in, nullptr}, out, begin, end);
}
EAML_CLONES void forward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,
                              const Outputs<double>& out, std::int64_t begin, std::int64_t end) {
  run_forward(shape, Source<Dual<double>>{in, &tangents}, out, begin, end);
}
EAML_CLONES void backward(const Shape& shape, const Inputs<double>& in, const Gradients<double>& out,
                          std::int64_t begin, std::int64_t end) {
  run_backward(shape, Source<double>{in, nullptr}, out, begin, end);
}
EAML_CLONES void backward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,
                               const Gradients<double>& out, std::int64_t begin, std::int64_t end) {
  run_backward(shape, Source<Dual<double>>{in, &tangents}, out, begin, end);
}

}  // namespace eaml::selective_scan
