// Entry points of the CPU kernels. They are compiled once per instruction set; each call chooses that of this machine.
#include "causal_conv1d/cpu/kernel.h"

#include <algorithm>
#include <type_traits>

#include "common/arena.h"
#include "common/softplus.h"

namespace eaml::causal_conv1d {

#define EAML_BODY "causal_conv1d/cpu/kernel_inl.h"
#include "common/each_isa.h"

void forward(const ConvParams<float>& p, int64_t begin, int64_t end) {
  EAML_DISPATCH(forward(p, begin, end));
}
void forward(const ConvParams<double>& p, int64_t begin, int64_t end) {
  EAML_DISPATCH(forward(p, begin, end));
}
void backward(const ConvParams<float>& p, int64_t begin, int64_t end) {
  EAML_DISPATCH(backward(p, begin, end));
}
void backward(const ConvParams<double>& p, int64_t begin, int64_t end) {
  EAML_DISPATCH(backward(p, begin, end));
}

}  // namespace eaml::causal_conv1d
