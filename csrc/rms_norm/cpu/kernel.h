// y = x / sqrt(mean(x^2) + eps) weight, for each row.
#pragma once

#include <cstdint>

namespace eaml::rms_norm {

template <class T>
struct Params {
  std::int64_t size;
  const T* x;       // (rows, size)
  const T* weight;  // (size,), null: ones
  T eps;
  T* y;  // (rows, size)
};

// Computes the rows [first, last) of y.
template <class T>
void normalise(const Params<T>& params, std::int64_t first, std::int64_t last);

}  // namespace eaml::rms_norm
