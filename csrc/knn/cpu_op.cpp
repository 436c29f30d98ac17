// The CPU kernel of eaml_ext::knn: tensors in, tensors out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "knn/cpu_kernel.h"

namespace eaml::knn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The product of all sizes but the last `tail`.
std::int64_t leading(const Tensor& x, std::int64_t tail) {
  std::int64_t product = 1;
  for (std::int64_t i = 0; i + tail < x.dim(); ++i) product *= x.size(i);
  return product;
}

Half half_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? Half::kBfloat16 : type == ScalarType::Half ? Half::kFloat16 : Half::kNone;
}

// The type that half numbers are computed in.
ScalarType wide_type(ScalarType type) {
  return half_of(type) == Half::kNone ? type : ScalarType::Float;
}

Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Whether panels and state are those of `keys`.
bool packed(const Tensor& keys, const Tensor& panels, const Tensor& state) {
  const std::int64_t features = keys.size(-1), memories = leading(keys, 2);
  return panels.is_contiguous() && state.is_contiguous() && panels.scalar_type() == wide_type(keys.scalar_type()) &&
         state.scalar_type() == ScalarType::Double && state.numel() == memories * state_size(features) &&
         panels.numel() == memories * panel_count(keys.size(-2)) * kPanel *
                               panel_rows(features, panels.scalar_type() == ScalarType::Float);
}

template <class T>
void run(const Tensor& queries, const Tensor& keys, std::int64_t k, Metric metric, const std::optional<Tensor>& valid,
         const std::optional<Tensor>& bias, const std::optional<Tensor>& panels, const std::optional<Tensor>& state,
         Tensor& values, Tensor& indices) {
  const std::int64_t size = keys.size(-2), rows = leading(queries, 2);
  const std::int64_t keys_blocks = leading(keys, 2), valid_blocks = valid ? leading(*valid, 1) : 1,
                     bias_blocks = bias ? leading(*bias, 1) : 1;
  const std::int64_t memories = std::lcm(std::lcm(keys_blocks, valid_blocks), bias_blocks);
  const Problem<T> problem{
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
      .queries_each = rows / memories * queries.size(-2),
      .size = size,
      .features = keys.size(-1),
      .k = k,
      .metric = metric,
      .half = half_of(keys.scalar_type()),
  };
  const Found<T> found{static_cast<T*>(values.mutable_data_ptr()),
                       static_cast<std::int64_t*>(indices.mutable_data_ptr())};
  const Plan cut = plan(problem, torch::stable::get_num_threads());
  const std::int64_t partial = cut.key_blocks > 1 ? cut.key_blocks * values.numel() : 0;
  const Tensor block_values = partial ? torch::stable::new_empty(values, {partial}) : values;
  const Tensor block_indices = partial ? torch::stable::new_empty(indices, {partial}) : indices;
  const Found<T> blocks{static_cast<T*>(block_values.mutable_data_ptr()),
                        static_cast<std::int64_t*>(block_indices.mutable_data_ptr())};
  torch::stable::parallel_for(0, cut.units, cut.grain,
                              [&](std::int64_t begin, std::int64_t end) { search(problem, cut, begin, end, blocks); });
  if (partial) merge(problem, cut, blocks, found);
}

std::tuple<Tensor, Tensor> knn(Tensor queries, Tensor keys, std::int64_t k, std::int64_t metric,
                               std::optional<Tensor> valid, std::optional<Tensor> bias, std::optional<Tensor> panels,
                               std::optional<Tensor> state) {
  const std::int64_t rows = leading(queries, 2), size = keys.size(-2);
  const auto fits = [rows](const Tensor& x, std::int64_t tail) {
    const std::int64_t blocks = leading(x, tail);
    return rows == 0 || (blocks > 0 && rows % blocks == 0);
  };
  EAML_CHECK(queries.dim() >= 2 && keys.dim() >= 2 && keys.size(-1) == queries.size(-1) && k >= 0 &&
                 keys.scalar_type() == queries.scalar_type() && fits(keys, 2) &&
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
    run<double>(queries, keys, k, code, valid, bias, panels, state, values, indices);
  else
    run<float>(queries, keys, k, code, valid, bias, panels, state, values, indices);
  return {values.scalar_type() == type ? values : torch::stable::to(values, type), indices};
}

template <class T>
void write_all(Tensor& keys, Tensor& bias, Tensor& live, Tensor& panels, Tensor& state,
               const std::optional<Tensor>& slots, const std::optional<Tensor>& new_keys,
               const std::optional<Tensor>& new_bias, Metric metric) {
  const std::int64_t memories = leading(keys, 2), capacity = keys.size(-2), features = keys.size(-1);
  const Half half = half_of(keys.scalar_type());
  const std::int64_t element = half == Half::kNone ? sizeof(T) : 2, count = slots ? slots->size(-1) : 0;
  const auto at = [](const auto& x, std::int64_t bytes) {
    return x ? static_cast<const std::byte*>(x->const_data_ptr()) + bytes : nullptr;
  };
  const auto here = [](Tensor& x, std::int64_t bytes) { return static_cast<std::byte*>(x.mutable_data_ptr()) + bytes; };
  torch::stable::parallel_for(0, memories, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
      const std::int64_t panel_bytes = panel_count(capacity) * panel_size<T>(features) * std::int64_t(sizeof(T));
      const Store<T> store{
          .keys = here(keys, m * capacity * features * element),
          .bias = here(bias, m * capacity * element),
          .live = reinterpret_cast<bool*>(here(live, m * capacity)),
          .panels = reinterpret_cast<T*>(here(panels, m * panel_bytes)),
          .state = reinterpret_cast<double*>(here(state, m * state_size(features) * 8)),
          .capacity = capacity,
          .features = features,
          .metric = metric,
          .half = half,
      };
      if (slots)
        write(store, reinterpret_cast<const std::int64_t*>(at(slots, m * count * 8)), count,
              at(new_keys, m * count * features * element), at(new_bias, m * count * element));
      else
        repack(store);
    }
  });
}

void knn_write(Tensor keys, Tensor bias, Tensor live, Tensor panels, Tensor state, std::int64_t metric,
               std::optional<Tensor> slots, std::optional<Tensor> new_keys, std::optional<Tensor> new_bias) {
  const std::int64_t memories = leading(keys, 2), capacity = keys.size(-2), features = keys.size(-1);
  const ScalarType type = keys.scalar_type();
  const std::int64_t written = slots ? slots->numel() : 0;
  const auto is = [](const Tensor& x, ScalarType wanted, std::int64_t count) {
    return x.scalar_type() == wanted && x.numel() == count;
  };
  bool fits = keys.is_contiguous() && bias.is_contiguous() && live.is_contiguous() && packed(keys, panels, state) &&
              is(bias, type, memories * capacity) && is(live, ScalarType::Bool, memories * capacity) &&
              (!slots || (slots->scalar_type() == ScalarType::Long && leading(*slots, 1) == memories)) &&
              (!new_keys || (slots && is(*new_keys, type, written * features))) &&
              (!new_bias || (new_keys && is(*new_bias, type, written)));
  if (slots) slots = dense(*slots);
  if (fits && slots) {
    const auto* slot = static_cast<const std::int64_t*>(slots->const_data_ptr());
    for (std::int64_t i = 0; i < written; ++i) fits &= slot[i] >= 0 && slot[i] < capacity;
  }
  EAML_CHECK(fits, "knn_write: arguments do not fit each other; call eaml_ext.ops.PackedKeys, which says which");
  if (new_keys) new_keys = dense(*new_keys);
  if (new_bias) new_bias = dense(*new_bias);
  const auto code = static_cast<Metric>(metric);
  if (type == ScalarType::Double)
    write_all<double>(keys, bias, live, panels, state, slots, new_keys, new_bias, code);
  else
    write_all<float>(keys, bias, live, panels, state, slots, new_keys, new_bias, code);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("knn_write", TORCH_BOX(&knn_write));
}

}  // namespace eaml::knn
