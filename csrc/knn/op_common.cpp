// Arguments of the knn ops: checks, views, and the choice of precision. Python checks the arguments in full; the checks
// here keep memory safe.
#include "knn/op_common.h"

#include <numeric>
#include <vector>

#include "common/check.h"

namespace eaml::knn {
namespace {

// The product of all sizes but the last `tail`.
std::int64_t leading(const Tensor& x, std::int64_t tail) {
  std::int64_t product = 1;
  for (std::int64_t i = 0; i + tail < x.dim(); ++i) product *= x.size(i);
  return product;
}

Tensor to_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A contiguous tensor of the dtype that kernels compute in.
Tensor to_opmath(const Tensor& x) {
  const ScalarType type = opmath_type(x.scalar_type());
  return to_contiguous(type == x.scalar_type() ? x : torch::stable::to(x, type));
}

const void* pointer(const OptionalTensor& x) {
  return x ? x->const_data_ptr() : nullptr;
}

// Whether panels and state have the device and the sizes for `keys`.
bool packed(const Device& device, const Tensor& keys, const Tensor& panels, const Tensor& state) {
  const std::int64_t features = keys.size(-1), memories = leading(keys, 2);
  const ScalarType type = opmath_type(keys.scalar_type());
  return device.has(panels) && device.has(state) && panels.is_contiguous() && state.is_contiguous() &&
         panels.scalar_type() == type && state.scalar_type() == ScalarType::Double &&
         state.numel() == memories * state_size(features) &&
         panels.numel() == memories * device.panels_size(keys.size(-2), features, type);
}

template <class T>
KnnParams<T> make_params(const Tensor& queries, const Tensor& keys, std::int64_t k, Metric metric,
                         const OptionalTensor& valid, const OptionalTensor& bias, const OptionalTensor& panels,
                         const OptionalTensor& state) {
  const std::int64_t keys_blocks = leading(keys, 2), valid_blocks = valid ? leading(*valid, 1) : 1,
                     bias_blocks = bias ? leading(*bias, 1) : 1;
  const std::int64_t memories = std::lcm(std::lcm(keys_blocks, valid_blocks), bias_blocks);
  return {
      .queries = data<T>(queries),
      .keys = keys.const_data_ptr(),
      .valid = static_cast<const bool*>(pointer(valid)),
      .bias = static_cast<const T*>(pointer(bias)),
      .panels = static_cast<const T*>(pointer(panels)),
      .state = panels ? data<double>(*state) : nullptr,
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

}  // namespace

std::tuple<Tensor, Tensor> knn(const Device& device, Tensor queries, Tensor keys, std::int64_t k, std::int64_t metric,
                               OptionalTensor valid, OptionalTensor bias, OptionalTensor panels, OptionalTensor state) {
  const std::int64_t rows = leading(queries, 2), size = keys.size(-2);
  const auto fits = [&](const Tensor& x, std::int64_t tail) {
    const std::int64_t blocks = leading(x, tail);
    return device.has(x) && (rows == 0 || (blocks > 0 && rows % blocks == 0));
  };
  EAML_CHECK(queries.dim() >= 2 && keys.dim() >= 2 && keys.size(-1) == queries.size(-1) && k >= 0 &&
                 device.has(queries) && keys.scalar_type() == queries.scalar_type() && fits(keys, 2) &&
                 (!valid || (valid->size(-1) == size && fits(*valid, 1) && valid->scalar_type() == ScalarType::Bool)) &&
                 (!bias || (bias->size(-1) == size && fits(*bias, 1) && bias->scalar_type() == keys.scalar_type())) &&
                 (!panels || (state && packed(device, keys, *panels, *state))),
             "knn: arguments do not fit each other; eaml_ext.ops.knn names the argument that is wrong");

  std::vector<std::int64_t> shape(queries.sizes().begin(), queries.sizes().end());
  shape.back() = k;
  const ScalarType type = queries.scalar_type();
  Tensor indices = allocate(queries, shape, ScalarType::Long);
  if (indices.numel() == 0) return {allocate(queries, shape), indices};

  queries = to_opmath(queries), keys = to_contiguous(keys);
  if (valid) valid = to_contiguous(*valid);
  if (bias) bias = to_opmath(*bias);
  Tensor values = allocate(queries, shape);
  const auto search = [&]<class T>(const Functions<T>& functions) {
    const auto code = static_cast<Metric>(metric);
    functions.search(make_params<T>(queries, keys, k, code, valid, bias, panels, state), values, indices);
  };
  type == ScalarType::Double ? search(device.double_precision) : search(device.single_precision);
  return {values.scalar_type() == type ? values : torch::stable::to(values, type), indices};
}

void knn_write(const Device& device, Tensor keys, Tensor bias, Tensor live, Tensor panels, Tensor state,
               std::int64_t metric, OptionalTensor slots, OptionalTensor new_keys, OptionalTensor new_bias) {
  const std::int64_t memories = leading(keys, 2), capacity = keys.size(-2), features = keys.size(-1);
  const ScalarType type = keys.scalar_type();
  const std::int64_t written = slots ? slots->numel() : 0;
  const auto is = [&](const Tensor& x, ScalarType wanted, std::int64_t count) {
    return device.has(x) && x.scalar_type() == wanted && x.numel() == count;
  };
  bool fits = device.has(keys) && keys.is_contiguous() && bias.is_contiguous() && live.is_contiguous() &&
              packed(device, keys, panels, state) && is(bias, type, memories * capacity) &&
              is(live, ScalarType::Bool, memories * capacity) &&
              (!slots || (is(*slots, ScalarType::Long, written) && leading(*slots, 1) == memories)) &&
              (!new_keys || (slots && is(*new_keys, type, written * features))) &&
              (!new_bias || (new_keys && is(*new_bias, type, written)));
  if (slots) slots = to_contiguous(*slots);
  fits = fits && (!slots || device.all_exist(*slots, capacity));
  EAML_CHECK(fits,
             "knn_write: arguments do not fit each other; eaml_ext.ops.PackedKeys names the argument that is wrong");
  if (new_keys) new_keys = to_contiguous(*new_keys);
  if (new_bias) new_bias = to_contiguous(*new_bias);
  const Update update{!slots, static_cast<const std::int64_t*>(pointer(slots)), slots ? slots->size(-1) : 0,
                      pointer(new_keys), pointer(new_bias)};
  const auto run = [&]<class T>(const Functions<T>& functions) {
    const PackedKeysView<T> first{
        .keys = keys.mutable_data_ptr(),
        .bias = bias.mutable_data_ptr(),
        .live = mutable_data<bool>(live),
        .panels = mutable_data<T>(panels),
        .state = mutable_data<double>(state),
        .capacity = capacity,
        .features = features,
        .metric = static_cast<Metric>(metric),
        .half = half_of(type),
    };
    functions.update(first, memories, update, keys);
  };
  type == ScalarType::Double ? run(device.double_precision) : run(device.single_precision);
}

}  // namespace eaml::knn
