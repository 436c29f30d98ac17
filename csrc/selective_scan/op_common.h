// What the ops of the selective scan share on every device: arguments, checks, views of tensors, and the ops
// themselves, which call the `run` functions of the file that includes this. Python checks the arguments in full; what
// is checked here keeps memory safe.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "selective_scan/params.h"

namespace eaml::selective_scan {
namespace {

using std::int64_t;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

using GradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using JvpTuple = decltype(std::tuple_cat(std::tuple<Tensor, Tensor>(), GradientTuple()));

// The differentiable arguments of the op, in the order of its schema; also the order of their tangents and gradients.
struct Arguments {
  Maybe u, delta, A, B, C, D, z, delta_bias, initial_state;
};

// What a device defines.
extern const char* const kDevice;
bool on_device(const Tensor& t);
int64_t num_partial_sums(const ScanParams& s, ScalarType dtype);  // of sums over states: see ScanParams
template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const ScanParams& s, const Arguments& x, bool save);
template <class T>
GradientTuple run_vjp(const ScanParams& s, const Arguments& x, const Tensor& grad_y, const Maybe& grad_state,
                      const Maybe& saved);
template <class T>
std::tuple<Tensor, Tensor> run_jvp(const ScanParams& s, const Arguments& x, const Arguments& tangents);
template <class T>
JvpTuple run_vjp_jvp(const ScanParams& s, const Arguments& x, const Tensor& grad_y, const Maybe& grad_state,
                     const Arguments& tangents, const Maybe& grad_y_tangent, const Maybe& grad_state_tangent,
                     bool outputs);
template <class T>
std::tuple<Tensor, Tensor> run_step(const ScanParams& s, const Tensor& state, const Arguments& x);

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Real numbers in one of the tensor's: 2 in a complex one.
int64_t num_components(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble ? 2 : 1;
}

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Chunks that start from a saved state: all but the first.
int64_t saved_chunks(const ScanParams& s) {
  return std::max<int64_t>((s.length - 1) / kChunk, 0);
}
// Numbers of A's kind in the saved states of a batch row; as _saved_size in eaml_ext/ops/selective_scan.py.
int64_t saved_size(const ScanParams& s) {
  return std::max<int64_t>(saved_chunks(s), 1) * s.dstate * s.dim;
}

void check_kind(const char* name, const Maybe& t, ScalarType dtype, int64_t min_rank, int64_t max_rank) {
  if (!t) return;
  EAML_CHECK(on_device(*t), "selective_scan: ", name, " must be on ", kDevice);
  EAML_CHECK(t->scalar_type() == dtype, "selective_scan: ", name, " has a wrong dtype");
  EAML_CHECK(t->dim() >= min_rank && t->dim() <= max_rank, "selective_scan: ", name, " has ", t->dim(), " dimensions");
}

void check_sizes(const char* name, const Maybe& t, int64_t first, const Sizes& wanted) {
  if (!t) return;
  for (std::size_t i = 0; i < wanted.size(); ++i)
    EAML_CHECK(t->size(first + i) == wanted[i], "selective_scan: ", name, " has size ", t->size(first + i),
               " in dimension ", first + i, ", wanted ", wanted[i]);
}

// A parameter of `rank` dimensions, alone or per task.
void check_parameter(const char* name, const Maybe& t, const Sizes& wanted, int64_t batch) {
  if (!t) return;
  const int64_t first = t->dim() - static_cast<int64_t>(wanted.size());
  check_sizes(name, t, first, wanted);
  EAML_CHECK(first == 0 || (t->size(0) > 0 && batch % t->size(0) == 0), "selective_scan: ", name, " has ", t->size(0),
             " tasks, which do not divide the batch of ", batch);
}

// Of parameters and all arithmetic: sequences alone may be of half precision.
ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}
// Of A, B, C and states, which are of this precision.
ScalarType state_type(const Tensor& A, ScalarType full) {
  if (num_components(A.scalar_type()) == 1) return full;
  return full == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

Half half(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Half::kBfloat16 : dtype == ScalarType::Half ? Half::kFloat16 : Half::kNone;
}

ScanParams make_params(const Arguments& x, const Maybe& reset, bool softplus, bool B_invariant, bool C_invariant) {
  const ScalarType dtype = x.u->scalar_type();
  const ScalarType full = wide(dtype), states = state_type(*x.A, full);
  EAML_CHECK(dtype == full || half(dtype) != Half::kNone, "selective_scan: u must be floating-point");
  check_kind("u", x.u, dtype, 3, 3), check_kind("delta", x.delta, dtype, 3, 3), check_kind("A", x.A, states, 2, 3);
  check_kind("B", x.B, states, B_invariant ? 2 : 3, B_invariant ? 3 : 4);
  check_kind("C", x.C, states, C_invariant ? 2 : 3, C_invariant ? 3 : 4);
  check_kind("D", x.D, full, 1, 2), check_kind("z", x.z, dtype, 3, 3);
  check_kind("delta_bias", x.delta_bias, full, 1, 2), check_kind("initial_state", x.initial_state, states, 3, 3);

  ScanParams s{};
  s.batch = x.u->size(0), s.dim = x.u->size(1), s.length = x.u->size(2),
  s.dstate = s.all_dstate = x.A->size(x.A->dim() - 1);
  s.groups = 1, s.num_components = num_components(states), s.softplus = softplus, s.gated = x.z.has_value();
  s.B_invariant = B_invariant, s.C_invariant = C_invariant;
  check_sizes("delta", x.delta, 0, {s.batch, s.dim, s.length}), check_sizes("z", x.z, 0, {s.batch, s.dim, s.length});
  check_sizes("initial_state", x.initial_state, 0, {s.batch, s.dim, s.dstate});
  check_parameter("A", x.A, {s.dim, s.dstate}, s.batch);
  check_parameter("D", x.D, {s.dim}, s.batch), check_parameter("delta_bias", x.delta_bias, {s.dim}, s.batch);
  bool first = true;
  const auto check_matrix = [&](const char* name, const Tensor& t, bool invariant) {
    if (invariant) return check_parameter(name, t, {s.dim, s.dstate}, s.batch);
    const int64_t groups = t.dim() == 4 ? t.size(1) : 1;
    EAML_CHECK(groups > 0 && s.dim % groups == 0 && (first || groups == s.groups), "selective_scan: ", name, " has ",
               groups, " groups");
    s.groups = groups, first = false;
    check_sizes(name, t, 0, {s.batch}), check_sizes(name, t, t.dim() - 2, {s.dstate, s.length});
  };
  check_matrix("B", *x.B, B_invariant), check_matrix("C", *x.C, C_invariant);
  if (reset) {
    EAML_CHECK(on_device(*reset) && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2,
               "selective_scan: reset must be a bool tensor of params (batch, length) on ", kDevice);
    check_sizes("reset", reset, 0, {s.batch, s.length});
    s.reset = data<bool>(*reset), s.reset_outer = reset->stride(0), s.reset_inner = reset->stride(1);
  }
  s.num_partial_sums = num_partial_sums(s, dtype);
  return s;
}

// The params of one step: tensors as in a scan, but for the dimension of time.
ScanParams make_step_params(const Tensor& state, const Arguments& x, bool softplus) {
  const ScalarType dtype = wide(x.u->scalar_type()), states = state_type(*x.A, dtype);
  check_kind("state", state, states, 3, 3), check_kind("u", x.u, dtype, 2, 2),
      check_kind("delta", x.delta, dtype, 2, 2);
  check_kind("A", x.A, states, 2, 3), check_kind("B", x.B, states, 2, 3), check_kind("C", x.C, states, 2, 3);
  check_kind("D", x.D, dtype, 1, 2), check_kind("z", x.z, dtype, 2, 2);
  check_kind("delta_bias", x.delta_bias, dtype, 1, 2);
  ScanParams s{};
  s.batch = state.size(0), s.dim = state.size(1), s.length = 1, s.dstate = s.all_dstate = state.size(2);
  s.groups = x.B->dim() == 3 ? x.B->size(1) : 1, s.num_components = num_components(states);
  s.softplus = softplus, s.gated = x.z.has_value();
  EAML_CHECK(s.groups > 0 && s.dim % s.groups == 0, "selective_scan_step: B has ", s.groups, " groups");
  EAML_CHECK((x.C->dim() == 3 ? x.C->size(1) : 1) == s.groups, "selective_scan_step: C has other groups than B");
  check_sizes("u", x.u, 0, {s.batch, s.dim}), check_sizes("delta", x.delta, 0, {s.batch, s.dim});
  check_sizes("z", x.z, 0, {s.batch, s.dim});
  check_parameter("A", x.A, {s.dim, s.dstate}, s.batch);
  check_parameter("D", x.D, {s.dim}, s.batch), check_parameter("delta_bias", x.delta_bias, {s.dim}, s.batch);
  for (const Maybe* t : {&x.B, &x.C})
    check_sizes("B or C", *t, 0, {s.batch}), check_sizes("B or C", *t, (*t)->dim() - 1, {s.dstate});
  return s;
}

void check_cotangents(const ScanParams& s, const Arguments& x, const Maybe& grad_y, const Maybe& grad_state) {
  check_kind("grad_y", grad_y, x.u->scalar_type(), 3, 3);
  check_kind("grad_state", grad_state, x.A->scalar_type(), 3, 3);
  check_sizes("grad_y", grad_y, 0, {s.batch, s.dim, s.length});
  check_sizes("grad_state", grad_state, 0, {s.batch, s.dim, s.dstate});
}

void check_tangents(const Arguments& x, const Arguments& tangents) {
  const auto check = [&](const char* name, const Maybe& value, const Maybe& tangent) {
    if (!tangent) return;
    EAML_CHECK(value.has_value(), "selective_scan: ", name, " has a tangent but no value");
    check_kind(name, tangent, value->scalar_type(), value->dim(), value->dim());
    check_sizes(name, tangent, 0, sizes_of(*value));
  };
  check("u", x.u, tangents.u), check("delta", x.delta, tangents.delta), check("A", x.A, tangents.A);
  check("B", x.B, tangents.B), check("C", x.C, tangents.C), check("D", x.D, tangents.D), check("z", x.z, tangents.z);
  check("delta_bias", x.delta_bias, tangents.delta_bias);
  check("initial_state", x.initial_state, tangents.initial_state);
}

// A (batch, dim, length) or (batch, dim, state) input. Here and below `n` is the components of its numbers.
template <class T>
In<T> sequence(const Maybe& t, int64_t n = 1) {
  if (!t) return {};
  In<T> in{data<T>(*t), n * t->stride(0), n * t->stride(1), n * t->stride(2)};
  in.half = half(t->scalar_type());
  return in;
}

// The same at one step: (batch, dim), and (batch, [groups,] state).
template <class T>
In<T> sequence_step(const Maybe& t) {
  if (!t) return {};
  return {data<T>(*t), t->stride(0), t->stride(1), 0};
}
template <class T>
In<T> matrix_step(const Tensor& t, int64_t n) {
  In<T> in{data<T>(t), n * t.stride(0), n * t.stride(t.dim() - 1), 0};
  if (t.dim() == 3) in.group = n * t.stride(1);
  return in;
}

// A (tasks, dim[, state]) or (dim[, state]) input; `rank` counts the dimensions behind tasks.
template <class T>
In<T> parameter(const Maybe& t, int64_t rank, int64_t batch, int64_t n = 1) {
  if (!t) return {};
  const int64_t first = t->dim() - rank;
  In<T> in{data<T>(*t), 0, n * t->stride(first), rank == 2 ? n * t->stride(first + 1) : 0};
  if (first == 1) in.outer = n * t->stride(0), in.rows_per_outer = std::max<int64_t>(batch / t->size(0), 1);
  return in;
}

// B or C: (batch, [groups,] state, length), or a parameter where it is invariant in time.
template <class T>
In<T> matrix(const Maybe& t, bool invariant, int64_t batch, int64_t n) {
  if (!t || invariant) return parameter<T>(t, 2, batch, n);
  const int64_t rank = t->dim();
  In<T> in{data<T>(*t), n * t->stride(0), n * t->stride(rank - 2), n * t->stride(rank - 1)};
  if (rank == 4) in.group = n * t->stride(1);
  return in;
}

template <class T>
Inputs<T> inputs(const ScanParams& s, const Arguments& x) {
  const int64_t n = s.num_components;
  Inputs<T> in;
  in.u = sequence<T>(x.u), in.delta = sequence<T>(x.delta), in.z = sequence<T>(x.z);
  in.A = parameter<T>(x.A, 2, s.batch, n), in.D = parameter<T>(x.D, 1, s.batch);
  in.delta_bias = parameter<T>(x.delta_bias, 1, s.batch);
  in.B = matrix<T>(x.B, s.B_invariant, s.batch, n), in.C = matrix<T>(x.C, s.C_invariant, s.batch, n);
  in.initial_state = sequence<T>(x.initial_state, n);
  return in;
}

template <class T>
Inputs<T> step_inputs(const ScanParams& s, const Tensor& state, const Arguments& x) {
  const int64_t n = s.num_components;
  Inputs<T> in;
  in.u = sequence_step<T>(x.u), in.delta = sequence_step<T>(x.delta), in.z = sequence_step<T>(x.z);
  in.A = parameter<T>(x.A, 2, s.batch, n), in.D = parameter<T>(x.D, 1, s.batch);
  in.delta_bias = parameter<T>(x.delta_bias, 1, s.batch);
  in.B = matrix_step<T>(*x.B, n), in.C = matrix_step<T>(*x.C, n), in.initial_state = sequence<T>(state, n);
  return in;
}

template <class T>
Out<T> out(const Tensor& t, int64_t n = 1) {
  return {mutable_data<T>(t), n * t.stride(0), n * t.stride(1), n * t.stride(2), half(t.scalar_type())};
}

Tensor empty(const Tensor& like, const Sizes& size) {
  return torch::stable::new_empty(like, size);
}

bool single(const Arguments& x) {
  return x.u->scalar_type() != ScalarType::Double;
}

// The ops. Their schemas, and what they compute, stand in eaml_ext/ops/selective_scan.py.

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Maybe D,
                                                  Maybe z, Maybe delta_bias, Maybe initial_state, Maybe reset,
                                                  bool delta_softplus, bool B_invariant, bool C_invariant, bool save) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const ScanParams s = make_params(x, reset, delta_softplus, B_invariant, C_invariant);
  return single(x) ? run<float>(s, x, save) : run<double>(s, x, save);
}

std::tuple<Tensor, Tensor> selective_scan_step(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                               Maybe D, Maybe z, Maybe delta_bias, bool delta_softplus) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias};
  const ScanParams s = make_step_params(state, x, delta_softplus);
  return single(x) ? run_step<float>(s, state, x) : run_step<double>(s, state, x);
}

GradientTuple selective_scan_backward(Tensor grad_y, Maybe grad_state, Tensor u, Tensor delta, Tensor A, Tensor B,
                                      Tensor C, Maybe D, Maybe z, Maybe delta_bias, Maybe initial_state, Maybe reset,
                                      bool delta_softplus, bool B_invariant, bool C_invariant, Maybe saved) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const ScanParams s = make_params(x, reset, delta_softplus, B_invariant, C_invariant);
  check_cotangents(s, x, grad_y, grad_state);
  check_kind("saved", saved, A.scalar_type(), 2, 2);
  check_sizes("saved", saved, 0, {s.batch, saved_size(s)});
  EAML_CHECK(!saved || saved->is_contiguous(), "selective_scan: saved must be contiguous");
  return single(x) ? run_vjp<float>(s, x, grad_y, grad_state, saved) : run_vjp<double>(s, x, grad_y, grad_state, saved);
}

std::tuple<Tensor, Tensor> selective_scan_jvp(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Maybe D, Maybe z,
                                              Maybe delta_bias, Maybe initial_state, Maybe tu, Maybe tdelta, Maybe tA,
                                              Maybe tB, Maybe tC, Maybe tD, Maybe tz, Maybe tdelta_bias,
                                              Maybe tinitial_state, Maybe reset, bool delta_softplus, bool B_invariant,
                                              bool C_invariant) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Arguments tangents{tu, tdelta, tA, tB, tC, tD, tz, tdelta_bias, tinitial_state};
  const ScanParams s = make_params(x, reset, delta_softplus, B_invariant, C_invariant);
  check_tangents(x, tangents);
  return single(x) ? run_jvp<float>(s, x, tangents) : run_jvp<double>(s, x, tangents);
}

JvpTuple selective_scan_backward_jvp(Tensor grad_y, Maybe grad_state, Maybe grad_y_tangent, Maybe grad_state_tangent,
                                     Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Maybe D, Maybe z,
                                     Maybe delta_bias, Maybe initial_state, Maybe tu, Maybe tdelta, Maybe tA, Maybe tB,
                                     Maybe tC, Maybe tD, Maybe tz, Maybe tdelta_bias, Maybe tinitial_state, Maybe reset,
                                     bool delta_softplus, bool B_invariant, bool C_invariant, bool outputs) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Arguments tangents{tu, tdelta, tA, tB, tC, tD, tz, tdelta_bias, tinitial_state};
  const ScanParams s = make_params(x, reset, delta_softplus, B_invariant, C_invariant);
  check_cotangents(s, x, grad_y, grad_state), check_cotangents(s, x, grad_y_tangent, grad_state_tangent);
  check_tangents(x, tangents);
  return single(x)
             ? run_vjp_jvp<float>(s, x, grad_y, grad_state, tangents, grad_y_tangent, grad_state_tangent, outputs)
             : run_vjp_jvp<double>(s, x, grad_y, grad_state, tangents, grad_y_tangent, grad_state_tangent, outputs);
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_jvp", TORCH_BOX(&selective_scan_jvp));
  m.impl("selective_scan_backward_jvp", TORCH_BOX(&selective_scan_backward_jvp));
}

}  // namespace
}  // namespace eaml::selective_scan
