// Arrays of 16-bit numbers to and from float32, in the baseline instruction set: for arrays that are small beside the
// rest of a call.
#pragma once

#include <cstdint>

#include "common/fp16.h"

namespace eaml {

inline void widen_array(float* to, const void* from, Half half, std::int64_t count) {
  const auto* const x = static_cast<const std::uint16_t*>(from);
  if (half == Half::kBfloat16)
    for (std::int64_t i = 0; i < count; ++i) to[i] = widen<Half::kBfloat16, float>(std::uint32_t{x[i]});
  else
    for (std::int64_t i = 0; i < count; ++i) to[i] = widen<Half::kFloat16, float>(std::uint32_t{x[i]});
}

inline void narrow_array(void* to, const float* from, Half half, std::int64_t count) {
  auto* const y = static_cast<std::uint16_t*>(to);
  if (half == Half::kBfloat16)
    for (std::int64_t i = 0; i < count; ++i)
      y[i] = static_cast<std::uint16_t>(narrow<Half::kBfloat16, std::uint32_t>(from[i]));
  else
    for (std::int64_t i = 0; i < count; ++i)
      y[i] = static_cast<std::uint16_t>(narrow<Half::kFloat16, std::uint32_t>(from[i]));
}

}  // namespace eaml
