// CPU kernels: lanes are channels, so there is no horizontal sum per step and the exponential runs at full vector width.
// A unit of work is one batch row times kBlocksPerUnit blocks of lanes. Time is walked in chunks: inputs of a chunk are
// staged as [step][lane] tiles, states are taken kStates at a time. Backward walks the chunks from the last to the
// first and recomputes each from the state saved at its start.
#include "selective_scan/cpu_kernel.h"

#include <algorithm>
#include <type_traits>

#include "common/arena.h"
#include "common/simd.h"
#include "selective_scan/recurrence.h"

namespace eaml::selective_scan {
namespace {

using std::int64_t;

constexpr int kStates = 4;  // states in flight: enough independent chains, few enough registers

template <class S>
constexpr bool kIsDual = !std::is_same_v<S, scalar_t<S>>;

// An array of scalars; a Dual's values and tangents are two arrays, so that each loads as a vector.
template <class S>
struct Span {
  S* value;
  EAML_INLINE S get(int64_t i) const { return value[i]; }
  EAML_INLINE void set(int64_t i, S x) const { value[i] = x; }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset}; }
  EAML_INLINE S* written() const { return value; }
};
template <class T>
struct Span<Dual<T>> {
  T* value;
  T* tangent;
  EAML_INLINE Dual<T> get(int64_t i) const { return {value[i], tangent[i]}; }
  EAML_INLINE void set(int64_t i, Dual<T> x) const { value[i] = x.value, tangent[i] = x.tangent; }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset, tangent + offset}; }
  EAML_INLINE T* written() const { return tangent; }  // what leaves the kernel of a Dual run
};

template <class S>
Span<S> take(Arena& arena, int64_t count) {
  if constexpr (kIsDual<S>)
    return {arena.take<scalar_t<S>>(count), arena.take<scalar_t<S>>(count)};
  else
    return {arena.take<S>(count)};
}

template <class S>
EAML_INLINE void clear(Span<S> span, int64_t count) {
  std::fill_n(span.value, count, scalar_t<S>(0));
  if constexpr (kIsDual<S>) std::fill_n(span.tangent, count, scalar_t<S>(0));
}

template <class S>
EAML_INLINE void copy(Span<S> to, Span<S> from, int64_t count) {
  EAML_IVDEP
  for (int64_t i = 0; i < count; ++i) to.set(i, from.get(i));
}

// The inputs of a run on S: values, and for duals their tangents.
template <class S>
struct Source {
  using T = scalar_t<S>;
  const Inputs<T>& values;
  const Inputs<T>* tangents;

  // Calls f(destination array, input) for the values and, on duals, for the tangents.
  template <class F>
  EAML_INLINE void each(In<T> Inputs<T>::* member, Span<S> to, F f) const {
    f(to.value, values.*member);
    if constexpr (kIsDual<S>) f(to.tangent, tangents->*member);
  }
};

// Which part of the problem a unit is.
struct Place {
  int64_t row, group, unit, first, channels;  // unit counts within the row; `channels` from `first` on
};

template <class T>
int64_t units_per_group(const Shape& shape) {
  const int64_t width = kLanes<T> * kBlocksPerUnit, dim = shape.dim / shape.groups;
  return (dim + width - 1) / width;
}

template <class T>
Place place(const Shape& shape, int64_t index) {
  const int64_t per_group = units_per_group<T>(shape), per_row = per_group * shape.groups;
  const int64_t width = kLanes<T> * kBlocksPerUnit, dim = shape.dim / shape.groups;
  Place p;
  p.row = index / per_row, p.unit = index % per_row, p.group = p.unit / per_group;
  const int64_t offset = p.unit % per_group * width;
  p.first = p.group * dim + offset, p.channels = std::min(width, dim - offset);
  return p;
}

template <class T>
EAML_INLINE const T* origin(const In<T>& in, int64_t row, int64_t channel) {
  return in.data + row / in.rows_per_outer * in.outer + channel * in.channel;
}

// tile[step][lane] = in[row][channel + lane][start + step], zeros beyond `lanes`.
template <class T>
EAML_INLINE void stage_tile(T* tile, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t start,
                            int64_t steps) {
  constexpr int64_t W = kLanes<T>;
  if (in.data == nullptr) return (void)std::fill_n(tile, steps * W, T(0));
  const T* from = origin(in, row, channel) + start * in.inner;
  if (lanes == W && in.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) tile[t * W + i] = from[t * in.inner + i];
    }
    return;
  }
  if (lanes < W) std::fill_n(tile, steps * W, T(0));
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t i = 0; i < lanes; ++i) tile[t * W + i] = from[t * in.inner + i * in.channel];
}

template <class T>
EAML_INLINE void store_tile(const Out<T>& out, const T* tile, int64_t row, int64_t channel, int64_t lanes,
                            int64_t start, int64_t steps) {
  constexpr int64_t W = kLanes<T>;
  if (out.data == nullptr) return;
  T* to = out.data + row * out.outer + channel * out.channel + start * out.inner;
  if (lanes == W && out.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) to[t * out.inner + i] = tile[t * W + i];
    }
    return;
  }
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t i = 0; i < lanes; ++i) to[t * out.inner + i * out.channel] = tile[t * W + i];
}

// matrix[state][lane] of a (rows, dim, state) input, zeros beyond `lanes` and beyond the true state count.
template <class T>
EAML_INLINE void stage_matrix(T* matrix, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t state,
                              int64_t padded, T scale = T(1)) {
  constexpr int64_t W = kLanes<T>;
  std::fill_n(matrix, padded * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n) matrix[n * W + i] = from[i * in.channel + n * in.inner] * scale;
}

template <class T>
EAML_INLINE void store_matrix(T* to, int64_t channel_stride, int64_t inner_stride, const T* matrix, int64_t lanes,
                              int64_t state) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n) to[i * channel_stride + n * inner_stride] = matrix[n * W + i];
}

// One value per lane of a (rows, dim) input.
template <class T>
EAML_INLINE void stage_vector(T* vector, const In<T>& in, int64_t row, int64_t channel, int64_t lanes) {
  std::fill_n(vector, kLanes<T>, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  for (int64_t i = 0; i < lanes; ++i) vector[i] = from[i * in.channel];
}

// The saved states (batch, chunks, state, dim) at the start of a chunk, as an input.
template <class T>
In<T> checkpoint(const T* all, const Shape& shape, int64_t row, int64_t chunk) {
  const int64_t chunks = (shape.length + kChunk - 1) / kChunk;
  return {all + (row * chunks + chunk) * shape.state * shape.dim, 0, 1, shape.dim};
}

// Sum over lanes in a fixed tree.
template <class T>
EAML_INLINE T lane_sum(const T* lanes) {
  T s[kLanes<T>];
  EAML_IVDEP
  for (int i = 0; i < kLanes<T>; ++i) s[i] = lanes[i];
  EAML_UNROLL
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    EAML_UNROLL
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

// B or C of one chunk: [step][state], the same for every lane, or (kLane) [step][state][lane] with step stride 0 when
// invariant in time.
template <class S, bool kLane>
struct Operand {
  Span<S> data;
  int64_t step;
  EAML_INLINE S get(int64_t t, int64_t n, int64_t lane) const {
    return data.get(kLane ? t * step + n * kLanes<scalar_t<S>> + lane : t * step + n);
  }
  EAML_INLINE Operand states_from(int64_t n) const { return {data.at(kLane ? n * kLanes<scalar_t<S>> : n), step}; }
};

// The part of a unit's scratch memory that forward and backward share, and how it is filled.
template <class S, bool kLane>
struct Unit {
  using T = scalar_t<S>;
  static constexpr int64_t W = kLanes<T>;

  const Shape& shape;
  const Source<S>& source;
  Place at;
  int64_t padded;                    // states, rounded up to whole groups of kStates
  Span<S> A2, D, bias;               // [block][state][lane], [block][lane]
  Operand<S, kLane> B, C;            // of the current chunk (invariant: of the current block)
  Span<S> u, dt, x, y, z;            // tiles of the current chunk and block
  unsigned char reset[kChunk] = {};  // of the current chunk

  Unit(Arena& arena, const Shape& s, const Source<S>& src, int64_t index)
      : shape(s), source(src), at(place<T>(s, index)), padded((s.state + kStates - 1) / kStates * kStates) {
    A2 = take<S>(arena, blocks() * padded * W);
    D = take<S>(arena, blocks() * W);
    bias = take<S>(arena, blocks() * W);
    for (int64_t block = 0; block < blocks(); ++block) {
      source.each(&Inputs<T>::A, A2.at(block * padded * W), [&](T* to, const In<T>& in) {
        stage_matrix(to, in, at.row, channel(block), lanes(block), shape.state, padded, T(kLog2e));
      });
      source.each(&Inputs<T>::D, D.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector(to, in, at.row, channel(block), lanes(block)); });
      source.each(&Inputs<T>::delta_bias, bias.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector(to, in, at.row, channel(block), lanes(block)); });
    }
    const int64_t operand = kLane ? kChunk * padded * W : kChunk * padded;
    B.data = take<S>(arena, operand), C.data = take<S>(arena, operand);
    B.step = kLane ? (shape.B_invariant ? 0 : padded * W) : padded;
    C.step = kLane ? (shape.C_invariant ? 0 : padded * W) : padded;
    for (Span<S>* tile : {&u, &dt, &x, &y, &z}) *tile = take<S>(arena, kChunk * W);
  }

  int64_t blocks() const { return (at.channels + W - 1) / W; }
  int64_t lanes(int64_t block) const { return std::min(W, at.channels - block * W); }
  int64_t channel(int64_t block) const { return at.first + block * W; }

  // What all blocks of the unit share in a chunk: resets, and B and C where they vary in time.
  EAML_INLINE void stage_chunk(int64_t start, int64_t steps) {
    if (shape.reset)
      for (int64_t t = 0; t < steps; ++t)
        reset[t] = shape.reset[at.row * shape.reset_outer + (start + t) * shape.reset_inner];
    if (!shape.B_invariant) stage_variable(&Inputs<T>::B, B, start, steps);
    if (!shape.C_invariant) stage_variable(&Inputs<T>::C, C, start, steps);
  }

  EAML_INLINE void stage_variable(In<T> Inputs<T>::* member, const Operand<S, kLane>& operand, int64_t start,
                                  int64_t steps) {
    constexpr int64_t copies = kLane ? W : 1;
    source.each(member, operand.data, [&](T* to, const In<T>& in) EAML_LAMBDA {
      if (in.data == nullptr || padded != shape.state) std::fill_n(to, steps * padded * copies, T(0));
      if (in.data == nullptr) return;
      const T* from = in.data + at.row * in.outer + at.group * in.group + start * in.inner;
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t n = 0; n < shape.state; ++n) {
          const T value = from[n * in.channel + t * in.inner];
          for (int64_t i = 0; i < copies; ++i) to[(t * padded + n) * copies + i] = value;
        }
    });
  }

  EAML_INLINE void stage_invariant(int64_t block) {
    const auto stage = [&](In<T> Inputs<T>::* member, const Operand<S, kLane>& operand) {
      source.each(member, operand.data, [&](T* to, const In<T>& in) {
        stage_matrix(to, in, at.row, channel(block), lanes(block), shape.state, padded);
      });
    };
    if (shape.B_invariant) stage(&Inputs<T>::B, B);
    if (shape.C_invariant) stage(&Inputs<T>::C, C);
  }

  EAML_INLINE void stage(In<T> Inputs<T>::* member, Span<S> tile, int64_t block, int64_t start, int64_t steps) {
    source.each(member, tile, [&](T* to, const In<T>& in) EAML_LAMBDA {
      stage_tile(to, in, at.row, channel(block), lanes(block), start, steps);
    });
  }

  // u, dt = softplus(delta + bias), x = dt u; with `slope`, also d dt / d delta.
  EAML_INLINE void stage_block(int64_t block, int64_t start, int64_t steps, const Span<S>* slope) {
    if constexpr (kLane) stage_invariant(block);
    stage(&Inputs<T>::u, u, block, start, steps);
    stage(&Inputs<T>::delta, dt, block, start, steps);
    const Span<S> dt_ = dt, u_ = u, x_ = x, offset = bias.at(block * W);
    for (int64_t t = 0; t < steps; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) dt_.set(t * W + i, dt_.get(t * W + i) + offset.get(i));
    }
    if (shape.softplus) {
      if (slope) {
        const Span<S> slope_ = *slope;
        EAML_IVDEP
        for (int64_t j = 0; j < steps * W; ++j) slope_.set(j, sigmoid(dt_.get(j)));
      }
      EAML_IVDEP
      for (int64_t j = 0; j < steps * W; ++j) dt_.set(j, softplus(dt_.get(j)));
    }
    EAML_IVDEP
    for (int64_t j = 0; j < steps * W; ++j) x_.set(j, dt_.get(j) * u_.get(j));
  }

  // y = D u, where the sum over states starts.
  EAML_INLINE void start_y(int64_t block, int64_t steps) {
    const Span<S> d = D.at(block * W), u_ = u, y_ = y;
    for (int64_t t = 0; t < steps; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) y_.set(t * W + i, d.get(i) * u_.get(t * W + i));
    }
  }
};

// Advances kStates states of one block through a chunk and adds C h to y.
template <class S, bool kLane>
EAML_INLINE void forward_states(int64_t steps, const unsigned char* reset, Span<S> A2, Span<S> h, Span<S> dt,
                                Span<S> x, Operand<S, kLane> B, Operand<S, kLane> C, Span<S> y) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>;
  for (int64_t t = 0; t < steps; ++t) {
    if (reset[t]) clear(h, kStates * W);
    EAML_IVDEP
    for (int64_t i = 0; i < W; ++i) {
      const S step = dt.get(t * W + i), input = x.get(t * W + i);
      S sum = y.get(t * W + i);
      EAML_UNROLL
      for (int n = 0; n < kStates; ++n) {
        const S next = advance(decay(step, A2.get(n * W + i)), h.get(n * W + i), input, B.get(t, n, i));
        h.set(n * W + i, next);
        sum = sum + C.get(t, n, i) * next;
      }
      y.set(t * W + i, sum);
    }
  }
}

template <class S, bool kLane>
EAML_INLINE void forward_unit(Arena& arena, const Shape& shape, const Source<S>& source,
                              const Outputs<scalar_t<S>>& out, int64_t index) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>;
  Unit<S, kLane> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, chunks = (shape.length + kChunk - 1) / kChunk;
  const Span<S> h = take<S>(arena, unit.blocks() * size);
  T* const tile = arena.take<T>(kChunk * W);
  for (int64_t block = 0; block < unit.blocks(); ++block)
    source.each(&Inputs<T>::initial_state, h.at(block * size), [&](T* to, const In<T>& in) {
      stage_matrix(to, in, row, unit.channel(block), unit.lanes(block), shape.state, unit.padded);
    });
  const auto save = [&](T* all, const T* matrix, int64_t chunk, int64_t block) {
    if (all == nullptr) return;
    T* to = all + (row * chunks + chunk) * shape.state * shape.dim + unit.channel(block);
    store_matrix(to, 1, shape.dim, matrix, unit.lanes(block), shape.state);
  };

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, shape.length - start);
    unit.stage_chunk(start, steps);
    for (int64_t block = 0; block < unit.blocks(); ++block) {
      const Span<S> state = h.at(block * size);
      save(out.checkpoints, state.value, chunk, block);
      if constexpr (kIsDual<S>) save(out.checkpoint_tangents, state.tangent, chunk, block);
      unit.stage_block(block, start, steps, nullptr);
      unit.start_y(block, steps);
      for (int64_t n = 0; n < unit.padded; n += kStates)
        forward_states(steps, unit.reset, unit.A2.at(block * size + n * W), state.at(n * W), unit.dt, unit.x,
                       unit.B.states_from(n), unit.C.states_from(n), unit.y);
      const Span<S> y = unit.y, z = unit.z;
      if (shape.gated) {
        unit.stage(&Inputs<T>::z, z, block, start, steps);
        EAML_IVDEP
        for (int64_t j = 0; j < steps * W; ++j) tile[j] = output(y.get(j) * (z.get(j) * sigmoid(z.get(j))));
      }
      store_tile(out.y, shape.gated ? tile : y.written(), row, unit.channel(block), unit.lanes(block), start, steps);
    }
  }

  if (out.last_state.data == nullptr) return;
  for (int64_t block = 0; block < unit.blocks(); ++block) {
    const Out<T>& to = out.last_state;
    store_matrix(to.data + row * to.outer + unit.channel(block) * to.channel, to.channel, to.inner,
                 h.at(block * size).written(), unit.lanes(block), shape.state);
  }
}

// The gradients that backward accumulates; plain numbers, also in a Dual run, where they are tangents.
template <class T>
struct Sums {
  T *A, *B, *C;            // [state][lane]; [step][state][lane]
  int64_t B_step, C_step;  // 0 where B, C are invariant in time: all steps add to one place
};

// Tiles of gradients of one chunk and block.
template <class S>
struct GradientTiles {
  Span<S> y, x, dt;  // in; sums over states of dL/dx, and of dL/d(dt A2) A2 / ln 2
};

// Takes kStates states of one block back through a chunk, from the states at its start.
template <class S, bool kLane>
EAML_INLINE void backward_states(int64_t steps, const unsigned char* reset, bool gated, Span<S> A2, Span<S> h0,
                                 Span<S> dt, Span<S> x, Operand<S, kLane> B, Operand<S, kLane> C, Span<S> y,
                                 Span<S> grad_h, GradientTiles<S> grad, Span<S> decays, Span<S> states, Span<S> zeros,
                                 Sums<scalar_t<S>> sums) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>, size = kStates * W;

  Span<S> previous = h0;
  for (int64_t t = 0; t < steps; ++t) {
    if (reset[t]) previous = zeros;
    const Span<S> current = states.at(t * size), a_t = decays.at(t * size);
    EAML_IVDEP
    for (int64_t i = 0; i < W; ++i) {
      const S step = dt.get(t * W + i), input = x.get(t * W + i);
      EAML_UNROLL
      for (int n = 0; n < kStates; ++n) {
        const S a = decay(step, A2.get(n * W + i));
        a_t.set(n * W + i, a);
        current.set(n * W + i, advance(a, previous.get(n * W + i), input, B.get(t, n, i)));
      }
    }
    if (gated) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) {
        S sum = y.get(t * W + i);
        EAML_UNROLL
        for (int n = 0; n < kStates; ++n) sum = sum + C.get(t, n, i) * current.get(n * W + i);
        y.set(t * W + i, sum);
      }
    }
    previous = current;
  }

  for (int64_t t = steps - 1; t >= 0; --t) {
    const Span<S> before = reset[t] ? zeros : t == 0 ? h0 : states.at((t - 1) * size);
    const Span<S> current = states.at(t * size), a_t = decays.at(t * size);
    T* const sum_A = sums.A;
    T* const sum_B = sums.B + t * sums.B_step;
    T* const sum_C = sums.C + t * sums.C_step;
    EAML_IVDEP
    for (int64_t i = 0; i < W; ++i) {
      const S gy = grad.y.get(t * W + i), step = dt.get(t * W + i), input = x.get(t * W + i);
      S gx = grad.x.get(t * W + i), gdt = grad.dt.get(t * W + i);
      EAML_UNROLL
      for (int n = 0; n < kStates; ++n) {
        const int64_t j = n * W + i;
        const StepGradient<S> g = step_backward(grad_h.get(j), gy, a_t.get(j), before.get(j), current.get(j), input,
                                                B.get(t, n, i), C.get(t, n, i));
        grad_h.set(j, g.h_prev);
        sum_C[j] += output(g.C);
        sum_B[j] += output(g.B);
        gx = gx + g.x;
        gdt = gdt + g.dt_A2 * A2.get(j);
        sum_A[j] += output(g.dt_A2 * step);
      }
      grad.x.set(t * W + i, gx);
      grad.dt.set(t * W + i, gdt);
    }
    if (reset[t]) clear(grad_h, size);
  }
}

template <class S, bool kLane>
EAML_INLINE void backward_unit(Arena& arena, const Shape& shape, const Source<S>& source,
                               const Gradients<scalar_t<S>>& out, int64_t index) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>;
  Unit<S, kLane> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, blocks = unit.blocks();
  const int64_t chunks = (shape.length + kChunk - 1) / kChunk;

  const Span<S> grad_h = take<S>(arena, blocks * size), h0 = take<S>(arena, size);
  const Span<S> zeros = take<S>(arena, kStates * W);
  const Span<S> decays = take<S>(arena, kChunk * kStates * W), states = take<S>(arena, kChunk * kStates * W);
  const Span<S> grad_out = take<S>(arena, kChunk * W), slope = take<S>(arena, kChunk * W);
  const Span<S> ungated = shape.gated ? take<S>(arena, kChunk * W) : grad_out;
  const GradientTiles<S> grad{ungated, take<S>(arena, kChunk * W), take<S>(arena, kChunk * W)};
  const auto zeroed = [&](int64_t count) {
    T* const sum = arena.take<T>(count);
    std::fill_n(sum, count, T(0));
    return sum;
  };
  T* const sum_A = zeroed(blocks * size);
  T* const sum_B = zeroed((shape.B_invariant ? blocks : kChunk) * size);
  T* const sum_C = zeroed((shape.C_invariant ? blocks : kChunk) * size);
  T* const sum_D = zeroed(blocks * W);
  T* const sum_bias = zeroed(blocks * W);
  T* const tile_u = arena.take<T>(kChunk * W);
  T* const tile_delta = arena.take<T>(kChunk * W);
  T* const tile_z = arena.take<T>(kChunk * W);
  clear(zeros, kStates * W);
  for (int64_t block = 0; block < blocks; ++block)
    source.each(&Inputs<T>::grad_state, grad_h.at(block * size), [&](T* to, const In<T>& in) {
      stage_matrix(to, in, row, unit.channel(block), unit.lanes(block), shape.state, unit.padded);
    });

  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, shape.length - start), count = steps * W;
    unit.stage_chunk(start, steps);
    if (!shape.B_invariant) std::fill_n(sum_B, steps * size, T(0));
    if (!shape.C_invariant) std::fill_n(sum_C, steps * size, T(0));

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = unit.channel(block), lanes = unit.lanes(block);
      unit.stage_block(block, start, steps, &slope);
      const Span<S> u = unit.u, dt = unit.dt, y = unit.y, z = unit.z;
      unit.stage(&Inputs<T>::grad_y, grad_out, block, start, steps);
      if (shape.gated) {
        unit.stage(&Inputs<T>::z, z, block, start, steps);
        unit.start_y(block, steps);
        EAML_IVDEP
        for (int64_t j = 0; j < count; ++j) ungated.set(j, grad_out.get(j) * (z.get(j) * sigmoid(z.get(j))));
      }
      stage_matrix(h0.value, checkpoint(out.checkpoints, shape, row, chunk), 0, channel, lanes, shape.state,
                   unit.padded);
      if constexpr (kIsDual<S>)
        stage_matrix(h0.tangent, checkpoint(out.checkpoint_tangents, shape, row, chunk), 0, channel, lanes,
                     shape.state, unit.padded);
      clear(grad.x, count);
      clear(grad.dt, count);

      for (int64_t n = 0; n < unit.padded; n += kStates) {
        const int64_t j = block * size + n * W;
        const Sums<T> sums{sum_A + j, sum_B + (shape.B_invariant ? j : n * W),
                           sum_C + (shape.C_invariant ? j : n * W), shape.B_invariant ? 0 : size,
                           shape.C_invariant ? 0 : size};
        backward_states(steps, unit.reset, shape.gated, unit.A2.at(j), h0.at(n * W), dt, unit.x,
                        unit.B.states_from(n), unit.C.states_from(n), y, grad_h.at(j), grad, decays, states, zeros,
                        sums);
      }

      const Span<S> d = unit.D.at(block * W);
      if (!shape.softplus) {
        EAML_IVDEP
        for (int64_t j = 0; j < count; ++j) slope.set(j, S(T(1)));
      }
      for (int64_t t = 0; t < steps; ++t) {
        EAML_IVDEP
        for (int64_t i = 0; i < W; ++i) {
          const int64_t j = t * W + i, k = block * W + i;
          const S gx = grad.x.get(j), gy = grad.y.get(j), input = u.get(j);
          const S gdelta = (S(T(kLn2)) * grad.dt.get(j) + input * gx) * slope.get(j);
          tile_u[j] = output(dt.get(j) * gx + d.get(i) * gy);
          tile_delta[j] = output(gdelta);
          sum_D[k] += output(gy * input);
          sum_bias[k] += output(gdelta);
        }
      }
      store_tile(out.u, tile_u, row, channel, lanes, start, steps);
      store_tile(out.delta, tile_delta, row, channel, lanes, start, steps);
      if (shape.gated) {
        EAML_IVDEP
        for (int64_t j = 0; j < count; ++j) {
          const S gate = z.get(j), s = sigmoid(gate);
          tile_z[j] = output(grad_out.get(j) * y.get(j) * (s + gate * s * (S(T(1)) - s)));
        }
        store_tile(out.z, tile_z, row, channel, lanes, start, steps);
      }
    }

    const int64_t unit_row = row * units_per_group<T>(shape) * shape.groups + unit.at.unit;
    const auto reduce_lanes = [&](T* to, const T* sums) EAML_LAMBDA {
      for (int64_t n = 0; n < shape.state; ++n)
        for (int64_t t = 0; t < steps; ++t)
          to[(unit_row * shape.state + n) * shape.length + start + t] = lane_sum(sums + t * size + n * W);
    };
    if (!shape.B_invariant) reduce_lanes(out.B, sum_B);
    if (!shape.C_invariant) reduce_lanes(out.C, sum_C);
  }

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t channel = row * shape.dim + unit.channel(block), lanes = unit.lanes(block);
    const auto store = [&](T* to, const T* matrix) {
      store_matrix(to + channel * shape.state, shape.state, 1, matrix + block * size, lanes, shape.state);
    };
    store(out.A, sum_A);
    if (shape.B_invariant) store(out.B, sum_B);
    if (shape.C_invariant) store(out.C, sum_C);
    store(out.initial_state, grad_h.written());
    std::copy_n(sum_D + block * W, lanes, out.D + channel);
    std::copy_n(sum_bias + block * W, lanes, out.delta_bias + channel);
  }
}

// Units on S, with B and C laid out per lane where one of them is invariant in time.
template <class S>
EAML_INLINE void run_forward(const Shape& shape, const Source<S>& source, const Outputs<scalar_t<S>>& out,
                             int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    if (shape.B_invariant || shape.C_invariant)
      forward_unit<S, true>(arena, shape, source, out, index);
    else
      forward_unit<S, false>(arena, shape, source, out, index);
  }
}

template <class S>
EAML_INLINE void run_backward(const Shape& shape, const Source<S>& source, const Gradients<scalar_t<S>>& out,
                              int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    if (shape.B_invariant || shape.C_invariant)
      backward_unit<S, true>(arena, shape, source, out, index);
    else
      backward_unit<S, false>(arena, shape, source, out, index);
  }
}

}  // namespace

template <class T>
int64_t units(const Shape& shape) {
  return units_per_group<T>(shape) * shape.groups;
}
template int64_t units<float>(const Shape&);
template int64_t units<double>(const Shape&);

EAML_CLONES void forward(const Shape& shape, const Inputs<float>& in, const Outputs<float>& out, int64_t begin,
                         int64_t end) {
  run_forward(shape, Source<float>{in, nullptr}, out, begin, end);
}
EAML_CLONES void forward(const Shape& shape, const Inputs<double>& in, const Outputs<double>& out, int64_t begin,
                         int64_t end) {
  run_forward(shape, Source<double>{in, nullptr}, out, begin, end);
}
EAML_CLONES void forward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,
                              const Outputs<float>& out, int64_t begin, int64_t end) {
  run_forward(shape, Source<Dual<float>>{in, &tangents}, out, begin, end);
}
EAML_CLONES void forward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,
                              const Outputs<double>& out, int64_t begin, int64_t end) {
  run_forward(shape, Source<Dual<double>>{in, &tangents}, out, begin, end);
}
EAML_CLONES void backward(const Shape& shape, const Inputs<float>& in, const Gradients<float>& out, int64_t begin,
                          int64_t end) {
  run_backward(shape, Source<float>{in, nullptr}, out, begin, end);
}
EAML_CLONES void backward(const Shape& shape, const Inputs<double>& in, const Gradients<double>& out, int64_t begin,
                          int64_t end) {
  run_backward(shape, Source<double>{in, nullptr}, out, begin, end);
}
EAML_CLONES void backward_dual(const Shape& shape, const Inputs<float>& in, const Inputs<float>& tangents,
                               const Gradients<float>& out, int64_t begin, int64_t end) {
  run_backward(shape, Source<Dual<float>>{in, &tangents}, out, begin, end);
}
EAML_CLONES void backward_dual(const Shape& shape, const Inputs<double>& in, const Inputs<double>& tangents,
                               const Gradients<double>& out, int64_t begin, int64_t end) {
  run_backward(shape, Source<Dual<double>>{in, &tangents}, out, begin, end);
}

}  // namespace eaml::selective_scan
