// Interface of the fast kernels: the choice of a kernel for a call. Each kind has a file of its own, so that they
// compile in parallel.
#pragma once

#include <cstddef>

#include "selective_scan/cuda/launch.h"

namespace eaml::selective_scan {

// A kernel and its bytes of shared memory. The kernel is null if no fast kernel computes the call.
template <class P>
struct FastKernel {
  void (*kernel)(P) = nullptr;
  std::size_t shared_bytes = 0;
};

FastKernel<ForwardParams<float>> fast_kernel(const ForwardParams<float>& p, bool dual);
FastKernel<BackwardParams<float>> fast_kernel(const BackwardParams<float>& p, bool dual);

}  // namespace eaml::selective_scan
