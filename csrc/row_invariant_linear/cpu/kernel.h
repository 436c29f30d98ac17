// y = x W^T + bias: every output starts as its bias and adds the products in the order of the inputs.
#pragma once

#include <cstdint>

#include "common/arena.h"
#include "common/fp16.h"

namespace eaml::row_invariant_linear {

constexpr std::int64_t kPanel = 16;   // outputs whose weights are adjacent in a packed weight
constexpr std::int64_t kRows = 6;     // rows of a register tile
constexpr std::int64_t kFewRows = 8;  // the most rows for which the weight is read in place, not packed

template <class T>
struct Params {
  std::int64_t rows, inputs, outputs;
  const T* x;       // (rows, inputs)
  const T* weight;  // (outputs, inputs)
  Half half;        // if not kNone, `weight` points to 16-bit numbers of this type
  const T* bias;    // (outputs,), null: zeros
  T* packed;        // packed_size(inputs, outputs), aligned to a full vector
  T* y;             // (rows, outputs)
};

// Numbers of a packed weight: for each panel of outputs, its biases and then its weights, (1 + inputs, kPanel).
constexpr std::int64_t packed_size(std::int64_t inputs, std::int64_t outputs) {
  return (outputs + kPanel - 1) / kPanel * kPanel * (1 + inputs);
}

// Packs weight, in full precision, and bias; outputs beyond the last one are zeros.
template <class T>
void pack(const Params<T>& params);

// Computes the rows [first, last) of y from the packed weight.
template <class T>
void multiply(const Params<T>& params, std::int64_t first, std::int64_t last);

// Computes the panels [first, last) of kPanel outputs for all rows from the weight in place, with the bits of multiply.
template <class T>
void multiply_in_place(const Params<T>& params, std::int64_t first, std::int64_t last);

// Computes y on threads, with scratch arrays of the arena; `packed` need not be set.
template <class T>
void linear(Arena& arena, Params<T> params);

}  // namespace eaml::row_invariant_linear
