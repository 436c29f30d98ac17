// Functions of the CPU kernels, free of torch's headers.
#pragma once

#include "causal_conv1d/params.h"

namespace eaml::causal_conv1d {

// A unit is one batch row, one segment of time and kUnitBytes of channels. Each segment has its own partial sums; the
// other results do not depend on the division.
constexpr int64_t kUnitBytes = 512;
constexpr int64_t kSegment = 512;  // steps

template <class T>
int64_t channel_blocks(const ConvParams<T>& p) {
  return (p.dim * static_cast<int64_t>(sizeof(T)) + kUnitBytes - 1) / kUnitBytes;
}
template <class T>
int64_t units(const ConvParams<T>& p) {
  return p.batch * p.segments * channel_blocks(p);
}

// Compute the units [begin, end).
#define EAML_DECLARE(T)                                                       \
  void forward(const ConvParams<T>& p, std::int64_t begin, std::int64_t end); \
  void backward(const ConvParams<T>& p, std::int64_t begin, std::int64_t end);
EAML_DECLARE(float)
EAML_DECLARE(double)
#undef EAML_DECLARE

}  // namespace eaml::causal_conv1d
