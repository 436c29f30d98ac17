// The CPU kernel of eaml_ext::knn: tensors in, tensors out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

template <class T>
void run(const Tensor& queries, const Tensor& keys, std::int64_t k, Metric metric, const std::optional<Tensor>& valid,
         const std::optional<Tensor>& bias, Tensor& values, Tensor& indices) {
  const std::int64_t size = keys.size(-2), rows = leading(queries, 2);
  const std::int64_t keys_blocks = leading(keys, 2), valid_blocks = valid ? leading(*valid, 1) : 1,
                     bias_blocks = bias ? leading(*bias, 1) : 1;
  const std::int64_t memories = std::lcm(std::lcm(keys_blocks, valid_blocks), bias_blocks);
  const Problem<T> problem{
      .queries = static_cast<const T*>(queries.const_data_ptr()),
      .keys = static_cast<const T*>(keys.const_data_ptr()),
      .valid = valid ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr,
      .bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      .keys_share = memories / keys_blocks,
      .valid_share = memories / valid_blocks,
      .bias_share = memories / bias_blocks,
      .memories = memories,
      .queries_each = rows / memories * queries.size(-2),
      .size = size,
      .features = keys.size(-1),
      .k = k,
      .metric = metric,
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
                               std::optional<Tensor> valid, std::optional<Tensor> bias) {
  const std::int64_t rows = leading(queries, 2), size = keys.size(-2);
  const auto fits = [rows](const Tensor& x, std::int64_t tail) {
    const std::int64_t blocks = leading(x, tail);
    return rows == 0 || (blocks > 0 && rows % blocks == 0);
  };
  EAML_CHECK(queries.dim() >= 2 && keys.dim() >= 2 && keys.size(-1) == queries.size(-1) && k >= 0 &&
                 keys.scalar_type() == queries.scalar_type() && fits(keys, 2) &&
                 (!valid || (valid->size(-1) == size && fits(*valid, 1) && valid->scalar_type() == ScalarType::Bool)) &&
                 (!bias || (bias->size(-1) == size && fits(*bias, 1) && bias->scalar_type() == keys.scalar_type())),
             "knn: arguments do not fit each other; call eaml_ext.ops.knn, which says which");

  std::vector<std::int64_t> shape(queries.sizes().begin(), queries.sizes().end());
  shape.back() = k;
  const ScalarType type = queries.scalar_type();
  Tensor indices = torch::stable::new_empty(queries, shape, ScalarType::Long);
  if (indices.numel() == 0) return {torch::stable::new_empty(queries, shape), indices};

  const auto dense = [](const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); };
  const auto wide = [&](const Tensor& x) {  // half types are searched as float
    return dense(type == ScalarType::Half || type == ScalarType::BFloat16 ? torch::stable::to(x, ScalarType::Float)
                                                                          : x);
  };
  queries = wide(queries), keys = wide(keys);
  if (valid) valid = dense(*valid);
  if (bias) bias = wide(*bias);
  Tensor values = torch::stable::new_empty(queries, shape);
  const auto code = static_cast<Metric>(metric);
  if (type == ScalarType::Double)
    run<double>(queries, keys, k, code, valid, bias, values, indices);
  else
    run<float>(queries, keys, k, code, valid, bias, values, indices);
  return {values.scalar_type() == type ? values : torch::stable::to(values, type), indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("knn", TORCH_BOX(&knn));
}

}  // namespace eaml::knn
