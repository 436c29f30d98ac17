// The fast forward kernels, on numbers and duals.
#include "selective_scan/cuda/forward_fast.cuh"

namespace eaml::selective_scan {

FastKernel<ForwardParams<float>> fast_kernel(const ForwardParams<float>& p, bool dual) {
  using Fast = FastKernel<ForwardParams<float>>;
  const Half half = p.arrays.values.u.half;
  const bool along_time = p.arrays.values.u.inner == 1;
  if (p.out.y.data == nullptr || !has_vectors(p.params, p.out.y, half, along_time)) return {};
  return with_fast_tiling<ForwardParams<float>>(p.params.dstate, dual, [&](auto tiling) -> Fast {
    using L = decltype(tiling);
    if (!has_fast_inputs<L>(p.params, p.arrays, false)) return {};
    return with_fast_layout(half, along_time, [&](auto type, auto time) {
      constexpr Half kHalf = decltype(type)::value;
      constexpr bool kAlongTime = decltype(time)::value;
      return Fast{p.params.gated ? fast_forward_kernel<L, kHalf, kAlongTime, true>
                                 : fast_forward_kernel<L, kHalf, kAlongTime, false>,
                  FastForward<L>::kBytes};
    });
  });
}

}  // namespace eaml::selective_scan
