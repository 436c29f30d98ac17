// mamba_step on the CPU: the kernels of the convolution, of the linear layer and of the scan, one after another on
// scratch arrays in full precision. Each intermediate result has the bits that the op of its kernel gives.
#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "causal_conv1d/cpu/kernel.h"
#include "common/arena.h"
#include "common/check.h"
#include "common/half_arrays.h"
#include "common/tensor.h"
#include "row_invariant_linear/cpu/kernel.h"
#include "selective_scan/cpu/kernel.h"

namespace eaml::mamba_step {
namespace {

using std::int64_t;
using Results = std::tuple<Tensor, Tensor, Tensor>;

// The arguments in the order of the schema. T: the dtype of arithmetic; xz, conv_state, x_proj and dt_proj may be in
// reduced precision.
struct Arguments {
  Tensor xz, conv_state, ssm_state, conv_weight;
  OptionalTensor conv_bias;
  Tensor x_proj, dt_proj;
  OptionalTensor dt_bias;
  Tensor A, D;
};

struct Sizes {
  int64_t batch, dim, width, dstate, rank;
};

void check(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const auto have = t.sizes();
  EAML_CHECK(t.is_cpu() && t.scalar_type() == dtype, "mamba_step: ", name, " must be on the CPU, of the dtype of xz");
  EAML_CHECK(std::equal(have.begin(), have.end(), sizes.begin(), sizes.end()), "mamba_step: ", name,
             " has a wrong shape");
}

Sizes check(const Arguments& a) {
  const ScalarType dtype = a.xz.scalar_type(), full = opmath_type(dtype);
  EAML_CHECK(is_kernel_dtype(dtype), "mamba_step: xz must be floating-point");
  EAML_CHECK(a.xz.dim() == 2 && a.conv_state.dim() == 3 && a.ssm_state.dim() == 3 && a.dt_proj.dim() == 2,
             "mamba_step: xz, conv_state, ssm_state and dt_proj must have 2, 3, 3 and 2 dimensions");
  const Sizes s{a.xz.size(0), a.conv_state.size(1), a.conv_state.size(2), a.ssm_state.size(2), a.dt_proj.size(1)};
  EAML_CHECK(s.width >= 1 && s.width <= causal_conv1d::kMaxWidth, "mamba_step: conv_weight has width ", s.width,
             ", the kernels take 1 to ", causal_conv1d::kMaxWidth);
  check("xz", a.xz, dtype, {s.batch, 2 * s.dim});
  check("conv_state", a.conv_state, dtype, {s.batch, s.dim, s.width});
  check("ssm_state", a.ssm_state, full, {s.batch, s.dim, s.dstate});
  check("conv_weight", a.conv_weight, full, {s.dim, s.width});
  if (a.conv_bias) check("conv_bias", *a.conv_bias, full, {s.dim});
  check("x_proj", a.x_proj, dtype, {s.rank + 2 * s.dstate, s.dim});
  check("dt_proj", a.dt_proj, dtype, {s.dim, s.rank});
  if (a.dt_bias) check("dt_bias", *a.dt_bias, full, {s.dim});
  check("A", a.A, full, {s.dim, s.dstate});
  check("D", a.D, full, {s.dim});
  return s;
}

// next[row][channel]: the state without its oldest input, then the new input.
template <class Stored>
void push_inputs(const Sizes& s, const Tensor& xz, const Tensor& state, const Tensor& next) {
  Stored* to = mutable_data<Stored>(next);
  for (int64_t row = 0; row < s.batch; ++row)
    for (int64_t c = 0; c < s.dim; ++c, to += s.width) {
      const Stored* const from = data<Stored>(state) + row * state.stride(0) + c * state.stride(1);
      for (int64_t k = 1; k < s.width; ++k) to[k - 1] = from[k * state.stride(2)];
      to[s.width - 1] = data<Stored>(xz)[row * xz.stride(0) + c * xz.stride(1)];
    }
}

// y (batch, dim) = silu(conv), from the state before the step.
template <class T>
void convolve(const Sizes& s, const Arguments& a, T* y) {
  causal_conv1d::ConvParams<T> p;
  const Half half = half_of(a.xz.scalar_type());
  const int64_t bytes = half == Half::kNone ? sizeof(T) : 2;
  const auto* const newer = static_cast<const char*>(a.conv_state.const_data_ptr()) + a.conv_state.stride(2) * bytes;
  p.batch = p.rows_per_task = s.batch, p.dim = s.dim, p.width = static_cast<int>(s.width), p.silu = true;
  p.runs.length = 1;
  p.x = {data<T>(a.xz), a.xz.stride(0), a.xz.stride(1), 1, half};
  p.weight = data<T>(a.conv_weight), p.bias = a.conv_bias ? data<T>(*a.conv_bias) : nullptr;
  p.states = {reinterpret_cast<const T*>(newer), a.conv_state.stride(0), a.conv_state.stride(1), a.conv_state.stride(2),
              half};
  p.y = {y, s.dim, 1, 1};
  causal_conv1d::forward(p, 0, causal_conv1d::units(p));
}

template <class T>
const T* project(Arena& arena, const Tensor& weight, int64_t rows, const T* x) {
  row_invariant_linear::Params<T> p{.rows = rows, .inputs = weight.size(1), .outputs = weight.size(0)};
  p.x = x, p.weight = data<T>(weight), p.half = half_of(weight.scalar_type()), p.bias = nullptr;
  p.y = arena.take<T>(rows * p.outputs);
  row_invariant_linear::linear(arena, p);
  return p.y;
}

template <class T>
Results run(const Arguments& a, const Sizes& s) {
  static thread_local Arena arena;
  arena.reset();
  const Half half = half_of(a.xz.scalar_type());
  const bool reduced = half != Half::kNone;
  const Tensor y = torch::stable::new_empty(a.xz, {s.batch, s.dim}),
               conv_state = torch::stable::new_empty(a.xz, {s.batch, s.dim, s.width}),
               ssm_state = torch::stable::new_empty(a.ssm_state, {s.batch, s.dim, s.dstate});
  const Results results{y, conv_state, ssm_state};
  if (s.batch * s.dim == 0) return results;
  reduced ? push_inputs<std::uint16_t>(s, a.xz, a.conv_state, conv_state)
          : push_inputs<T>(s, a.xz, a.conv_state, conv_state);

  T* const x = arena.take<T>(s.batch * s.dim);
  convolve(s, a, x);
  const int64_t columns = s.rank + 2 * s.dstate;
  const T* const projected = project(arena, a.x_proj, s.batch, x);  // (batch, columns): dt, B, C
  T* const dt = arena.take<T>(s.batch * s.rank);
  for (int64_t row = 0; row < s.batch; ++row) std::copy_n(projected + row * columns, s.rank, dt + row * s.rank);
  const T* const delta = project(arena, a.dt_proj, s.batch, dt);

  selective_scan::ScanParams p{.batch = s.batch, .dim = s.dim, .length = 1, .dstate = s.dstate, .groups = 1};
  p.B_invariant = p.C_invariant = p.split_invariant = false, p.softplus = p.gated = true;
  p.reset = nullptr, p.reset_outer = p.reset_inner = 0;
  p.unit_channels = selective_scan::sum_channels<T>(p), p.all_length = 1;
  selective_scan::Inputs<T> in;
  in.u = {x, s.dim, 1}, in.delta = {delta, s.dim, 1};
  in.z = {data<T>(a.xz) + s.dim * a.xz.stride(1), a.xz.stride(0), a.xz.stride(1)};
  in.A = {data<T>(a.A), 0, a.A.stride(0), a.A.stride(1)}, in.D = {data<T>(a.D), 0, a.D.stride(0)};
  if (a.dt_bias) in.delta_bias = {data<T>(*a.dt_bias), 0, a.dt_bias->stride(0)};
  in.B = {projected + s.rank, columns, 1}, in.C = {projected + s.rank + s.dstate, columns, 1};
  in.initial_state = {data<T>(a.ssm_state), a.ssm_state.stride(0), a.ssm_state.stride(1), a.ssm_state.stride(2)};
  selective_scan::Outputs<T> out;
  out.y = {mutable_data<T>(y), s.dim, 1}, out.last_state = {mutable_data<T>(ssm_state), s.dim * s.dstate, s.dstate, 1};
  if constexpr (sizeof(T) == 4)
    if (reduced) {
      float *const xz = arena.take<float>(2 * s.batch * s.dim), *const full_y = arena.take<float>(s.batch * s.dim);
      widen_array(xz, a.xz.const_data_ptr(), half, 2 * s.batch * s.dim);
      in.z = {xz + s.dim, 2 * s.dim, 1}, out.y.data = full_y;
    }
  constexpr int64_t kMinThreadWork = int64_t{1} << 16;  // updates of a state
  const int64_t units = s.batch * selective_scan::units(p), work = s.batch * s.dim * s.dstate / units;
  torch::stable::parallel_for(0, units, 1 + kMinThreadWork / (1 + work), [&](int64_t begin, int64_t end) {
    selective_scan::real_states::forward(p, in, nullptr, out, begin, end);
  });
  if constexpr (sizeof(T) == 4)
    if (reduced) narrow_array(y.mutable_data_ptr(), out.y.data, half, s.batch * s.dim);
  return results;
}

Results mamba_step(Tensor xz, Tensor conv_state, Tensor ssm_state, Tensor conv_weight, OptionalTensor conv_bias,
                   Tensor x_proj, Tensor dt_proj, OptionalTensor dt_bias, Tensor A, Tensor D) {
  xz = to_contiguous(xz), conv_weight = to_contiguous(conv_weight);
  x_proj = to_contiguous(x_proj), dt_proj = to_contiguous(dt_proj);
  if (conv_bias) conv_bias = to_contiguous(*conv_bias);
  const Arguments a{xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D};
  const Sizes s = check(a);
  return a.xz.scalar_type() == ScalarType::Double ? run<double>(a, s) : run<float>(a, s);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("mamba_step", TORCH_BOX(&mamba_step));
}

}  // namespace eaml::mamba_step
