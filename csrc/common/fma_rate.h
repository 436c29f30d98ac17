// What benchmarks measure the nearest neighbours against: one thread's multiply-adds in registers, and its reading.
#pragma once

#include <cstdint>

namespace eaml {

// float32 multiply-adds a second.
double fma_rate();

// Bytes a second of reading an array of `bytes` over and over.
double read_rate(std::int64_t bytes);

}  // namespace eaml
