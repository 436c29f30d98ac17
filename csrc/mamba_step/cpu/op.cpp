// mamba_step on the CPU: the kernels of the linear layer, of the convolution and of the scan, one after another on
// scratch arrays in full precision. Each intermediate result has the bits that the op of its kernel gives.
#include <algorithm>
#include <array>
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

// The arguments in the order of the schema. x, conv_state and the weights and biases of in_proj, x_proj, dt_proj and
// out_proj may be in reduced precision, the others are in that of arithmetic.
struct Arguments {
  Tensor x, conv_state, ssm_state, in_proj;
  OptionalTensor in_bias;
  Tensor conv_weight;
  OptionalTensor conv_bias;
  Tensor x_proj, dt_proj;
  OptionalTensor dt_bias;
  Tensor A_log, D, out_proj;
  OptionalTensor out_bias;
};

struct Sizes {
  int64_t batch, inputs, dim, width, dstate, rank, outputs;
};

void check(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  const auto have = t.sizes();
  EAML_CHECK(t.is_cpu() && t.scalar_type() == dtype, "mamba_step: ", name, " must be on the CPU, of the dtype of x");
  EAML_CHECK(std::equal(have.begin(), have.end(), sizes.begin(), sizes.end()), "mamba_step: ", name,
             " has a wrong shape");
}

Sizes check(const Arguments& a) {
  const ScalarType dtype = a.x.scalar_type(), full = opmath_type(dtype);
  EAML_CHECK(is_kernel_dtype(dtype), "mamba_step: x must be floating-point");
  EAML_CHECK(a.x.dim() == 2 && a.conv_state.dim() == 3 && a.ssm_state.dim() == 3, "mamba_step: x, conv_state and ",
             "ssm_state must have 2, 3 and 3 dimensions");
  EAML_CHECK(a.dt_proj.dim() == 2 && a.out_proj.dim() == 2, "mamba_step: dt_proj and out_proj must be matrices");
  const Sizes s{.batch = a.x.size(0),
                .inputs = a.x.size(1),
                .dim = a.conv_state.size(1),
                .width = a.conv_state.size(2),
                .dstate = a.ssm_state.size(2),
                .rank = a.dt_proj.size(1),
                .outputs = a.out_proj.size(0)};
  EAML_CHECK(s.width >= 1 && s.width <= causal_conv1d::kMaxWidth, "mamba_step: conv_weight has width ", s.width,
             ", the kernels take 1 to ", causal_conv1d::kMaxWidth);
  check("x", a.x, dtype, {s.batch, s.inputs});
  check("conv_state", a.conv_state, dtype, {s.batch, s.dim, s.width});
  check("ssm_state", a.ssm_state, full, {s.batch, s.dim, s.dstate});
  check("in_proj", a.in_proj, dtype, {2 * s.dim, s.inputs});
  if (a.in_bias) check("in_bias", *a.in_bias, dtype, {2 * s.dim});
  check("conv_weight", a.conv_weight, full, {s.dim, 1, s.width});
  if (a.conv_bias) check("conv_bias", *a.conv_bias, full, {s.dim});
  check("x_proj", a.x_proj, dtype, {s.rank + 2 * s.dstate, s.dim});
  check("dt_proj", a.dt_proj, dtype, {s.dim, s.rank});
  if (a.dt_bias) check("dt_bias", *a.dt_bias, full, {s.dim});
  check("A_log", a.A_log, full, {s.dim, s.dstate});
  check("D", a.D, full, {s.dim});
  check("out_proj", a.out_proj, dtype, {s.outputs, s.dim});
  if (a.out_bias) check("out_bias", *a.out_bias, dtype, {s.outputs});
  return s;
}

// -e^x, with the bits of -torch.exp(x), which the scan of a sequence takes. Adjacent in memory.
template <class T>
Tensor negative_exp(const Tensor& x) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::exp", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = to_contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  T* const values = mutable_data<T>(result);
  for (int64_t i = 0, count = result.numel(); i < count; ++i) values[i] = -values[i];
  return result;
}

// next[row][channel]: the state without its oldest input, then the new input, from rows of xz.
template <class Stored>
void push_inputs(const Sizes& s, const Stored* xz, const Tensor& state, const Tensor& next) {
  const int64_t row_step = state.stride(0), channel_step = state.stride(1), step = state.stride(2);
  const Stored* const before = data<Stored>(state);
  Stored* to = mutable_data<Stored>(next);
  for (int64_t row = 0; row < s.batch; ++row)
    for (int64_t c = 0; c < s.dim; ++c, to += s.width) {
      const Stored* const from = before + row * row_step + c * channel_step;
      for (int64_t k = 1; k < s.width; ++k) to[k - 1] = from[k * step];
      to[s.width - 1] = xz[row * 2 * s.dim + c];
    }
}

// y (batch, dim) = silu(conv) of rows of xz, from the state before the step.
template <class T>
void convolve(const Sizes& s, const Arguments& a, const T* xz, T* y) {
  causal_conv1d::ConvParams<T> p;
  const Half half = half_of(a.conv_state.scalar_type());
  const int64_t bytes = half == Half::kNone ? sizeof(T) : 2;
  const auto* const newer = static_cast<const char*>(a.conv_state.const_data_ptr()) + a.conv_state.stride(2) * bytes;
  p.batch = p.rows_per_task = s.batch, p.dim = s.dim, p.width = static_cast<int>(s.width), p.silu = true;
  p.runs.length = 1;
  p.x = {xz, 2 * s.dim, 1, 1};
  p.weight = data<T>(a.conv_weight), p.bias = a.conv_bias ? data<T>(*a.conv_bias) : nullptr;
  p.states = {reinterpret_cast<const T*>(newer), a.conv_state.stride(0), a.conv_state.stride(1), a.conv_state.stride(2),
              half};
  p.y = {y, s.dim, 1, 1};
  causal_conv1d::forward(p, 0, causal_conv1d::units(p));
}

// y (rows, outputs) = x weight^T + bias.
template <class T>
void project(Arena& arena, const Tensor& weight, const OptionalTensor& bias, int64_t rows, const T* x, T* y) {
  row_invariant_linear::Params<T> p{.rows = rows, .inputs = weight.size(1), .outputs = weight.size(0)};
  p.x = x, p.weight = data<T>(weight), p.half = half_of(weight.scalar_type());
  p.bias = bias ? data<T>(*bias) : nullptr, p.y = y;
  if constexpr (sizeof(T) == 4)
    if (bias && p.half != Half::kNone) {
      float* const widened = arena.take<float>(p.outputs);
      widen_array(widened, bias->const_data_ptr(), p.half, p.outputs);
      p.bias = widened;
    }
  row_invariant_linear::linear(arena, p);
}

// Rounds x to 16-bit numbers, and returns these; in full precision, returns x.
template <class T>
const void* round_to(Half half, Arena& arena, T* x, int64_t count) {
  if constexpr (sizeof(T) == 4)
    if (half != Half::kNone) {
      auto* const rounded = arena.take<std::uint16_t>(count);
      narrow_array(rounded, x, half, count);
      widen_array(x, rounded, half, count);
      return rounded;
    }
  return x;
}

// y (batch, dim) and ssm_state after the step, from rows of xz and of `projected`: dt, B and C.
template <class T>
void scan(const Sizes& s, const Arguments& a, const Tensor& A, const T* u, const T* delta, const T* xz,
          const T* projected, T* y, const Tensor& ssm_state) {
  const int64_t columns = s.rank + 2 * s.dstate;
  selective_scan::ScanParams p{.batch = s.batch, .dim = s.dim, .length = 1, .dstate = s.dstate, .groups = 1};
  p.B_invariant = p.C_invariant = p.split_invariant = false, p.softplus = p.gated = true;
  p.reset = nullptr, p.reset_outer = p.reset_inner = 0;
  p.unit_channels = selective_scan::sum_channels<T>(p), p.all_length = 1;
  selective_scan::Inputs<T> in;
  in.u = {u, s.dim, 1}, in.delta = {delta, s.dim, 1}, in.z = {xz + s.dim, 2 * s.dim, 1};
  in.A = {data<T>(A), 0, s.dstate, 1}, in.D = {data<T>(a.D), 0, 1};
  if (a.dt_bias) in.delta_bias = {data<T>(*a.dt_bias), 0, 1};
  in.B = {projected + s.rank, columns, 1}, in.C = {projected + s.rank + s.dstate, columns, 1};
  in.initial_state = {data<T>(a.ssm_state), a.ssm_state.stride(0), a.ssm_state.stride(1), a.ssm_state.stride(2)};
  selective_scan::Outputs<T> out;
  out.y = {y, s.dim, 1}, out.last_state = {mutable_data<T>(ssm_state), s.dim * s.dstate, s.dstate, 1};
  constexpr int64_t kMinThreadWork = int64_t{1} << 16;  // updates of a state
  const int64_t units = s.batch * selective_scan::units(p), work = s.batch * s.dim * s.dstate / units;
  torch::stable::parallel_for(0, units, 1 + kMinThreadWork / (1 + work), [&](int64_t begin, int64_t end) {
    selective_scan::real_states::forward(p, in, nullptr, out, begin, end);
  });
}

template <class T>
Results run(const Arguments& a, const Sizes& s) {
  static thread_local Arena arena;
  const Half half = half_of(a.x.scalar_type());
  const bool reduced = half != Half::kNone;
  const Tensor y = allocate(a.x, {s.batch, s.outputs}), conv_state = allocate(a.x, {s.batch, s.dim, s.width}),
               ssm_state = allocate(a.ssm_state, {s.batch, s.dim, s.dstate});
  const Tensor A = negative_exp<T>(a.A_log);
  arena.reset();
  const auto take = [&](int64_t columns) { return arena.take<T>(s.batch * columns); };
  const T* x = data<T>(a.x);
  T *const xz = take(2 * s.dim), *const u = take(s.dim), *const gated = take(s.dim);
  T* out = reduced ? take(s.outputs) : mutable_data<T>(y);
  if constexpr (sizeof(T) == 4)
    if (reduced) {
      float* const widened = take(s.inputs);
      widen_array(widened, a.x.const_data_ptr(), half, s.batch * s.inputs);
      x = widened;
    }

  if (s.batch * s.dim > 0) {
    project(arena, a.in_proj, a.in_bias, s.batch, x, xz);
    const void* const inputs = round_to(half, arena, xz, s.batch * 2 * s.dim);
    reduced ? push_inputs(s, static_cast<const std::uint16_t*>(inputs), a.conv_state, conv_state)
            : push_inputs(s, static_cast<const T*>(inputs), a.conv_state, conv_state);
    convolve(s, a, xz, u);
    const int64_t columns = s.rank + 2 * s.dstate;
    T *const projected = take(columns), *const dt = take(s.rank), *const delta = take(s.dim);
    project(arena, a.x_proj, {}, s.batch, u, projected);
    for (int64_t row = 0; row < s.batch; ++row) std::copy_n(projected + row * columns, s.rank, dt + row * s.rank);
    project(arena, a.dt_proj, {}, s.batch, dt, delta);
    scan(s, a, A, u, delta, xz, projected, gated, ssm_state);
    round_to(half, arena, gated, s.batch * s.dim);
  }
  if (y.numel() > 0) project(arena, a.out_proj, a.out_bias, s.batch, gated, out);
  if constexpr (sizeof(T) == 4)
    if (reduced) narrow_array(y.mutable_data_ptr(), out, half, s.batch * s.outputs);
  return {y, conv_state, ssm_state};
}

Results mamba_step(Tensor x, Tensor conv_state, Tensor ssm_state, Tensor in_proj, OptionalTensor in_bias,
                   Tensor conv_weight, OptionalTensor conv_bias, Tensor x_proj, Tensor dt_proj, OptionalTensor dt_bias,
                   Tensor A_log, Tensor D, Tensor out_proj, OptionalTensor out_bias) {
  for (Tensor* t : {&x, &in_proj, &conv_weight, &x_proj, &dt_proj, &D, &out_proj}) *t = to_contiguous(*t);
  for (OptionalTensor* t : {&in_bias, &conv_bias, &dt_bias, &out_bias})
    if (*t) *t = to_contiguous(**t);
  const Arguments a{x,      conv_state, ssm_state, in_proj, in_bias, conv_weight, conv_bias,
                    x_proj, dt_proj,    dt_bias,   A_log,   D,       out_proj,    out_bias};
  const Sizes s = check(a);
  return x.scalar_type() == ScalarType::Double ? run<double>(a, s) : run<float>(a, s);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("mamba_step", TORCH_BOX(&mamba_step));
}

}  // namespace eaml::mamba_step
