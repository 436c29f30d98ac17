// Tensors in, tensors out: shapes, strides, allocation and threads of the CPU selective scan. No arithmetic but the
// second stage of the reductions.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/arena.h"
#include "selective_scan/cpu_kernel.h"
#include "selective_scan/op.h"

namespace eaml::selective_scan {
namespace {

// Where there are few units for many threads, the states of each are summed up in two parts, which two threads may do,
// and sums over time in several pieces. Both depend on the shape alone, as sums must not depend on threads.
template <class T>
bool few_units(const Shape& s) {
  constexpr int64_t kFewUnits = 4, kWorthwhile = int64_t{1} << 20;
  return s.batch * units<T>(s) < kFewUnits && s.dim * s.length * s.state >= kWorthwhile;
}
template <class T>
int64_t parts(const Shape& s) {
  constexpr int64_t kPartStates = 4;
  return few_units<T>(s) && s.state >= 2 * kPartStates ? 2 : 1;
}
template <class T>
int64_t pieces(const Shape& s) {
  constexpr int64_t kPieceSteps = 2048, kPieces = 32;
  return few_units<T>(s) ? std::clamp<int64_t>(s.length / kPieceSteps, 1, kPieces) : 1;
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
    if (in.carry) in.carry += first * shape.components * shape.dim;
    if (first > 0) in.D = {};
    return in;
  }

  template <class T>
  Outputs<T> of(Outputs<T> out) const {
    for (T** states : {&out.checkpoints, &out.checkpoint_tangents, &out.carry, &out.carry_tangent})
      if (*states) *states += first * shape.components * shape.dim;
    if (out.last_state.data) out.last_state.data += first * out.last_state.inner;
    return out;
  }

  template <class T>
  Gradients<T> of(Gradients<T> out) const {
    const int64_t matrix = first * shape.components, sequence = matrix * shape.length;
    for (const T** states : {&out.checkpoints, &out.checkpoint_tangents})
      if (*states) *states += first * shape.components * shape.dim;
    for (T** states : {&out.carry, &out.carry_tangent})
      if (*states) *states += first * shape.components * shape.dim;
    out.A += matrix, out.initial_state += matrix;
    out.B += shape.B_invariant ? matrix : sequence, out.C += shape.C_invariant ? matrix : sequence;
    return out;
  }
};

// Calls f(index, unit) for `count` jobs on each unit. Threads take the next when they are done with one, whatever range
// they are given: they start, and are disturbed, at different times.
template <class T, class F>
void over_units(const Shape& s, int64_t count, F f) {
  const int64_t total = s.batch * units<T>(s) * count;
  if (total == 0) return;
  std::atomic<int64_t> next{0};
  parallel(total, s.batch * s.dim * s.length * s.state / total, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < total; i = next++) f(i % count, i / count);
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

// A gradient (outer, inner real numbers) that a kernel leaves as partial sums (pieces, outer, middle, inner).
template <class T>
struct Partial {
  Tensor result;
  T* data;  // the result itself where there is nothing to add up
  int64_t pieces, outer, middle, inner;

  Partial(Scratch& scratch, const Tensor& wide, const Maybe& like, int64_t p, int64_t o, int64_t m, int64_t i)
      : result(like ? empty(*like, sizes_of(*like)) : empty(wide, {0})),
        pieces(p),
        outer(like ? o : 0),
        middle(m),
        inner(i) {
    data = like && p * m == 1 ? mutable_data<T>(result) : scratch.take<T>(p * o * m * i);
  }

  Tensor reduced() {
    const int64_t count = outer * middle * inner;
    for (int64_t p = 1; p < pieces; ++p) add(data, data + p * count, count);
    if (outer > 0 && middle == 0) torch::stable::zero_(result);
    if (outer > 0 && middle * pieces > 1) sum_middle(mutable_data<T>(result), data, outer, middle, inner);
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
        initial_state(scratch, *x.A, x.initial_state, 1, s.batch, 1, s.dim * s.state * s.components) {}

  // Summed over the batch rows that share a parameter.
  static Partial<T> over_rows(Scratch& scratch, const Shape& s, const Arguments& x, const Maybe& like, int64_t rank) {
    const int64_t tasks = like && like->dim() > rank ? like->size(0) : 1;
    const int64_t inner = rank == 2 ? s.dim * s.state * s.components : s.dim;
    return {scratch, *x.A, like, pieces<T>(s), tasks, s.batch / tasks, inner};
  }

  // Summed over the channels of a group.
  static Partial<T> over_channels(Scratch& scratch, const Shape& s, const Arguments& x, const Maybe& like,
                                  bool invariant) {
    if (invariant) return over_rows(scratch, s, x, like, 2);
    return {scratch, *x.A, like, 1, s.batch * s.groups, units<T>(s) / s.groups, s.state * s.length * s.components};
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

int64_t chunks(const Shape& s) {
  return (s.length + kChunk - 1) / kChunk;
}

// The kernels on one unit; with tangents, on Duals.
template <class T>
void forward(const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents, const Outputs<T>& out, int64_t unit) {
  if (s.components == 1)
    real_states::forward(s, in, tangents, out, unit, unit + 1);
  else
    complex_states::forward(s, in, tangents, out, unit, unit + 1);
}
template <class T>
void backward(const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents, const Gradients<T>& out, int64_t unit) {
  if (s.components == 1)
    real_states::backward(s, in, tangents, out, unit, unit + 1);
  else
    complex_states::backward(s, in, tangents, out, unit, unit + 1);
}

// What one stretch of time hands to the next, of all rows: states, or their gradients; of a Dual run, tangents too.
template <class T>
struct Carry {
  T* value = nullptr;
  T* tangent = nullptr;
  int64_t size = 0;

  Carry() = default;
  Carry(Scratch& scratch, const Shape& s, bool dual) : size(s.batch * s.all_states * s.components * s.dim) {
    value = scratch.take<T>(size), tangent = dual ? scratch.take<T>(size) : nullptr;
  }
  void fill(T number) const {
    std::fill_n(value, size, number);
    if (tangent) std::fill_n(tangent, size, T(0));
  }
  void copy(const Carry& from) const {
    std::copy_n(from.value, size, value);
    if (tangent) std::copy_n(from.tangent, size, tangent);
  }
  bool same_bits(const Carry& other) const {
    const std::size_t bytes = size * sizeof(T);
    return !std::memcmp(value, other.value, bytes) && (!tangent || !std::memcmp(tangent, other.tangent, bytes));
  }
};

// The first chunk of a piece.
template <class T>
int64_t piece_begin(const Shape& s, int64_t piece) {
  return chunks(s) * piece / pieces<T>(s);
}

// Does the whole length in stretches, each of some pieces, which threads take side by side. All but the first start
// from a guess: what the chunks before them make of zeros. Decays soon forget what a state was, so it is the right one,
// bit for bit; a stretch whose guess was wrong is done once more. False, with nothing done, where a guess is not worth
// its while or uncertain: of states that do not soon decay, or when nothing comes after them that they could be lost
// in. `warm(shape, carry, unit)` takes a carry through some chunks and does nothing else; `run(begin, end, from, to,
// unit)` does pieces [begin, end).
template <class T, class Warm, class Run>
bool in_stretches(Scratch& scratch, const Shape& s, const Inputs<T>& in, bool dual, bool backward, Warm warm, Run run) {
  constexpr int64_t kProbe = 2;  // chunks
  // Halvings until nothing is left: twice the digits, as what differs in the last one may long do so.
  constexpr int64_t kForgotten = 2 * std::numeric_limits<T>::digits;
  const int64_t cut = pieces<T>(s), threads = torch::stable::get_num_threads();
  if (cut < 2 || threads <= s.batch * units<T>(s)) return false;
  int64_t count = std::min(cut, threads);
  const auto first_piece = [&](int64_t i) { return cut * (backward ? count - i - 1 : i) / count; };
  const auto end_piece = [&](int64_t i) { return cut * (backward ? count - i : i + 1) / count; };
  const auto before = [&](int64_t i, int64_t length) {  // the chunks that the scan comes through before stretch i
    Shape part = s;
    const int64_t edge = piece_begin<T>(s, backward ? end_piece(i) : first_piece(i));
    part.first_chunk = backward ? edge : edge - length, part.end_chunk = part.first_chunk + length;
    return part;
  };
  // One for each stretch but the first.
  const auto carries = [&](bool with_tangents, T number) {
    std::vector<Carry<T>> all;
    for (int64_t i = 1; i < count; ++i) all.emplace_back(scratch, s, with_tangents), all.back().fill(number);
    return all;
  };

  const std::vector<Carry<T>> left = carries(false, 1);
  over_units<T>(s, count - 1, [&](int64_t i, int64_t unit) {
    Inputs<T> decays = in;
    decays.B = {}, decays.carry = left[i].value;
    Outputs<T> to;
    to.carry = left[i].value;
    forward<T>(before(i + 1, kProbe), decays, nullptr, to, unit);
  });
  double slowest = 0;
  for (const Carry<T>& decays : left)
    for (int64_t i = 0; i < decays.size; ++i) {
      if (!(std::abs(decays.value[i]) < 1)) return false;
      slowest = std::max<double>(slowest, std::abs(decays.value[i]));
    }
  const int64_t length = kProbe + static_cast<int64_t>(kProbe * kForgotten / -std::log2(slowest));
  constexpr int64_t kWorthwhile = 4;  // times as many chunks done as spent on the guess
  count = std::min(count, chunks(s) / (kWorthwhile * length));
  if (count < 2) return false;

  const std::vector<Carry<T>> guess = carries(dual, 0), other = carries(dual, 1), reached = carries(dual, 0);
  over_units<T>(s, 2 * (count - 1), [&](int64_t i, int64_t unit) {
    warm(before(i / 2 + 1, length), (i % 2 ? other : guess)[i / 2], unit);
  });
  for (int64_t i = 1; i < count; ++i)
    if (!guess[i - 1].same_bits(other[i - 1])) return false;

  const auto stretch = [&](int64_t i, int64_t unit) {
    const Carry<T>& last = other[0];  // of which nobody reads what it leaves
    run(first_piece(i), end_piece(i), i > 0 ? guess[i - 1] : Carry<T>{}, i + 1 < count ? reached[i] : last, unit);
  };
  over_units<T>(s, count, stretch);
  for (int64_t i = 1; i < count; ++i)
    if (!guess[i - 1].same_bits(reached[i - 1])) {
      guess[i - 1].copy(reached[i - 1]);
      over_units<T>(s, 1, [&](int64_t, int64_t unit) { stretch(i, unit); });
    }
  return true;
}

template <class T>
void run_forward(Scratch& scratch, const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents,
                 const Outputs<T>& out) {
  const auto call = [&](const Shape& part, Carry<T> from, Carry<T> to, Outputs<T> outputs, int64_t unit) {
    Inputs<T> x = in, along = tangents ? *tangents : Inputs<T>{};
    x.carry = from.value, along.carry = from.tangent;
    outputs.carry = to.value, outputs.carry_tangent = to.tangent;
    forward<T>(part, x, tangents ? &along : nullptr, outputs, unit);
  };
  const auto warm = [&](const Shape& part, Carry<T> carry, int64_t unit) { call(part, carry, carry, {}, unit); };
  const auto run = [&](int64_t begin, int64_t end, Carry<T> from, Carry<T> to, int64_t unit) {
    Shape part = s;
    part.first_chunk = piece_begin<T>(s, begin), part.end_chunk = piece_begin<T>(s, end);
    call(part, from, part.end_chunk < chunks(s) ? to : Carry<T>{}, out, unit);
  };
  if (in_stretches<T>(scratch, s, in, tangents != nullptr, false, warm, run)) return;

  const int64_t count = s.batch * s.dim * s.length;
  const bool split = apart(s), sum = split && out.y.data;
  Outputs<T> second = out;
  if (sum) second.y.data = scratch.take<T>(count);
  over_units<T>(s, split ? s.parts : 1, [&](int64_t index, int64_t unit) {
    const Part part(s, split, index);
    const Inputs<T> along = tangents ? part.of(*tangents) : Inputs<T>{};
    forward<T>(part.shape, part.of(in), tangents ? &along : nullptr, part.of(index ? second : out), unit);
  });
  if (sum) add(out.y.data, second.y.data, count);
}

template <class T>
void run_backward(Scratch& scratch, const Shape& s, const Inputs<T>& in, const Inputs<T>* tangents,
                  const Gradients<T>& out) {
  const int64_t count = s.batch * s.dim * s.length, channels = s.batch * s.dim, cut = pieces<T>(s);
  const auto call = [&](const Part& part, Carry<T> from, Carry<T> to, Gradients<T> gradients, int64_t unit) {
    Inputs<T> x = in, along = tangents ? *tangents : Inputs<T>{};
    x.carry = from.value, along.carry = from.tangent;
    gradients.carry = to.value, gradients.carry_tangent = to.tangent;
    along = part.of(along);
    backward<T>(part.shape, part.of(x), tangents ? &along : nullptr, part.of(gradients), unit);
  };
  const auto run_pieces = [&](Part part, int64_t begin, int64_t end, Carry<T> from, Carry<T> to,
                              const Gradients<T>& gradients, int64_t unit) {
    for (int64_t piece = end - 1; piece >= begin; --piece, from = to) {
      Gradients<T> of_piece = gradients;
      const int64_t states = piece * channels * s.all_states * s.components;
      of_piece.A += states, of_piece.D += piece * channels, of_piece.delta_bias += piece * channels;
      if (s.B_invariant) of_piece.B += states;
      if (s.C_invariant) of_piece.C += states;
      part.shape.first_chunk = piece_begin<T>(s, piece), part.shape.end_chunk = piece_begin<T>(s, piece + 1);
      call(part, from, to, of_piece, unit);
    }
  };
  const auto warm = [&](const Shape& part, Carry<T> carry, int64_t unit) {
    Gradients<T> none;
    none.checkpoints = out.checkpoints, none.checkpoint_tangents = out.checkpoint_tangents;
    call(Part(part, false, 0), carry, carry, none, unit);
  };
  const auto run = [&](int64_t begin, int64_t end, Carry<T> from, Carry<T> to, int64_t unit) {
    run_pieces(Part(s, false, 0), begin, end, from, to, out, unit);
  };
  if (in_stretches<T>(scratch, s, in, tangents != nullptr, true, warm, run)) return;

  const bool split = apart(s);
  Gradients<T> second = out;
  if (split) {
    for (Out<T>* sequence : {&second.u, &second.delta, &second.z})
      if (sequence->data) sequence->data = scratch.take<T>(count);
    second.delta_bias = scratch.take<T>(cut * channels);
    second.D = scratch.take<T>(cut * channels);  // the same again
  }
  const Carry<T> carry = cut > 1 ? Carry<T>(scratch, s, tangents != nullptr) : Carry<T>{};
  over_units<T>(s, split ? s.parts : 1, [&](int64_t index, int64_t unit) {
    run_pieces(Part(s, split, index), 0, cut, {}, carry, index ? second : out, unit);
  });
  if (!split) return;
  add(out.u.data, second.u.data, count), add(out.delta.data, second.delta.data, count);
  if (out.z.data) add(out.z.data, second.z.data, count);
  add(out.delta_bias, second.delta_bias, cut * channels);
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
