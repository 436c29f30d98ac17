// Device code of the scan that tests reach by itself.
#include <algorithm>

#include "common/exp2.h"

// 2^t of n numbers, a multiple of four, by the polynomial for two of four.
extern "C" __attribute__((visibility("default"))) void eaml_exp2(const float* t, float* out, int n) {
  for (int i = 0; i < n; i += 4) {
    float in[4], values[4];
    std::copy_n(t + i, 4, in);
    eaml::exp2_<2>(in, values);
    std::copy_n(values, 4, out + i);
  }
}
