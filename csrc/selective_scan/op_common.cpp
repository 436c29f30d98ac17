// Arguments of the selective scan: checks, views, and the choice of precision. Python checks the arguments in full; the
// checks here keep memory safe.
#include "selective_scan/op_common.h"

#include <algorithm>

#include "common/check.h"

namespace eaml::selective_scan {
namespace {

// Real numbers in one number of a dtype: 2 if complex.
int64_t num_components(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble ? 2 : 1;
}

// Checks the device, dtype and number of dimensions of a tensor that is present.
void check_tensor(const Device& device, const char* name, const OptionalTensor& t, ScalarType dtype, int64_t min_rank,
                  int64_t max_rank) {
  if (!t) return;
  EAML_CHECK(device.has(*t), "selective_scan: ", name, " must be on ", device.name);
  EAML_CHECK(t->scalar_type() == dtype, "selective_scan: ", name, " has a wrong dtype");
  EAML_CHECK(t->dim() >= min_rank && t->dim() <= max_rank, "selective_scan: ", name, " has ", t->dim(), " dimensions");
}

// Checks the sizes of dimensions first, first + 1, and so on.
void check_sizes(const char* name, const OptionalTensor& t, int64_t first, const Sizes& wanted) {
  if (!t) return;
  for (std::size_t i = 0; i < wanted.size(); ++i)
    EAML_CHECK(t->size(first + i) == wanted[i], "selective_scan: ", name, " has size ", t->size(first + i),
               " in dimension ", first + i, ", wanted ", wanted[i]);
}

// Checks the sizes of a ([tasks,] *wanted) parameter.
void check_parameter(const char* name, const OptionalTensor& t, const Sizes& wanted, int64_t batch) {
  if (!t) return;
  const int64_t first = t->dim() - static_cast<int64_t>(wanted.size());
  check_sizes(name, t, first, wanted);
  EAML_CHECK(first == 0 || (t->size(0) > 0 && batch % t->size(0) == 0), "selective_scan: ", name, " has ", t->size(0),
             " tasks, which do not divide the batch of ", batch);
}

// The dtype of A, B, C and the states: `full`, the opmath type, or its complex counterpart if A is complex.
ScalarType state_type(const Tensor& A, ScalarType full) {
  if (num_components(A.scalar_type()) == 1) return full;
  return full == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

ScanParams make_params(const Device& device, const Arguments& x, const OptionalTensor& reset,
                       const OptionalTensor& cu_seqlens, bool softplus, bool B_invariant, bool C_invariant,
                       bool split_invariant) {
  const ScalarType dtype = x.u->scalar_type();
  const ScalarType full = opmath_type(dtype), states = state_type(*x.A, full);
  EAML_CHECK(is_kernel_dtype(dtype), "selective_scan: u must be floating-point");
  check_tensor(device, "u", x.u, dtype, 3, 3), check_tensor(device, "delta", x.delta, dtype, 3, 3);
  check_tensor(device, "A", x.A, states, 2, 3);
  check_tensor(device, "B", x.B, states, B_invariant ? 2 : 3, B_invariant ? 3 : 4);
  check_tensor(device, "C", x.C, states, C_invariant ? 2 : 3, C_invariant ? 3 : 4);
  check_tensor(device, "D", x.D, full, 1, 2), check_tensor(device, "z", x.z, dtype, 3, 3);
  check_tensor(device, "delta_bias", x.delta_bias, full, 1, 2);
  check_tensor(device, "initial_state", x.initial_state, states, 3, 3);

  ScanParams s{};
  const int64_t rows = x.u->size(0);
  s.dim = x.u->size(1), s.length = x.u->size(2);
  if (cu_seqlens) {
    EAML_CHECK(device.has(*cu_seqlens) && cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                   cu_seqlens->size(0) > 0 && cu_seqlens->is_contiguous(),
               "selective_scan: cu_seqlens must be a contiguous int32 tensor of shape (sequences + 1,) on ",
               device.name);
    EAML_CHECK(s.length <= INT32_MAX, "selective_scan: u has length ", s.length, ", more than cu_seqlens can hold");
    s.cu_seqlens = data<std::int32_t>(*cu_seqlens), s.num_sequences = cu_seqlens->size(0) - 1;
  }
  s.batch = rows * s.num_sequences, s.saved_chunks = saved_chunks(s);
  s.dstate = x.A->size(x.A->dim() - 1);
  s.groups = 1, s.num_components = num_components(states), s.softplus = softplus, s.gated = x.z.has_value();
  s.B_invariant = B_invariant, s.C_invariant = C_invariant, s.split_invariant = split_invariant;
  check_sizes("delta", x.delta, 0, {rows, s.dim, s.length}), check_sizes("z", x.z, 0, {rows, s.dim, s.length});
  check_sizes("initial_state", x.initial_state, 0, {s.batch, s.dim, s.dstate});
  check_parameter("A", x.A, {s.dim, s.dstate}, rows);
  check_parameter("D", x.D, {s.dim}, rows), check_parameter("delta_bias", x.delta_bias, {s.dim}, rows);
  bool first = true;
  const auto check_matrix = [&](const char* name, const Tensor& t, bool invariant) {
    if (invariant) return check_parameter(name, t, {s.dim, s.dstate}, rows);
    const int64_t groups = t.dim() == 4 ? t.size(1) : 1;
    EAML_CHECK(groups > 0 && s.dim % groups == 0 && (first || groups == s.groups), "selective_scan: ", name, " has ",
               groups, " groups");
    s.groups = groups, first = false;
    check_sizes(name, t, 0, {rows}), check_sizes(name, t, t.dim() - 2, {s.dstate, s.length});
  };
  check_matrix("B", *x.B, B_invariant), check_matrix("C", *x.C, C_invariant);
  if (reset) {
    EAML_CHECK(device.has(*reset) && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2,
               "selective_scan: reset must be a bool tensor of shape (batch, length) on ", device.name);
    check_sizes("reset", reset, 0, {rows, s.length});
    s.reset = data<bool>(*reset), s.reset_outer = reset->stride(0), s.reset_inner = reset->stride(1);
  }
  return s;
}

ScanParams make_step_params(const Device& device, const Tensor& state, const Arguments& x, bool softplus) {
  const ScalarType dtype = opmath_type(x.u->scalar_type()), states = state_type(*x.A, dtype);
  EAML_CHECK(is_kernel_dtype(dtype), "selective_scan_step: u must be floating-point");
  check_tensor(device, "state", state, states, 3, 3), check_tensor(device, "u", x.u, dtype, 2, 2);
  check_tensor(device, "delta", x.delta, dtype, 2, 2);
  check_tensor(device, "A", x.A, states, 2, 3), check_tensor(device, "B", x.B, states, 2, 3);
  check_tensor(device, "C", x.C, states, 2, 3);
  check_tensor(device, "D", x.D, dtype, 1, 2), check_tensor(device, "z", x.z, dtype, 2, 2);
  check_tensor(device, "delta_bias", x.delta_bias, dtype, 1, 2);
  ScanParams s{};
  s.batch = state.size(0), s.dim = state.size(1), s.length = 1, s.dstate = state.size(2);
  s.groups = x.B->dim() == 3 ? x.B->size(1) : 1, s.num_components = num_components(states);
  s.softplus = softplus, s.gated = x.z.has_value();
  EAML_CHECK(s.groups > 0 && s.dim % s.groups == 0, "selective_scan_step: B has ", s.groups, " groups");
  EAML_CHECK((x.C->dim() == 3 ? x.C->size(1) : 1) == s.groups, "selective_scan_step: C has other groups than B");
  check_sizes("u", x.u, 0, {s.batch, s.dim}), check_sizes("delta", x.delta, 0, {s.batch, s.dim});
  check_sizes("z", x.z, 0, {s.batch, s.dim});
  check_parameter("A", x.A, {s.dim, s.dstate}, s.batch);
  check_parameter("D", x.D, {s.dim}, s.batch), check_parameter("delta_bias", x.delta_bias, {s.dim}, s.batch);
  for (const OptionalTensor* t : {&x.B, &x.C})
    check_sizes("B or C", *t, 0, {s.batch}), check_sizes("B or C", *t, (*t)->dim() - 1, {s.dstate});
  return s;
}

void check_cotangents(const Device& device, const ScanParams& s, const Arguments& x, const OptionalTensor& grad_y,
                      const OptionalTensor& grad_state) {
  check_tensor(device, "grad_y", grad_y, x.u->scalar_type(), 3, 3);
  check_tensor(device, "grad_state", grad_state, x.A->scalar_type(), 3, 3);
  check_sizes("grad_y", grad_y, 0, sizes_of(*x.u));
  check_sizes("grad_state", grad_state, 0, {s.batch, s.dim, s.dstate});
}

void check_tangents(const Device& device, const Arguments& x, const Arguments& tangents) {
  const auto check = [&](const char* name, const OptionalTensor& value, const OptionalTensor& tangent) {
    if (!tangent) return;
    EAML_CHECK(value.has_value(), "selective_scan: ", name, " has a tangent but no value");
    check_tensor(device, name, tangent, value->scalar_type(), value->dim(), value->dim());
    check_sizes(name, tangent, 0, sizes_of(*value));
  };
  check("u", x.u, tangents.u), check("delta", x.delta, tangents.delta), check("A", x.A, tangents.A);
  check("B", x.B, tangents.B), check("C", x.C, tangents.C), check("D", x.D, tangents.D), check("z", x.z, tangents.z);
  check("delta_bias", x.delta_bias, tangents.delta_bias);
  check("initial_state", x.initial_state, tangents.initial_state);
}

}  // namespace

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

Tensor empty(const Tensor& like, const Sizes& size) {
  return allocate(like, size);
}

int64_t saved_chunks(const ScanParams& s) {
  return s.cu_seqlens ? s.length / kChunk : std::max<int64_t>((s.length - 1) / kChunk, 0);
}
int64_t saved_size(const ScanParams& s) {
  return std::max<int64_t>(saved_chunks(s), 1) * s.dstate * s.dim;
}

template <class T>
In<T> sequence(const OptionalTensor& t, int64_t num_components) {
  if (!t) return {};
  In<T> in{data<T>(*t), num_components * t->stride(0), num_components * t->stride(1), num_components * t->stride(2)};
  in.half = half_of(t->scalar_type());
  return in;
}

namespace {

// Inputs of one step: (batch, dim), and (batch, [groups,] dstate).
template <class T>
In<T> sequence_step(const OptionalTensor& t) {
  if (!t) return {};
  return {data<T>(*t), t->stride(0), t->stride(1), 0};
}
template <class T>
In<T> matrix_step(const Tensor& t, int64_t n) {
  In<T> in{data<T>(t), n * t.stride(0), n * t.stride(t.dim() - 1), 0};
  if (t.dim() == 3) in.group = n * t.stride(1);
  return in;
}

// A ([tasks,] dim[, dstate]) input; `rank` counts the dimensions after tasks, `n` the real numbers per element.
template <class T>
In<T> parameter(const OptionalTensor& t, int64_t rank, int64_t batch, int64_t n = 1) {
  if (!t) return {};
  const int64_t first = t->dim() - rank;
  In<T> in{data<T>(*t), 0, n * t->stride(first), rank == 2 ? n * t->stride(first + 1) : 0};
  if (first == 1) in.outer = n * t->stride(0), in.rows_per_outer = std::max<int64_t>(batch / t->size(0), 1);
  return in;
}

// B or C: (batch, [groups,] dstate, length), or a parameter where it is invariant in time.
template <class T>
In<T> matrix(const OptionalTensor& t, bool invariant, int64_t batch, int64_t n) {
  if (!t || invariant) return parameter<T>(t, 2, batch, n);
  const int64_t rank = t->dim();
  In<T> in{data<T>(*t), n * t->stride(0), n * t->stride(rank - 2), n * t->stride(rank - 1)};
  if (rank == 4) in.group = n * t->stride(1);
  return in;
}

}  // namespace

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
Out<T> out(const Tensor& t, int64_t num_components) {
  return {mutable_data<T>(t), num_components * t.stride(0), num_components * t.stride(1), num_components * t.stride(2),
          half_of(t.scalar_type())};
}

#define EAML_INSTANTIATE(T)                                       \
  template In<T> sequence(const OptionalTensor&, int64_t);        \
  template Out<T> out(const Tensor&, int64_t);                    \
  template Inputs<T> inputs(const ScanParams&, const Arguments&); \
  template Inputs<T> step_inputs(const ScanParams&, const Tensor&, const Arguments&);
EAML_INSTANTIATE(float)
EAML_INSTANTIATE(double)

namespace {

// Calls f(functions of the device in the precision of u).
template <class F>
auto with_functions(const Device& device, const Arguments& x, F f) {
  return x.u->scalar_type() == ScalarType::Double ? f(device.double_precision) : f(device.single_precision);
}

}  // namespace

ForwardTuple selective_scan(const Device& device, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                            OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state,
                            OptionalTensor reset, OptionalTensor cu_seqlens, bool delta_softplus, bool B_invariant,
                            bool C_invariant, bool split_invariant, bool save) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const ScanParams s =
      make_params(device, x, reset, cu_seqlens, delta_softplus, B_invariant, C_invariant, split_invariant);
  return with_functions(device, x, [&](const auto& f) { return f.forward(s, x, save); });
}

StateTuple selective_scan_step(const Device& device, Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                               OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias, bool delta_softplus) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias};
  const ScanParams s = make_step_params(device, state, x, delta_softplus);
  return with_functions(device, x, [&](const auto& f) { return f.step(s, state, x); });
}

GradientTuple selective_scan_backward(const Device& device, Tensor grad_y, OptionalTensor grad_state, Tensor u,
                                      Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                                      OptionalTensor delta_bias, OptionalTensor initial_state, OptionalTensor reset,
                                      OptionalTensor cu_seqlens, bool delta_softplus, bool B_invariant,
                                      bool C_invariant, bool split_invariant, OptionalTensor saved) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const ScanParams s =
      make_params(device, x, reset, cu_seqlens, delta_softplus, B_invariant, C_invariant, split_invariant);
  check_cotangents(device, s, x, grad_y, grad_state);
  check_tensor(device, "saved", saved, A.scalar_type(), 2, 2);
  check_sizes("saved", saved, 0, {u.size(0), saved_size(s)});
  EAML_CHECK(!saved || saved->is_contiguous(), "selective_scan: saved must be contiguous");
  return with_functions(device, x, [&](const auto& f) { return f.backward(s, x, grad_y, grad_state, saved); });
}

StateTuple selective_scan_jvp(const Device& device, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                              OptionalTensor D, OptionalTensor z, OptionalTensor delta_bias,
                              OptionalTensor initial_state, OptionalTensor u_tangent, OptionalTensor delta_tangent,
                              OptionalTensor A_tangent, OptionalTensor B_tangent, OptionalTensor C_tangent,
                              OptionalTensor D_tangent, OptionalTensor z_tangent, OptionalTensor delta_bias_tangent,
                              OptionalTensor initial_state_tangent, OptionalTensor reset, OptionalTensor cu_seqlens,
                              bool delta_softplus, bool B_invariant, bool C_invariant, bool split_invariant) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Arguments tangents{u_tangent, delta_tangent,      A_tangent,
                           B_tangent, C_tangent,          D_tangent,
                           z_tangent, delta_bias_tangent, initial_state_tangent};
  const ScanParams s =
      make_params(device, x, reset, cu_seqlens, delta_softplus, B_invariant, C_invariant, split_invariant);
  check_tangents(device, x, tangents);
  return with_functions(device, x, [&](const auto& f) { return f.jvp(s, x, tangents); });
}

BackwardJvpTuple selective_scan_backward_jvp(
    const Device& device, Tensor grad_y, OptionalTensor grad_state, OptionalTensor grad_y_tangent,
    OptionalTensor grad_state_tangent, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
    OptionalTensor z, OptionalTensor delta_bias, OptionalTensor initial_state, OptionalTensor u_tangent,
    OptionalTensor delta_tangent, OptionalTensor A_tangent, OptionalTensor B_tangent, OptionalTensor C_tangent,
    OptionalTensor D_tangent, OptionalTensor z_tangent, OptionalTensor delta_bias_tangent,
    OptionalTensor initial_state_tangent, OptionalTensor reset, OptionalTensor cu_seqlens, bool delta_softplus,
    bool B_invariant, bool C_invariant, bool split_invariant, bool outputs) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Arguments tangents{u_tangent, delta_tangent,      A_tangent,
                           B_tangent, C_tangent,          D_tangent,
                           z_tangent, delta_bias_tangent, initial_state_tangent};
  const ScanParams s =
      make_params(device, x, reset, cu_seqlens, delta_softplus, B_invariant, C_invariant, split_invariant);
  check_cotangents(device, s, x, grad_y, grad_state);
  check_cotangents(device, s, x, grad_y_tangent, grad_state_tangent);
  check_tangents(device, x, tangents);
  return with_functions(device, x, [&](const auto& f) {
    return f.backward_jvp(s, x, grad_y, grad_state, tangents, grad_y_tangent, grad_state_tangent, outputs);
  });
}

}  // namespace eaml::selective_scan
