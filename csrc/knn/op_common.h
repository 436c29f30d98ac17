// The ops of knn that every device shares: checks, views of tensors, and the ops, which call functions that the
// including file defines. Python checks the arguments in full; the checks here keep memory safe.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "knn/params.h"

namespace eaml::knn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// A change of PackedKeys: keys and bias for `count` slots of each memory or, with `rebuild`, only new panels and state.
struct Update {
  bool rebuild;
  const std::int64_t* slots;
  std::int64_t count;
  const void *keys, *bias;
};

// Functions that each device defines.
bool on_device(const Tensor& t);
std::int64_t panels_size(std::int64_t size, std::int64_t features, ScalarType wide);
bool all_exist(const Tensor& slots, std::int64_t capacity);
template <class T>
void run(const KnnParams<T>& problem, Tensor& values, Tensor& indices);
// `first` is the first of `memories` stores, one behind the other.
template <class T>
void change(const PackedKeysView<T>& first, std::int64_t memories, const Update& change, const Tensor& keys);

// The product of all sizes but the last `tail`.
std::int64_t leading(const Tensor& x, std::int64_t tail) {
  std::int64_t product = 1;
  for (std::int64_t i = 0; i + tail < x.dim(); ++i) product *= x.size(i);
  return product;
}

Half half_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? Half::kBfloat16 : type == ScalarType::Half ? Half::kFloat16 : Half::kNone;
}

// The type that reduced precision is computed in.
ScalarType wide_type(ScalarType type) {
  return half_of(type) == Half::kNone ? type : ScalarType::Float;
}

Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Whether panels and state are those of `keys`.
bool packed(const Tensor& keys, const Tensor& panels, const Tensor& state) {
  const std::int64_t features = keys.size(-1), memories = leading(keys, 2);
  const ScalarType wide = wide_type(keys.scalar_type());
  return on_device(panels) && on_device(state) && panels.is_contiguous() && state.is_contiguous() &&
         panels.scalar_type() == wide && state.scalar_type() == ScalarType::Double &&
         state.numel() == memories * state_size(features) &&
         panels.numel() == memories * panels_size(keys.size(-2), features, wide);
}

template <class T>
KnnParams<T> problem(const Tensor& queries, const Tensor& keys, std::int64_t k, Metric metric, const Maybe& valid,
                     const Maybe& bias, const Maybe& panels, const Maybe& state) {
  const std::int64_t keys_blocks = leading(keys, 2), valid_blocks = valid ? leading(*valid, 1) : 1,
                     bias_blocks = bias ? leading(*bias, 1) : 1;
  const std::int64_t memories = std::lcm(std::lcm(keys_blocks, valid_blocks), bias_blocks);
  return {
      .queries = static_cast<const T*>(queries.const_data_ptr()),
      .keys = keys.const_data_ptr(),
      .valid = valid ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr,
      .bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      .panels = panels ? static_cast<const T*>(panels->const_data_ptr()) : nullptr,
      .state = panels ? static_cast<const double*>(state->const_data_ptr()) : nullptr,
      .keys_share = memories / keys_blocks,
      .valid_share = memories / valid_blocks,
      .bias_share = memories / bias_blocks,
      .memories = memories,
      .queries_each = leading(queries, 2) / memories * queries.size(-2),
      .size = keys.size(-2),
      .features = keys.size(-1),
      .k = k,
      .metric = metric,
      .half = half_of(keys.scalar_type()),
  };
}

std::tuple<Tensor, Tensor> knn(Tensor queries, Tensor keys, std::int64_t k, std::int64_t metric, Maybe valid,
                               Maybe bias, Maybe panels, Maybe state) {
  const std::int64_t rows = leading(queries, 2), size = keys.size(-2);
  const auto fits = [rows](const Tensor& x, std::int64_t tail) {
    const std::int64_t blocks = leading(x, tail);
    return on_device(x) && (rows == 0 || (blocks > 0 && rows % blocks == 0));
  };
  EAML_CHECK(queries.dim() >= 2 && keys.dim() >= 2 && keys.size(-1) == queries.size(-1) && k >= 0 &&
                 on_device(queries) && keys.scalar_type() == queries.scalar_type() && fits(keys, 2) &&
                 (!valid || (valid->size(-1) == size && fits(*valid, 1) && valid->scalar_type() == ScalarType::Bool)) &&
                 (!bias || (bias->size(-1) == size && fits(*bias, 1) && bias->scalar_type() == keys.scalar_type())) &&
                 (!panels || (state && packed(keys, *panels, *state))),
             "knn: arguments do not fit each other; call eaml_ext.ops.knn, which says which");

  std::vector<std::int64_t> shape(queries.sizes().begin(), queries.sizes().end());
  shape.back() = k;
  const ScalarType type = queries.scalar_type();
  Tensor indices = torch::stable::new_empty(queries, shape, ScalarType::Long);
  if (indices.numel() == 0) return {torch::stable::new_empty(queries, shape), indices};

  const auto wide = [](const Tensor& x) {
    const ScalarType to = wide_type(x.scalar_type());
    return dense(to == x.scalar_type() ? x : torch::stable::to(x, to));
  };
  queries = wide(queries), keys = dense(keys);
  if (valid) valid = dense(*valid);
  if (bias) bias = wide(*bias);
  Tensor values = torch::stable::new_empty(queries, shape);
  const auto code = static_cast<Metric>(metric);
  if (type == ScalarType::Double)
    run(problem<double>(queries, keys, k, code, valid, bias, panels, state), values, indices);
  else
    run(problem<float>(queries, keys, k, code, valid, bias, panels, state), values, indices);
  return {values.scalar_type() == type ? values : torch::stable::to(values, type), indices};
}

void knn_write(Tensor keys, Tensor bias, Tensor live, Tensor panels, Tensor state, std::int64_t metric, Maybe slots,
               Maybe new_keys, Maybe new_bias) {
  const std::int64_t memories = leading(keys, 2), capacity = keys.size(-2), features = keys.size(-1);
  const ScalarType type = keys.scalar_type();
  const std::int64_t written = slots ? slots->numel() : 0;
  const auto is = [](const Tensor& x, ScalarType wanted, std::int64_t count) {
    return on_device(x) && x.scalar_type() == wanted && x.numel() == count;
  };
  bool fits = on_device(keys) && keys.is_contiguous() && bias.is_contiguous() && live.is_contiguous() &&
              packed(keys, panels, state) && is(bias, type, memories * capacity) &&
              is(live, ScalarType::Bool, memories * capacity) &&
              (!slots || (is(*slots, ScalarType::Long, written) && leading(*slots, 1) == memories)) &&
              (!new_keys || (slots && is(*new_keys, type, written * features))) &&
              (!new_bias || (new_keys && is(*new_bias, type, written)));
  if (slots) slots = dense(*slots);
  fits = fits && (!slots || all_exist(*slots, capacity));
  EAML_CHECK(fits, "knn_write: arguments do not fit each other; call eaml_ext.ops.PackedKeys, which says which");
  if (new_keys) new_keys = dense(*new_keys);
  if (new_bias) new_bias = dense(*new_bias);
  const auto given = [](const Maybe& x) { return x ? x->const_data_ptr() : nullptr; };
  const Update what{!slots, static_cast<const std::int64_t*>(given(slots)), slots ? slots->size(-1) : 0,
                    given(new_keys), given(new_bias)};
  const auto with = [&]<class T>(T*) {
    const PackedKeysView<T> first{
        .keys = keys.mutable_data_ptr(),
        .bias = bias.mutable_data_ptr(),
        .live = static_cast<bool*>(live.mutable_data_ptr()),
        .panels = static_cast<T*>(panels.mutable_data_ptr()),
        .state = static_cast<double*>(state.mutable_data_ptr()),
        .capacity = capacity,
        .features = features,
        .metric = static_cast<Metric>(metric),
        .half = half_of(type),
    };
    change<T>(first, memories, what, keys);
  };
  if (type == ScalarType::Double)
    with(static_cast<double*>(nullptr));
  else
    with(static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace eaml::knn
