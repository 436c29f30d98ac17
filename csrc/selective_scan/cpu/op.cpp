// The CPU selective scan on tensors: shapes, strides, allocation and threads. The only arithmetic is the second stage
// of the reductions.
#include <algorithm>
#include <tuple>

#include "selective_scan/cpu/kernel.h"
#include "selective_scan/cpu/time_parallel.h"
#include "selective_scan/op_common.h"

namespace eaml::selective_scan {
namespace {

bool on_device(const Tensor& t) {
  return t.is_cpu();
}

// to[i] += from[i]
template <class T>
void add(T* to, const T* from, int64_t count) {
  constexpr int64_t kBlock = int64_t{1} << 14;
  parallel((count + kBlock - 1) / kBlock, kBlock, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(end * kBlock, count); ++i) to[i] += from[i];
  });
}

// to[i][k] = sum over j of from[i][j][k], in order of j.
template <class T>
void sum_middle(T* to, const T* from, int64_t outer, int64_t middle, int64_t inner) {
  parallel(outer, middle * inner, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* sum = to + i * inner;
      std::copy_n(from + i * middle * inner, inner, sum);
      for (int64_t j = 1; j < middle; ++j) {
        const T* term = from + (i * middle + j) * inner;
        for (int64_t k = 0; k < inner; ++k) sum[k] += term[k];
      }
    }
  });
}

// A gradient of (outer, inner) real numbers. Kernels write partial sums, (partitions, outer, middle, inner); reduced()
// adds them over partitions and middle.
template <class T>
struct PartialSums {
  Tensor result;
  T* data;  // points to the result itself if there is nothing to add
  int64_t partitions, outer, middle, inner;

  PartialSums(Scratch& scratch, const Tensor& parameter, const OptionalTensor& like, int64_t p, int64_t o, int64_t m,
              int64_t i)
      : result(like ? empty(*like, sizes_of(*like)) : empty(parameter, {0})),
        partitions(p),
        outer(like ? o : 0),
        middle(m),
        inner(i) {
    data = like && p * m == 1 ? mutable_data<T>(result) : scratch.take<T>(p * o * m * i);
  }

  Tensor reduced() {
    const int64_t count = outer * middle * inner;
    for (int64_t p = 1; p < partitions; ++p) add(data, data + p * count, count);
    if (outer > 0 && middle == 0) torch::stable::zero_(result);
    if (outer > 0 && middle * partitions > 1) sum_middle(mutable_data<T>(result), data, outer, middle, inner);
    return result;
  }
};

// All gradients of a call, shaped like its inputs.
template <class T>
struct GradientTensors {
  Tensor u, delta, z;
  PartialSums<T> A, B, C, D, delta_bias, initial_state;

  GradientTensors(Scratch& scratch, const ScanParams& s, const Arguments& x)
      : u(torch::stable::empty_like(*x.u)),
        delta(torch::stable::empty_like(*x.delta)),
        z(x.z ? torch::stable::empty_like(*x.z) : empty(*x.u, {0})),
        A(over_rows(scratch, s, x, x.A, 2)),
        B(over_channels(scratch, s, x, x.B, s.B_invariant)),
        C(over_channels(scratch, s, x, x.C, s.C_invariant)),
        D(over_rows(scratch, s, x, x.D, 1)),
        delta_bias(over_rows(scratch, s, x, x.delta_bias, 1)),
        initial_state(scratch, *x.A, x.initial_state, 1, s.batch, 1, s.dim * s.dstate * s.num_components) {}

  // The gradient of a parameter, summed over the batch rows that share it.
  static PartialSums<T> over_rows(Scratch& scratch, const ScanParams& s, const Arguments& x, const OptionalTensor& like,
                                  int64_t rank) {
    const int64_t tasks = like && like->dim() > rank ? like->size(0) : 1;
    const int64_t inner = rank == 2 ? s.dim * s.dstate * s.num_components : s.dim;
    return {scratch, *x.A, like, num_time_partitions(s), tasks, s.batch / tasks, inner};
  }

  // The gradient of B or C, summed over the units of a group, or over batch rows if invariant in time.
  static PartialSums<T> over_channels(Scratch& scratch, const ScanParams& s, const Arguments& x,
                                      const OptionalTensor& like, bool invariant) {
    if (invariant) return over_rows(scratch, s, x, like, 2);
    return {
        scratch, *x.A, like, 1, x.u->size(0) * s.groups, units(s) / s.groups, s.dstate * s.length * s.num_components};
  }

  Gradients<T> pointers(const Arguments& x) const {
    Gradients<T> g;
    g.u = out<T>(u), g.delta = out<T>(delta);
    if (x.z) g.z = out<T>(z);
    g.initial_state = initial_state.data, g.A = A.data, g.B = B.data, g.C = C.data, g.D = D.data;
    g.delta_bias = delta_bias.data;
    return g;
  }

  GradientTuple reduced() {
    return {
        u, delta, A.reduced(), B.reduced(), C.reduced(), D.reduced(), z, delta_bias.reduced(), initial_state.reduced()};
  }
};

template <class T>
void run_forward(Scratch& scratch, const ScanParams& s, const Inputs<T>& in, const Inputs<T>* tangents,
                 const Outputs<T>& out) {
  const auto call = [&](const ScanParams& part, Carry<T> from, Carry<T> to, Outputs<T> outputs, int64_t unit) {
    Inputs<T> x = in, tangent_in = tangents ? *tangents : Inputs<T>{};
    x.carry = from.value, tangent_in.carry = from.tangent;
    outputs.carry = to.value, outputs.carry_tangent = to.tangent;
    forward<T>(part, x, tangents ? &tangent_in : nullptr, outputs, unit);
  };
  const auto warm_up = [&](const ScanParams& part, Carry<T> carry, int64_t unit) {
    call(part, carry, carry, {}, unit);
  };
  const auto run = [&](int64_t begin, int64_t end, Carry<T> from, Carry<T> to, int64_t unit) {
    ScanParams part = s;
    part.first_chunk = partition_begin(s, begin), part.end_chunk = partition_begin(s, end);
    call(part, from, part.end_chunk < chunks(s) ? to : Carry<T>{}, out, unit);
  };
  if (run_time_segments<T>(scratch, s, in, tangents != nullptr, false, warm_up, run)) return;

  const ScanParams narrow = with_forward_units<T>(s);
  for_each_unit(narrow, 1, [&](int64_t, int64_t unit) { forward<T>(narrow, in, tangents, out, unit); });
}

template <class T>
void run_backward(Scratch& scratch, const ScanParams& s, const Inputs<T>& in, const Inputs<T>* tangents,
                  const Gradients<T>& out) {
  const int64_t channels = s.batch * s.dim, partitions = num_time_partitions(s);
  const auto call = [&](const ScanParams& part, Carry<T> from, Carry<T> to, Gradients<T> gradients, int64_t unit) {
    Inputs<T> x = in, tangent_in = tangents ? *tangents : Inputs<T>{};
    x.carry = from.value, tangent_in.carry = from.tangent;
    gradients.carry = to.value, gradients.carry_tangent = to.tangent;
    backward<T>(part, x, tangents ? &tangent_in : nullptr, gradients, unit);
  };
  const auto run = [&](int64_t begin, int64_t end, Carry<T> from, Carry<T> to, int64_t unit) {
    for (int64_t partition = end - 1; partition >= begin; --partition, from = to) {
      Gradients<T> of_partition = out;
      const int64_t states = partition * channels * s.dstate * s.num_components;
      of_partition.A += states, of_partition.D += partition * channels, of_partition.delta_bias += partition * channels;
      if (s.B_invariant) of_partition.B += states;
      if (s.C_invariant) of_partition.C += states;
      ScanParams part = s;
      part.first_chunk = partition_begin(s, partition), part.end_chunk = partition_begin(s, partition + 1);
      call(part, from, to, of_partition, unit);
    }
  };
  const auto warm_up = [&](const ScanParams& part, Carry<T> carry, int64_t unit) {
    Gradients<T> none;
    none.checkpoints = out.checkpoints, none.checkpoint_tangents = out.checkpoint_tangents;
    call(part, carry, carry, none, unit);
  };
  if (run_time_segments<T>(scratch, s, in, tangents != nullptr, true, warm_up, run)) return;
  const Carry<T> carry = partitions > 1 ? Carry<T>(scratch, s, tangents != nullptr) : Carry<T>{};
  for_each_unit(s, 1, [&](int64_t, int64_t unit) { run(0, partitions, {}, carry, unit); });
}

template <class T>
ForwardTuple run(const ScanParams& params, const Arguments& x, bool save) {
  const ScanParams s = with_units<T>(params);
  Scratch scratch;
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.dstate});
  Tensor saved = empty(*x.A, save ? Sizes{x.u->size(0), saved_size(s)} : Sizes{0});
  if (save && (s.cu_seqlens || saved_chunks(s) == 0)) torch::stable::zero_(saved);  // some entries belong to no chunk
  const Outputs<T> to{out<T>(y), out<T>(last, s.num_components), save ? mutable_data<T>(saved) : nullptr};
  run_forward<T>(scratch, s, inputs<T>(s, x), nullptr, to);
  return {y, last, saved};
}

template <class T>
GradientTuple run_vjp(const ScanParams& params, const Arguments& x, const Tensor& grad_y,
                      const OptionalTensor& grad_state, const OptionalTensor& saved) {
  const ScanParams s = with_units<T>(params);
  Scratch scratch;
  Inputs<T> in = inputs<T>(s, x);
  in.grad_y = sequence<T>(grad_y), in.grad_state = sequence<T>(grad_state, s.num_components);
  GradientTensors<T> gradients(scratch, s, x);
  Gradients<T> to = gradients.pointers(x);
  if (saved) {
    to.checkpoints = data<T>(*saved);
  } else {
    T* const states = scratch.take<T>(x.u->size(0) * saved_size(s) * s.num_components);
    if (saved_chunks(s) > 0) run_forward<T>(scratch, s, in, nullptr, {{}, {}, states});
    to.checkpoints = states;
  }
  run_backward<T>(scratch, s, in, nullptr, to);
  return gradients.reduced();
}

template <class T>
StateTuple run_jvp(const ScanParams& params, const Arguments& x, const Arguments& tangents) {
  const ScanParams s = with_units<T>(params);
  Scratch scratch;
  const Inputs<T> tangent_in = inputs<T>(s, tangents);
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.dstate});
  run_forward<T>(scratch, s, inputs<T>(s, x), &tangent_in, {out<T>(y), out<T>(last, s.num_components)});
  return {y, last};
}

template <class T>
BackwardJvpTuple run_vjp_jvp(const ScanParams& params, const Arguments& x, const Tensor& grad_y,
                             const OptionalTensor& grad_state, const Arguments& tangents,
                             const OptionalTensor& grad_y_tangent, const OptionalTensor& grad_state_tangent,
                             bool outputs) {
  const ScanParams s = with_units<T>(params);
  Inputs<T> in = inputs<T>(s, x), tangent_in = inputs<T>(s, tangents);
  in.grad_y = sequence<T>(grad_y), in.grad_state = sequence<T>(grad_state, s.num_components);
  tangent_in.grad_y = sequence<T>(grad_y_tangent),
  tangent_in.grad_state = sequence<T>(grad_state_tangent, s.num_components);
  Tensor y = outputs ? torch::stable::empty_like(*x.u) : empty(*x.u, {0});
  Tensor last = empty(*x.A, outputs ? Sizes{s.batch, s.dim, s.dstate} : Sizes{0});
  Scratch scratch;
  const int64_t count = x.u->size(0) * saved_size(s) * s.num_components;
  Outputs<T> first{{}, {}, scratch.take<T>(count), scratch.take<T>(count)};
  if (outputs) first.y = out<T>(y), first.last_state = out<T>(last, s.num_components);
  if (outputs || saved_chunks(s) > 0) run_forward<T>(scratch, s, in, &tangent_in, first);
  GradientTensors<T> gradients(scratch, s, x);
  Gradients<T> to = gradients.pointers(x);
  to.checkpoints = first.checkpoints, to.checkpoint_tangents = first.checkpoint_tangents;
  run_backward<T>(scratch, s, in, &tangent_in, to);
  return std::tuple_cat(std::make_tuple(y, last), gradients.reduced());
}

template <class T>
StateTuple run_step(const ScanParams& params, const Tensor& state, const Arguments& x) {
  const ScanParams s = with_units<T>(params);
  Tensor y = empty(*x.u, {s.batch, s.dim}), next = empty(state, {s.batch, s.dim, s.dstate});
  const Outputs<T> to{{mutable_data<T>(y), s.dim, 1, 0}, out<T>(next, s.num_components)};
  Scratch scratch;
  run_forward<T>(scratch, s, step_inputs<T>(s, state, x), nullptr, to);
  return {y, next};
}

template <class T>
constexpr Functions<T> kFunctions{run<T>, run_vjp<T>, run_jvp<T>, run_vjp_jvp<T>, run_step<T>};
constexpr Device kDevice{"the CPU", on_device, kFunctions<float>, kFunctions<double>};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  register_ops<kDevice>(m);
}

}  // namespace eaml::selective_scan
