// Tensors in, tensors out: shapes, strides, allocation and threads of the CPU selective scan. No arithmetic but the
// second stage of the reductions. Python checks the arguments in full; what is checked here keeps memory safe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "common/arena.h"
#include "common/check.h"
#include "selective_scan/cpu_kernel.h"

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

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Real numbers in one of the tensor's: 2 in a complex one.
int64_t components(ScalarType dtype) {
  return dtype == ScalarType::ComplexFloat || dtype == ScalarType::ComplexDouble ? 2 : 1;
}

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// Chunks that start from a saved state: all but the first.
int64_t saved_chunks(const Shape& s) {
  return std::max<int64_t>((s.length - 1) / kChunk, 0);
}
// Numbers of A's kind in the saved states of a batch row; as _saved_size in eaml_ext/ops/selective_scan.py.
int64_t saved_size(const Shape& s) {
  return std::max<int64_t>(saved_chunks(s), 1) * s.state * s.dim;
}

void check_kind(const char* name, const Maybe& t, ScalarType dtype, int64_t min_rank, int64_t max_rank) {
  if (!t) return;
  EAML_CHECK(t->is_cpu(), "selective_scan: ", name, " must be on the CPU");
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

// Where there are few units for many threads, the states of each are summed up in two parts, which two threads may do.
// It depends on the shape alone, as sums must not depend on threads.
template <class T>
int64_t parts(const Shape& s) {
  constexpr int64_t kFewUnits = 4, kPartStates = 4, kWorthwhile = int64_t{1} << 20;
  const bool few = s.batch * units<T>(s) < kFewUnits, much = s.dim * s.length * s.state >= kWorthwhile;
  return few && much && s.state >= 2 * kPartStates ? 2 : 1;
}

// Of parameters and all arithmetic: sequences alone may be of half precision.
ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}
// Of A, B, C and states, which are of this precision.
ScalarType state_type(const Tensor& A, ScalarType full) {
  if (components(A.scalar_type()) == 1) return full;
  return full == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

Half half(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Half::kBfloat16 : dtype == ScalarType::Half ? Half::kFloat16 : Half::kNone;
}

Shape make_shape(const Arguments& x, const Maybe& reset, bool softplus, bool B_invariant, bool C_invariant) {
  const ScalarType dtype = x.u->scalar_type();
  const ScalarType full = wide(dtype), states = state_type(*x.A, full);
  EAML_CHECK(dtype == full || half(dtype) != Half::kNone, "selective_scan: u must be floating-point");
  check_kind("u", x.u, dtype, 3, 3), check_kind("delta", x.delta, dtype, 3, 3), check_kind("A", x.A, states, 2, 3);
  check_kind("B", x.B, states, B_invariant ? 2 : 3, B_invariant ? 3 : 4);
  check_kind("C", x.C, states, C_invariant ? 2 : 3, C_invariant ? 3 : 4);
  check_kind("D", x.D, full, 1, 2), check_kind("z", x.z, dtype, 3, 3);
  check_kind("delta_bias", x.delta_bias, full, 1, 2), check_kind("initial_state", x.initial_state, states, 3, 3);

  Shape s{};
  s.batch = x.u->size(0), s.dim = x.u->size(1), s.length = x.u->size(2),
  s.state = s.all_states = x.A->size(x.A->dim() - 1);
  s.groups = 1, s.components = components(states), s.softplus = softplus, s.gated = x.z.has_value();
  s.B_invariant = B_invariant, s.C_invariant = C_invariant;
  check_sizes("delta", x.delta, 0, {s.batch, s.dim, s.length}), check_sizes("z", x.z, 0, {s.batch, s.dim, s.length});
  check_sizes("initial_state", x.initial_state, 0, {s.batch, s.dim, s.state});
  check_parameter("A", x.A, {s.dim, s.state}, s.batch);
  check_parameter("D", x.D, {s.dim}, s.batch), check_parameter("delta_bias", x.delta_bias, {s.dim}, s.batch);
  bool first = true;
  const auto check_matrix = [&](const char* name, const Tensor& t, bool invariant) {
    if (invariant) return check_parameter(name, t, {s.dim, s.state}, s.batch);
    const int64_t groups = t.dim() == 4 ? t.size(1) : 1;
    EAML_CHECK(groups > 0 && s.dim % groups == 0 && (first || groups == s.groups), "selective_scan: ", name, " has ",
               groups, " groups");
    s.groups = groups, first = false;
    check_sizes(name, t, 0, {s.batch}), check_sizes(name, t, t.dim() - 2, {s.state, s.length});
  };
  check_matrix("B", *x.B, B_invariant), check_matrix("C", *x.C, C_invariant);
  if (reset) {
    EAML_CHECK(reset->is_cpu() && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2,
               "selective_scan: reset must be a bool tensor of shape (batch, length) on the CPU");
    check_sizes("reset", reset, 0, {s.batch, s.length});
    s.reset = data<bool>(*reset), s.reset_outer = reset->stride(0), s.reset_inner = reset->stride(1);
  }
  s.parts = dtype != full ? 1 : dtype == ScalarType::Float ? parts<float>(s) : parts<double>(s);
  return s;
}

// The shape of one step: tensors as in a scan, but for the dimension of time.
Shape make_step_shape(const Tensor& state, const Arguments& x, bool softplus) {
  const ScalarType dtype = wide(x.u->scalar_type()), states = state_type(*x.A, dtype);
  check_kind("state", state, states, 3, 3), check_kind("u", x.u, dtype, 2, 2),
      check_kind("delta", x.delta, dtype, 2, 2);
  check_kind("A", x.A, states, 2, 3), check_kind("B", x.B, states, 2, 3), check_kind("C", x.C, states, 2, 3);
  check_kind("D", x.D, dtype, 1, 2), check_kind("z", x.z, dtype, 2, 2);
  check_kind("delta_bias", x.delta_bias, dtype, 1, 2);
  Shape s{};
  s.batch = state.size(0), s.dim = state.size(1), s.length = 1, s.state = s.all_states = state.size(2);
  s.groups = x.B->dim() == 3 ? x.B->size(1) : 1, s.components = components(states);
  s.softplus = softplus, s.gated = x.z.has_value();
  EAML_CHECK(s.groups > 0 && s.dim % s.groups == 0, "selective_scan_step: B has ", s.groups, " groups");
  EAML_CHECK((x.C->dim() == 3 ? x.C->size(1) : 1) == s.groups, "selective_scan_step: C has other groups than B");
  check_sizes("u", x.u, 0, {s.batch, s.dim}), check_sizes("delta", x.delta, 0, {s.batch, s.dim});
  check_sizes("z", x.z, 0, {s.batch, s.dim});
  check_parameter("A", x.A, {s.dim, s.state}, s.batch);
  check_parameter("D", x.D, {s.dim}, s.batch), check_parameter("delta_bias", x.delta_bias, {s.dim}, s.batch);
  for (const Maybe* t : {&x.B, &x.C})
    check_sizes("B or C", *t, 0, {s.batch}), check_sizes("B or C", *t, (*t)->dim() - 1, {s.state});
  return s;
}

void check_cotangents(const Shape& s, const Arguments& x, const Maybe& grad_y, const Maybe& grad_state) {
  check_kind("grad_y", grad_y, x.u->scalar_type(), 3, 3);
  check_kind("grad_state", grad_state, x.A->scalar_type(), 3, 3);
  check_sizes("grad_y", grad_y, 0, {s.batch, s.dim, s.length});
  check_sizes("grad_state", grad_state, 0, {s.batch, s.dim, s.state});
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
Inputs<T> inputs(const Shape& s, const Arguments& x) {
  const int64_t n = s.components;
  Inputs<T> in;
  in.u = sequence<T>(x.u), in.delta = sequence<T>(x.delta), in.z = sequence<T>(x.z);
  in.A = parameter<T>(x.A, 2, s.batch, n), in.D = parameter<T>(x.D, 1, s.batch);
  in.delta_bias = parameter<T>(x.delta_bias, 1, s.batch);
  in.B = matrix<T>(x.B, s.B_invariant, s.batch, n), in.C = matrix<T>(x.C, s.C_invariant, s.batch, n);
  in.initial_state = sequence<T>(x.initial_state, n);
  return in;
}

template <class T>
Out<T> out(const Tensor& t, int64_t n = 1) {
  return {mutable_data<T>(t), n * t.stride(0), n * t.stride(1), n * t.stride(2), half(t.scalar_type())};
}

Tensor empty(const Tensor& like, const Sizes& size) {
  return torch::stable::new_empty(like, size);
}

// Calls f on ranges of [0, total), on several threads where a thread gets at least this much work.
template <class F>
void parallel(int64_t total, int64_t work_each, F f) {
  constexpr int64_t kWorthAThread = int64_t{1} << 16;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(work_each, 1));
  if (total <= grain) {
    if (total > 0) f(0, total);
  } else {
    torch::stable::parallel_for(0, total, grain, f);
  }
}

// Whether the parts are calls of their own, which costs an addition of their outputs.
bool apart(const Shape& s) {
  return s.parts > 1 && torch::stable::get_num_threads() > 1;
}

// One part of the problem: its shape, and where its states stand in the arrays.
struct Part {
  Shape shape;
  int64_t first;

  Part(const Shape& s, bool apart, int64_t index) : shape(s), first(0) {
    if (!apart) return;
    first = part_begin(s, index), shape.state = part_begin(s, index + 1) - first, shape.parts = 1;
  }

  template <class T>
  Inputs<T> of(Inputs<T> in) const {
    const auto shift = [&](In<T>& x, int64_t step) { x.data = x.data ? x.data + first * step : nullptr; };
    shift(in.A, in.A.inner), shift(in.initial_state, in.initial_state.inner);
    shift(in.B, shape.B_invariant ? in.B.inner : in.B.channel);
    shift(in.C, shape.C_invariant ? in.C.inner : in.C.channel);
    shift(in.grad_state, in.grad_state.inner);
    if (first > 0) in.D = {};
    return in;
  }

  template <class T>
  Outputs<T> of(Outputs<T> out) const {
    for (T** states : {&out.checkpoints, &out.checkpoint_tangents})
      if (*states) *states += first * shape.components * shape.dim;
    if (out.last_state.data) out.last_state.data += first * out.last_state.inner;
    return out;
  }

  template <class T>
  Gradients<T> of(Gradients<T> out) const {
    const int64_t matrix = first * shape.components, sequence = matrix * shape.length;
    for (const T** states : {&out.checkpoints, &out.checkpoint_tangents})
      if (*states) *states += first * shape.components * shape.dim;
    out.A += matrix, out.initial_state += matrix;
    out.B += shape.B_invariant ? matrix : sequence, out.C += shape.C_invariant ? matrix : sequence;
    return out;
  }
};

// Calls f(part, index, unit, unit + 1) on all units, of all parts if they are calls of their own. Threads take the next
// when they are done with one, whatever range they are given: they start, and are disturbed, at different times.
template <class T, class F>
void over_units(const Shape& s, bool apart, F f) {
  const int64_t count = apart ? s.parts : 1, total = s.batch * units<T>(s) * count;
  if (total == 0) return;
  std::atomic<int64_t> next{0};
  parallel(total, s.batch * s.dim * s.length * s.state / total, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < total; i = next++) f(Part(s, apart, i % count), i % count, i / count, i / count + 1);
  });
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

// Scratch of one call on its own thread, kept for the next: fresh pages would cost a tenth of the backward pass.
class Scratch {
 public:
  Scratch() : arena_(arena()) {}
  ~Scratch() { arena_.reset(); }
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    return arena_.take<T>(count);
  }

 private:
  static Arena& arena() {
    static thread_local Arena a;
    return a;
  }
  Arena& arena_;
};

// A gradient (outer, inner real numbers) that a kernel leaves as partial sums (outer, middle, inner).
template <class T>
struct Partial {
  Tensor result;
  T* data;  // the result itself where there is nothing to add up
  int64_t outer, middle, inner;

  Partial(Scratch& scratch, const Tensor& wide, const Maybe& like, int64_t o, int64_t m, int64_t i)
      : result(like ? empty(*like, sizes_of(*like)) : empty(wide, {0})), outer(like ? o : 0), middle(m), inner(i) {
    data = like && m == 1 ? mutable_data<T>(result) : scratch.take<T>(o * m * i);
  }

  Tensor reduced() {
    if (outer > 0 && middle == 0) torch::stable::zero_(result);
    if (outer > 0 && middle > 1) sum_middle(mutable_data<T>(result), data, outer, middle, inner);
    return result;
  }
};

// All gradients of a call, shaped like its inputs.
template <class T>
struct GradientTensors {
  Tensor u, delta, z;
  Partial<T> A, B, C, D, delta_bias, initial_state;

  GradientTensors(Scratch& scratch, const Shape& s, const Arguments& x)
      : u(torch::stable::empty_like(*x.u)),
        delta(torch::stable::empty_like(*x.delta)),
        z(x.z ? torch::stable::empty_like(*x.z) : empty(*x.u, {0})),
        A(over_rows(scratch, s, x, x.A, 2)),
        B(over_channels(scratch, s, x, x.B, s.B_invariant)),
        C(over_channels(scratch, s, x, x.C, s.C_invariant)),
        D(over_rows(scratch, s, x, x.D, 1)),
        delta_bias(over_rows(scratch, s, x, x.delta_bias, 1)),
        initial_state(scratch, *x.A, x.initial_state, s.batch, 1, s.dim * s.state * s.components) {}

  // Summed over the batch rows that share a parameter.
  static Partial<T> over_rows(Scratch& scratch, const Shape& s, const Arguments& x, const Maybe& like, int64_t rank) {
    const int64_t tasks = like && like->dim() > rank ? like->size(0) : 1;
    return {scratch, *x.A, like, tasks, s.batch / tasks, rank == 2 ? s.dim * s.state * s.components : s.dim};
  }

  // Summed over the channels of a group.
  static Partial<T> over_channels(Scratch& scratch, const Shape& s, const Arguments& x, const Maybe& like,
                                  bool invariant) {
    if (invariant) return over_rows(scratch, s, x, like, 2);
    return {scratch, *x.A, like, s.batch * s.groups, units<T>(s) / s.groups, s.state * s.length * s.components};
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

// The forward kernel; with tangents, on Duals.
template <class T>
void run_forward(Scratch& scratch, const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents,
                 const Outputs<T>& out) {
  const int64_t count = s.batch * s.dim * s.length;
  const bool split = apart(s), sum = split && out.y.data;
  Outputs<T> second = out;
  if (sum) second.y.data = scratch.take<T>(count);
  over_units<T>(s, split, [&](const Part& part, int64_t index, int64_t begin, int64_t end) {
    const Inputs<T> along = tangents ? part.of(*tangents) : Inputs<T>{};
    const Outputs<T> to = part.of(index ? second : out);
    if (s.components == 1)
      real_states::forward(part.shape, part.of(in), tangents ? &along : nullptr, to, begin, end);
    else
      complex_states::forward(part.shape, part.of(in), tangents ? &along : nullptr, to, begin, end);
  });
  if (sum) add(out.y.data, second.y.data, count);
}

template <class T>
void run_backward(Scratch& scratch, const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents,
                  const Gradients<T>& out) {
  const int64_t count = s.batch * s.dim * s.length, channels = s.batch * s.dim;
  const bool split = apart(s);
  Gradients<T> second = out;
  if (split) {
    for (Out<T>* sequence : {&second.u, &second.delta, &second.z})
      if (sequence->data) sequence->data = scratch.take<T>(count);
    second.delta_bias = scratch.take<T>(channels);
    second.D = scratch.take<T>(channels);  // the same again
  }
  over_units<T>(s, split, [&](const Part& part, int64_t index, int64_t begin, int64_t end) {
    const Inputs<T> along = tangents ? part.of(*tangents) : Inputs<T>{};
    const Gradients<T> to = part.of(index ? second : out);
    if (s.components == 1)
      real_states::backward(part.shape, part.of(in), tangents ? &along : nullptr, to, begin, end);
    else
      complex_states::backward(part.shape, part.of(in), tangents ? &along : nullptr, to, begin, end);
  });
  if (!split) return;
  add(out.u.data, second.u.data, count), add(out.delta.data, second.delta.data, count);
  if (out.z.data) add(out.z.data, second.z.data, count);
  add(out.delta_bias, second.delta_bias, channels);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run(const Shape& s, const Arguments& x, bool save) {
  Scratch scratch;
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.state});
  Tensor saved = empty(*x.A, save ? Sizes{s.batch, saved_size(s)} : Sizes{0});
  if (save && saved_chunks(s) == 0) torch::stable::zero_(saved);
  const Outputs<T> to{out<T>(y), out<T>(last, s.components), save ? mutable_data<T>(saved) : nullptr};
  run_forward<T>(scratch, s, inputs<T>(s, x), nullptr, to);
  return {y, last, saved};
}

template <class T>
GradientTuple run_vjp(const Shape& s, const Arguments& x, const Tensor& grad_y, const Maybe& grad_state,
                      const Maybe& saved) {
  Scratch scratch;
  Inputs<T> in = inputs<T>(s, x);
  in.grad_y = sequence<T>(grad_y), in.grad_state = sequence<T>(grad_state, s.components);
  GradientTensors<T> gradients(scratch, s, x);
  Gradients<T> to = gradients.pointers(x);
  if (saved) {
    to.checkpoints = data<T>(*saved);
  } else {
    T* const states = scratch.take<T>(s.batch * saved_size(s) * s.components);
    if (saved_chunks(s) > 0) run_forward<T>(scratch, s, in, nullptr, {{}, {}, states});
    to.checkpoints = states;
  }
  run_backward<T>(scratch, s, in, nullptr, to);
  return gradients.reduced();
}

template <class T>
std::tuple<Tensor, Tensor> run_jvp(const Shape& s, const Arguments& x, const Arguments& tangents) {
  Scratch scratch;
  const Inputs<T> along = inputs<T>(s, tangents);
  Tensor y = torch::stable::empty_like(*x.u), last = empty(*x.A, {s.batch, s.dim, s.state});
  run_forward<T>(scratch, s, inputs<T>(s, x), &along, {out<T>(y), out<T>(last, s.components)});
  return {y, last};
}

template <class T>
JvpTuple run_vjp_jvp(const Shape& s, const Arguments& x, const Tensor& grad_y, const Maybe& grad_state,
                     const Arguments& tangents, const Maybe& grad_y_tangent, const Maybe& grad_state_tangent,
                     bool outputs) {
  Inputs<T> in = inputs<T>(s, x), along = inputs<T>(s, tangents);
  in.grad_y = sequence<T>(grad_y), in.grad_state = sequence<T>(grad_state, s.components);
  along.grad_y = sequence<T>(grad_y_tangent), along.grad_state = sequence<T>(grad_state_tangent, s.components);
  Tensor y = outputs ? torch::stable::empty_like(*x.u) : empty(*x.u, {0});
  Tensor last = empty(*x.A, outputs ? Sizes{s.batch, s.dim, s.state} : Sizes{0});
  Scratch scratch;
  const int64_t count = s.batch * saved_size(s) * s.components;
  Outputs<T> first{{}, {}, scratch.take<T>(count), scratch.take<T>(count)};
  if (outputs) first.y = out<T>(y), first.last_state = out<T>(last, s.components);
  if (outputs || saved_chunks(s) > 0) run_forward<T>(scratch, s, in, &along, first);
  GradientTensors<T> gradients(scratch, s, x);
  Gradients<T> to = gradients.pointers(x);
  to.checkpoints = first.checkpoints, to.checkpoint_tangents = first.checkpoint_tangents;
  run_backward<T>(scratch, s, in, &along, to);
  return std::tuple_cat(std::make_tuple(y, last), gradients.reduced());
}

template <class T>
std::tuple<Tensor, Tensor> run_step(const Shape& s, const Tensor& state, const Arguments& x) {
  Inputs<T> in;
  in.u = sequence_step<T>(x.u), in.delta = sequence_step<T>(x.delta), in.z = sequence_step<T>(x.z);
  in.A = parameter<T>(x.A, 2, s.batch, s.components), in.D = parameter<T>(x.D, 1, s.batch);
  in.delta_bias = parameter<T>(x.delta_bias, 1, s.batch);
  in.B = matrix_step<T>(*x.B, s.components), in.C = matrix_step<T>(*x.C, s.components);
  in.initial_state = sequence<T>(state, s.components);
  Tensor y = empty(*x.u, {s.batch, s.dim}), next = empty(state, {s.batch, s.dim, s.state});
  const Outputs<T> to{{mutable_data<T>(y), s.dim, 1, 0}, out<T>(next, s.components)};
  Scratch scratch;
  run_forward<T>(scratch, s, in, nullptr, to);
  return {y, next};
}

bool single(const Arguments& x) {
  return x.u->scalar_type() != ScalarType::Double;
}

// The ops. Their schemas, and what they compute, stand in eaml_ext/ops/selective_scan.py.

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Maybe D,
                                                  Maybe z, Maybe delta_bias, Maybe initial_state, Maybe reset,
                                                  bool delta_softplus, bool B_invariant, bool C_invariant, bool save) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Shape s = make_shape(x, reset, delta_softplus, B_invariant, C_invariant);
  return single(x) ? run<float>(s, x, save) : run<double>(s, x, save);
}

std::tuple<Tensor, Tensor> selective_scan_step(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                               Maybe D, Maybe z, Maybe delta_bias, bool delta_softplus) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias};
  const Shape s = make_step_shape(state, x, delta_softplus);
  return single(x) ? run_step<float>(s, state, x) : run_step<double>(s, state, x);
}

GradientTuple selective_scan_backward(Tensor grad_y, Maybe grad_state, Tensor u, Tensor delta, Tensor A, Tensor B,
                                      Tensor C, Maybe D, Maybe z, Maybe delta_bias, Maybe initial_state, Maybe reset,
                                      bool delta_softplus, bool B_invariant, bool C_invariant, Maybe saved) {
  const Arguments x{u, delta, A, B, C, D, z, delta_bias, initial_state};
  const Shape s = make_shape(x, reset, delta_softplus, B_invariant, C_invariant);
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
  const Shape s = make_shape(x, reset, delta_softplus, B_invariant, C_invariant);
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
  const Shape s = make_shape(x, reset, delta_softplus, B_invariant, C_invariant);
  check_cotangents(s, x, grad_y, grad_state), check_cotangents(s, x, grad_y_tangent, grad_state_tangent);
  check_tangents(x, tangents);
  return single(x)
             ? run_vjp_jvp<float>(s, x, grad_y, grad_state, tangents, grad_y_tangent, grad_state_tangent, outputs)
             : run_vjp_jvp<double>(s, x, grad_y, grad_state, tangents, grad_y_tangent, grad_state_tangent, outputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_step", TORCH_BOX(&selective_scan_step));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
  m.impl("selective_scan_jvp", TORCH_BOX(&selective_scan_jvp));
  m.impl("selective_scan_backward_jvp", TORCH_BOX(&selective_scan_backward_jvp));
}

}  // namespace eaml::selective_scan
