// The fast backward kernels, on numbers and duals.
#include "selective_scan/cuda/backward_fast.cuh"

namespace eaml::selective_scan {

FastKernel<BackwardParams<float>> fast_kernel(const BackwardParams<float>& p, bool dual) {
  using Fast = FastKernel<BackwardParams<float>>;
  const Half half = p.arrays.values.u.half;
  const bool along_time = p.arrays.values.u.inner == 1;
  if (!has_vectors(p.params, p.out.u, half, along_time) || !has_vectors(p.params, p.out.delta, half, along_time) ||
      (p.params.gated && !has_vectors(p.params, p.out.z, half, along_time)))
    return {};
  return with_fast_tiling<BackwardParams<float>>(p.params.dstate, dual, [&](auto tiling) -> Fast {
    using L = decltype(tiling);
    if (!has_fast_inputs<L>(p.params, p.arrays, true)) return {};
    return with_fast_layout(half, along_time, [&](auto type, auto time) {
      constexpr Half kHalf = decltype(type)::value;
      constexpr bool kAlongTime = decltype(time)::value;
      return Fast{p.params.gated ? fast_backward_kernel<L, kHalf, kAlongTime, true>
                                 : fast_backward_kernel<L, kHalf, kAlongTime, false>,
                  FastBackward<L>::kBytes};
    });
  });
}

}  // namespace eaml::selective_scan
