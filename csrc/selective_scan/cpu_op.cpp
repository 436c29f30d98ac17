// Tensors in, tensors out: shapes, strides, allocation and threads of the CPU selective scan. No arithmetic but the
// second stage of the reductions.
#include <algorithm>
#include <atomic>

#include "common/arena.h"
#include "selective_scan/cpu_kernel.h"
#include "selective_scan/op.h"

namespace eaml::selective_scan {
namespace {

// Where there are few units for many threads, the states of each are summed up in two parts, which two threads may do.
// It depends on the shape alone, as sums must not depend on threads.
template <class T>
int64_t parts(const Shape& s) {
  constexpr int64_t kFewUnits = 4, kPartStates = 4, kWorthwhile = int64_t{1} << 20;
  const bool few = s.batch * units<T>(s) < kFewUnits, much = s.dim * s.length * s.state >= kWorthwhile;
  return few && much && s.state >= 2 * kPartStates ? 2 : 1;
}

int64_t parts(const Shape& s, ScalarType dtype) {
  if (half(dtype) != Half::kNone) return 1;
  return dtype == ScalarType::Float ? parts<float>(s) : parts<double>(s);
}

const char* const kDevice = "the CPU";

bool on_device(const Tensor& t) {
  return t.is_cpu();
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
  Tensor y = empty(*x.u, {s.batch, s.dim}), next = empty(state, {s.batch, s.dim, s.state});
  const Outputs<T> to{{mutable_data<T>(y), s.dim, 1, 0}, out<T>(next, s.components)};
  Scratch scratch;
  run_forward<T>(scratch, s, step_inputs<T>(s, state, x), nullptr, to);
  return {y, next};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eaml_ext, CPU, m) {
  register_ops(m);
}

}  // namespace eaml::selective_scan
