// The CUDA selective scan on tensors: shapes, strides and allocation. No function synchronises with the GPU and all
// memory is torch's, so that calls can be captured in a CUDA graph.
#include <string>

#include "common/check.h"
#include "common/device_guard.h"
#include "selective_scan/cuda/launch.h"
#include "selective_scan/op_common.h"

namespace eaml::selective_scan {
namespace {

void check_sizes_of_kernels(const ScanParams& s) {
  EAML_CHECK(s.dim <= INT32_MAX, "selective_scan: u has ", s.dim, " channels, the CUDA kernels take up to ", INT32_MAX);
  const int64_t max_states = kMaxStateSize / s.num_components;
  EAML_CHECK(s.dstate <= max_states, "selective_scan: A has ", s.dstate, s.num_components == 2 ? " complex" : "",
             " states, the CUDA kernels take up to ", max_states);
}

template <class T>
BlockCounts block_counts(const ScanParams& s) {
  return s.num_components == 1 ? real_states::block_counts<T>(s) : complex_states::block_counts<T>(s);
}

// A cotangent of y, contiguous along the dimension along which u is: else it is copied. So the kernel, and with it the
// order of sums, does not depend on the layout that autograd chose, such as the expanded cotangent of a sum.
OptionalTensor with_layout_of(const Tensor& u, const OptionalTensor& grad_y) {
  if (!grad_y) return grad_y;
  const int64_t contiguous = u.stride(2) == 1 ? 2 : 1;
  if (u.stride(contiguous) != 1 || u.size(contiguous) == 1 || grad_y->stride(contiguous) == 1) return grad_y;
  Tensor copy = torch::stable::empty_like(u);
  torch::stable::copy_(copy, *grad_y);
  return copy;
}

// Scratch memory of one call. torch reuses freed memory only for later work of the same stream.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}
  template <class T>
  T* take(int64_t count) {
    constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    tensors_.push_back(allocate(like_, {count}, kType));
    return mutable_data<T>(tensors_.back());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

template <class T>
TimeSegments<T> time_segments(Scratch& scratch, const ScanParams& s, bool dual) {
  TimeSegments<T> out;
  out.count = block_counts<T>(s).time_segments;
  if (out.count == 1) return out;
  const int64_t steps = s.batch * out.count * s.dim, states = steps * s.dstate * s.num_components;
  out.states = scratch.take<T>(states), out.steps = scratch.take<T>(steps), out.has_reset = scratch.take<T>(steps);
  if (dual) out.state_tangents = scratch.take<T>(states), out.step_tangents = scratch.take<T>(steps);
  return out;
}

// Runs the forward kernel, on Duals if there are tangents.
template <class T>
void run_forward(Scratch& scratch, const cuda::DeviceStreamGuard& guard, const ScanParams& s, const Inputs<T>& in,
                 const Inputs<T>* tangents, const Outputs<T>& out) {
  const bool dual = tangents != nullptr;
  ForwardParams<T> p{s, {in, dual ? *tangents : Inputs<T>{}}, time_segments<T>(scratch, s, dual), out};
  cuda::check_launch(s.num_components == 1 ? real_states::forward(p, dual, guard.stream())
                                           : complex_states::forward(p, dual, guard.stream()));
}

// A gradient, (outer, inner) real numbers, which a kernel writes as partial sums (outer, middle, inner). SumParams in
// launch.h describes `rows` and `num_components`.
template <class T>
struct PartialSums {
  Tensor result;
  SumParams<T> sum{};

  PartialSums(Scratch& scratch, const Tensor& parameter, const OptionalTensor& like, int64_t outer, int64_t middle,
              int64_t inner, int64_t rows = 0, int64_t num_components = 1)
      : result(like ? empty(*like, sizes_of(*like)) : empty(parameter, {0})) {
    if (!like) return;
    T* const to = mutable_data<T>(result);
    const bool no_reduction = middle == 1 && rows == 0;
    sum = {to, no_reduction ? to : scratch.take<T>(outer * middle * inner), outer, middle, inner, rows, num_components};
  }

  T* data() const { return const_cast<T*>(sum.from); }

  Tensor reduced(const cuda::DeviceStreamGuard& guard) {
    if (sum.from != sum.to) cuda::check_launch(eaml::selective_scan::sum(sum, guard.stream()));
    return result;
  }
};

template <class T>
GradientTuple run_backward(Scratch& scratch, const cuda::DeviceStreamGuard& guard, const ScanParams& s,
                           const Arguments& x, const Inputs<T>& in, const Inputs<T>* tangents, const T* checkpoints,
                           const T* checkpoint_tangents) {
  const bool dual = tangents != nullptr;
  BackwardParams<T> p{s, {in, dual ? *tangents : Inputs<T>{}}, time_segments<T>(scratch, s, dual)};
  const int64_t segments = p.segments.count, states = s.dstate * s.num_components, rows = x.u->size(0);
  // Gradients summed over time segments and over the batch rows, or packed sequences, that share a parameter.
  const auto over_rows = [&](const OptionalTensor& like, int64_t rank) {
    const int64_t tasks = like && like->dim() > rank ? like->size(0) : 1;
    return PartialSums<T>(scratch, *x.A, like, tasks, s.batch / tasks * segments, rank == 2 ? s.dim * states : s.dim);
  };
  // Gradients summed over the blocks of channels of a group.
  const auto over_channels = [&](const OptionalTensor& like, bool invariant) {
    if (invariant) return over_rows(like, 2);
    return PartialSums<T>(scratch, *x.A, like, rows * s.groups, block_counts<T>(s).channel_blocks, s.length * states,
                          s.dstate, s.num_components);
  };
  PartialSums<T> A = over_rows(x.A, 2), B = over_channels(x.B, s.B_invariant), C = over_channels(x.C, s.C_invariant);
  PartialSums<T> D = over_rows(x.D, 1), delta_bias = over_rows(x.delta_bias, 1);
  const Tensor u = torch::stable::empty_like(*x.u), delta = torch::stable::empty_like(*x.delta);
  const Tensor z = x.z ? torch::stable::empty_like(*x.z) : empty(*x.u, {0});
  const Tensor initial_state = empty(*x.A, x.initial_state ? sizes_of(*x.initial_state) : Sizes{0});
  CudaGradients<T>& to = p.out;
  to.u = out<T>(u), to.delta = out<T>(delta);
  if (x.z) to.z = out<T>(z);
  if (x.initial_state) to.initial_state = mutable_data<T>(initial_state);
  to.A = A.data(), to.B = B.data(), to.C = C.data(), to.D = D.data(), to.delta_bias = delta_bias.data();
  to.checkpoints = checkpoints, to.checkpoint_tangents = checkpoint_tangents;
  cuda::check_launch(s.num_components == 1 ? real_states::backward(p, dual, guard.stream())
                                           : complex_states::backward(p, dual, guard.stream()));
  return {u,
          delta,
          A.reduced(guard),
          B.reduced(guard),
          C.reduced(guard),
          D.reduced(guard),
          z,
          delta_bias.reduced(guard),
          initial_state};
}

template <class T>
ForwardTuple run(const ScanParams& s, const Arguments& x, bool save) {
  check_sizes_of_kernels(s);
  const cuda::DeviceStreamGuard guard(*x.u);
  Scratch scratch(*x.A);
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.dstate});
  Tensor saved = empty(*x.A, save ? Sizes{x.u->size(0), saved_size(s)} : Sizes{0});
  if (save && (saved_chunks(s) == 0 || s.cu_seqlens)) torch::stable::zero_(saved);
  const Outputs<T> to{out<T>(y), out<T>(last, s.num_components), save ? mutable_data<T>(saved) : nullptr};
  run_forward<T>(scratch, guard, s, inputs<T>(s, x), nullptr, to);
  return {y, last, saved};
}

template <class T>
GradientTuple run_vjp(const ScanParams& s, const Arguments& x, const Tensor& grad_y, const OptionalTensor& grad_state,
                      const OptionalTensor& saved) {
  check_sizes_of_kernels(s);
  const cuda::DeviceStreamGuard guard(*x.u);
  Scratch scratch(*x.A);
  Inputs<T> in = inputs<T>(s, x);
  const OptionalTensor grad_y_like_u = with_layout_of(*x.u, grad_y);
  in.grad_y = sequence<T>(grad_y_like_u), in.grad_state = sequence<T>(grad_state, s.num_components);
  const T* states = saved ? data<T>(*saved) : nullptr;
  if (!saved) {
    T* const recomputed = scratch.take<T>(x.u->size(0) * saved_size(s) * s.num_components);
    if (saved_chunks(s) > 0) run_forward<T>(scratch, guard, s, in, nullptr, {{}, {}, recomputed});
    states = recomputed;
  }
  return run_backward<T>(scratch, guard, s, x, in, nullptr, states, nullptr);
}

template <class T>
StateTuple run_jvp(const ScanParams& s, const Arguments& x, const Arguments& tangents) {
  check_sizes_of_kernels(s);
  const cuda::DeviceStreamGuard guard(*x.u);
  Scratch scratch(*x.A);
  const Inputs<T> tangent_in = inputs<T>(s, tangents);
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.dstate});
  run_forward<T>(scratch, guard, s, inputs<T>(s, x), &tangent_in, {out<T>(y), out<T>(last, s.num_components)});
  return {y, last};
}

template <class T>
BackwardJvpTuple run_vjp_jvp(const ScanParams& s, const Arguments& x, const Tensor& grad_y,
                             const OptionalTensor& grad_state, const Arguments& tangents,
                             const OptionalTensor& grad_y_tangent, const OptionalTensor& grad_state_tangent,
                             bool outputs) {
  check_sizes_of_kernels(s);
  const cuda::DeviceStreamGuard guard(*x.u);
  Scratch scratch(*x.A);
  Inputs<T> in = inputs<T>(s, x), tangent_in = inputs<T>(s, tangents);
  const OptionalTensor grad_y_like_u = with_layout_of(*x.u, grad_y);
  const OptionalTensor grad_y_tangent_like_u = with_layout_of(*x.u, grad_y_tangent);
  in.grad_y = sequence<T>(grad_y_like_u), in.grad_state = sequence<T>(grad_state, s.num_components);
  tangent_in.grad_y = sequence<T>(grad_y_tangent_like_u),
  tangent_in.grad_state = sequence<T>(grad_state_tangent, s.num_components);
  Tensor y = outputs ? torch::stable::empty_like(*x.u) : empty(*x.u, {0});
  Tensor last = empty(*x.A, outputs ? Sizes{s.batch, s.dim, s.dstate} : Sizes{0});
  const int64_t count = x.u->size(0) * saved_size(s) * s.num_components;
  Outputs<T> first{{}, {}, scratch.take<T>(count), scratch.take<T>(count)};
  if (outputs) first.y = out<T>(y), first.last_state = out<T>(last, s.num_components);
  if (outputs || saved_chunks(s) > 0) run_forward<T>(scratch, guard, s, in, &tangent_in, first);
  return std::tuple_cat(std::make_tuple(y, last), run_backward<T>(scratch, guard, s, x, in, &tangent_in,
                                                                  first.checkpoints, first.checkpoint_tangents));
}

template <class T>
StateTuple run_step(const ScanParams& s, const Tensor& state, const Arguments& x) {
  const cuda::DeviceStreamGuard guard(state);
  Tensor y = empty(*x.u, {s.batch, s.dim}), next = empty(state, {s.batch, s.dim, s.dstate});
  ForwardParams<T> p{
      s, {step_inputs<T>(s, state, x), {}}, {}, {{mutable_data<T>(y), s.dim, 1, 0}, out<T>(next, s.num_components)}};
  cuda::check_launch(s.num_components == 1 ? real_states::step(p, guard.stream())
                                           : complex_states::step(p, guard.stream()));
  return {y, next};
}

template <class T>
constexpr Functions<T> kFunctions{run<T>, run_vjp<T>, run_jvp<T>, run_vjp_jvp<T>, run_step<T>};
constexpr Device kDevice{"a CUDA device", cuda::on_device, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, EAML_CUDA_KEY, m) {
  register_ops<kDevice>(m);
}

}  // namespace eaml::selective_scan
