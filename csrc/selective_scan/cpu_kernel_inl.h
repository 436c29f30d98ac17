// The CPU kernels as templates on the scalar; one translation unit per precision instantiates them.
//
// Lanes are channels, so there is no horizontal sum per step and the exponential runs at full vector width. A unit of
// work is one batch row times kBlocksPerUnit blocks of lanes. Time is walked in chunks: inputs of a chunk are staged as
// [step][lane] tiles, states are taken a few at a time and stay in registers through the chunk. Backward walks the
// chunks from the last to the first and recomputes each from the state saved at its start.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/arena.h"
#include "common/simd.h"
#include "selective_scan/cpu_kernel.h"
#include "selective_scan/recurrence.h"

namespace eaml::selective_scan {
namespace {

using std::int64_t;

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

constexpr int kStates = 4;  // states in flight: enough independent chains, few enough registers

constexpr int kTogether = 4;  // steps whose softplus is computed side by side

template <class S>
constexpr int64_t kGroup = kStates * kLanes<scalar_t<S>>;  // of one vector for each state in flight

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

// The states of one group in local arrays, which a loop over time keeps in registers; a Span may alias what is written.
template <class S, int64_t kSize = kGroup<S>>
struct Registers {
  alignas(kVectorBytes) S data[kSize];
  EAML_INLINE Span<S> span() { return {data}; }
};
template <class T, int64_t kSize>
struct Registers<Dual<T>, kSize> {
  alignas(kVectorBytes) T value[kSize];
  alignas(kVectorBytes) T tangent[kSize];
  EAML_INLINE Span<Dual<T>> span() { return {value, tangent}; }
};

template <class T>
EAML_INLINE void copy_rows(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t rows) {
  for (int64_t t = 0; t < rows; ++t) std::copy_n(from + t * from_step, kLanes<T>, to + t * to_step);
}

// Rows of full vectors: a staged tile, or the caller's own memory where lanes are adjacent in it.
template <class S>
struct View {
  const S* value;
  int64_t step;
  EAML_INLINE S get(int64_t t, int64_t i) const { return value[t * step + i]; }
  EAML_INLINE void prefetch(int64_t t, int64_t i) const { EAML_PREFETCH(value + t * step + i); }
  EAML_INLINE void copy_to(Span<S> tile, int64_t rows) const { copy_rows(tile.value, kLanes<S>, value, step, rows); }
};
template <class T>
struct View<Dual<T>> {
  const T* value;
  int64_t step;
  const T* tangent;
  int64_t tangent_step;
  EAML_INLINE Dual<T> get(int64_t t, int64_t i) const { return {value[t * step + i], tangent[t * tangent_step + i]}; }
  EAML_INLINE void prefetch(int64_t t, int64_t i) const {
    EAML_PREFETCH(value + t * step + i), EAML_PREFETCH(tangent + t * tangent_step + i);
  }
  EAML_INLINE void copy_to(Span<Dual<T>> tile, int64_t rows) const {
    copy_rows(tile.value, kLanes<T>, value, step, rows);
    copy_rows(tile.tangent, kLanes<T>, tangent, tangent_step, rows);
  }
};

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
const T* origin(const In<T>& in, int64_t row, int64_t channel) {
  return in.data + row / in.rows_per_outer * in.outer + channel * in.channel;
}

// Strided copies run once a chunk or less: they stay out of line, compiled once for all instruction sets.

// tile[step][lane] = in[row][channel + lane][start + step], zeros beyond `lanes`.
template <class T>
EAML_NOINLINE void stage_tile(T* tile, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t start,
                              int64_t steps, int64_t ahead) {
  constexpr int64_t W = kLanes<T>;
  if (in.data == nullptr || lanes < W) std::fill_n(tile, steps * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel) + start * in.inner;
  if (in.inner == 1) {
    for (int64_t i = 0; i < lanes; ++i)  // of the next chunk: rows are too short for the processor to see them coming
      for (int64_t t = 0; t < kChunk; t += kLanes<T>) EAML_PREFETCH(from + i * in.channel + ahead + t);
    transpose(tile, W, from, in.channel, lanes, steps);
  } else {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t i = 0; i < lanes; ++i) tile[t * W + i] = from[t * in.inner + i * in.channel];
  }
}

template <class T>
EAML_NOINLINE void scatter_tile(T* to, const Out<T>& out, const T* tile, int64_t lanes, int64_t steps) {
  constexpr int64_t W = kLanes<T>;
  if (out.inner == 1) return transpose(to, out.channel, tile, W, steps, lanes);
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t i = 0; i < lanes; ++i) to[t * out.inner + i * out.channel] = tile[t * W + i];
}

template <class T>
EAML_INLINE void store_tile(const Out<T>& out, const T* tile, int64_t row, int64_t channel, int64_t lanes,
                            int64_t start, int64_t steps) {
  constexpr int64_t W = kLanes<T>;
  if (out.data == nullptr) return;
  T* const to = out.data + row * out.outer + channel * out.channel + start * out.inner;
  if (lanes == W && out.channel == 1)
    copy_rows(to, out.inner, tile, W, steps);
  else
    scatter_tile(to, out, tile, lanes, steps);
}

// matrix[state][lane] of a (rows, dim, state) input, zeros beyond `lanes` and beyond the true state count.
template <class T>
EAML_NOINLINE void gather_matrix(T* matrix, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t state,
                                 int64_t padded) {
  constexpr int64_t W = kLanes<T>;
  std::fill_n(matrix, padded * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  if (in.inner == 1) return transpose(matrix, W, from, in.channel, lanes, state);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n) matrix[n * W + i] = from[i * in.channel + n * in.inner];
}

template <class T>
EAML_INLINE void stage_matrix(T* matrix, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t state,
                              int64_t padded) {
  if (in.data != nullptr && in.channel == 1 && lanes == kLanes<T> && state == padded)
    copy_rows(matrix, kLanes<T>, origin(in, row, channel), in.inner, state);
  else
    gather_matrix(matrix, in, row, channel, lanes, state, padded);
}

template <class T>
EAML_NOINLINE void scatter_matrix(T* to, int64_t channel_stride, int64_t inner_stride, const T* matrix, int64_t lanes,
                                  int64_t state) {
  constexpr int64_t W = kLanes<T>;
  if (inner_stride == 1) return transpose(to, channel_stride, matrix, W, state, lanes);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n) to[i * channel_stride + n * inner_stride] = matrix[n * W + i];
}

template <class T>
EAML_INLINE void store_matrix(T* to, int64_t channel_stride, int64_t inner_stride, const T* matrix, int64_t lanes,
                              int64_t state) {
  if (lanes == kLanes<T> && channel_stride == 1)
    copy_rows(to, inner_stride, matrix, kLanes<T>, state);
  else
    scatter_matrix(to, channel_stride, inner_stride, matrix, lanes, state);
}

// One value per lane of a (rows, dim) input.
template <class T>
EAML_NOINLINE void stage_vector(T* vector, const In<T>& in, int64_t row, int64_t channel, int64_t lanes) {
  std::fill_n(vector, kLanes<T>, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  for (int64_t i = 0; i < lanes; ++i) vector[i] = from[i * in.channel];
}

// The saved states (batch, chunks, state, dim) at the start of a chunk, as an input.
template <class T>
In<T> checkpoint(const T* all, const Shape& shape, int64_t row, int64_t chunk, int64_t chunks) {
  return {all + (row * chunks + chunk) * shape.state * shape.dim, 0, 1, shape.dim};
}

// sums[row] = sum over the lanes of a row, in a fixed order. Quarters add as vectors; the last four go rows at a time.
template <class T, int64_t kRows>
EAML_INLINE void sum_lanes(T (&sums)[kRows], const T* rows) {
  constexpr int64_t W = kLanes<T>, Q = 4;
  T quarter[kRows * Q];
  for (int64_t r = 0; r < kRows; ++r) {
    EAML_IVDEP
    for (int64_t i = 0; i < Q; ++i) {
      T sum = rows[r * W + i];
      EAML_UNROLL
      for (int64_t k = Q; k < W; k += Q) sum += rows[r * W + k + i];
      quarter[r * Q + i] = sum;
    }
  }
  EAML_IVDEP
  for (int64_t r = 0; r < kRows; ++r)
    sums[r] = (quarter[r * Q] + quarter[r * Q + 1]) + (quarter[r * Q + 2] + quarter[r * Q + 3]);
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

// to[step][state][copy] of a variable B or C, zeros beyond the true state count.
template <int64_t kCopies, class T>
EAML_NOINLINE void stage_states(T* to, const In<T>& in, const Place& at, int64_t state, int64_t padded, int64_t start,
                                int64_t steps) {
  if (in.data == nullptr || padded != state) std::fill_n(to, steps * padded * kCopies, T(0));
  if (in.data == nullptr) return;
  const T* from = in.data + at.row * in.outer + at.group * in.group + start * in.inner;
  if (kCopies == 1 && in.inner == 1) return transpose(to, padded, from, in.channel, state, steps);
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t n = 0; n < state; ++n)
      std::fill_n(to + (t * padded + n) * kCopies, kCopies, from[n * in.channel + t * in.inner]);
}

// A and A log2(e) of the states in flight.
template <class S>
struct Rates {
  Span<S> A;
  const scalar_t<S>* A2;
  EAML_INLINE void decays(S dt, int64_t lane, S (&a)[kStates]) const {
    S rate[kStates];
    scalar_t<S> rate2[kStates];
    EAML_UNROLL
    for (int n = 0; n < kStates; ++n) {
      const int64_t j = n * kLanes<scalar_t<S>> + lane;
      rate[n] = A.get(j), rate2[n] = A2[j];
    }
    decay(dt, rate, rate2, a);
  }
};

// A chunk cut where the state is reset, so that the loops over time inside are free of branches.
struct Segments {
  int64_t count, begin[kChunk + 1];  // begin[count]: the end of the chunk
  bool first_reset;                  // of the first segment; all others start with a reset
  EAML_INLINE bool reset(int64_t segment) const { return segment > 0 || first_reset; }
};

// The part of a unit's scratch memory that forward and backward share, and how it is filled.
template <class S, bool kLane>
struct Unit {
  using T = scalar_t<S>;
  static constexpr int64_t W = kLanes<T>;

  const Shape& shape;
  const Source<S>& source;
  Place at;
  int64_t padded;          // states, rounded up to whole groups
  Span<S> A, D, bias;      // [block][state][lane], [block][lane]
  T* A2;                   // A log2(e)
  Operand<S, kLane> B, C;  // of the current chunk (invariant: of the current block)
  Span<S> dt, x, y;        // tiles of the current chunk and block
  Span<S> memory_u, memory_delta, memory_z;
  View<S> u, z;
  Segments segments;

  Unit(Arena& arena, const Shape& s, const Source<S>& src, int64_t index)
      : shape(s), source(src), at(place<T>(s, index)), padded((s.state + kStates - 1) / kStates * kStates) {
    A = take<S>(arena, blocks() * padded * W);
    A2 = arena.take<T>(blocks() * padded * W);
    D = take<S>(arena, blocks() * W);
    bias = take<S>(arena, blocks() * W);
    for (int64_t block = 0; block < blocks(); ++block) {
      source.each(&Inputs<T>::A, A.at(block * padded * W), [&](T* to, const In<T>& in) {
        stage_matrix(to, in, at.row, channel(block), lanes(block), shape.state, padded);
      });
      source.each(&Inputs<T>::D, D.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector(to, in, at.row, channel(block), lanes(block)); });
      source.each(&Inputs<T>::delta_bias, bias.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector(to, in, at.row, channel(block), lanes(block)); });
    }
    for (int64_t j = 0; j < blocks() * padded * W; ++j) A2[j] = A.value[j] * T(kLog2e);
    const int64_t operand = kLane ? kChunk * padded * W : kChunk * padded;
    B.data = take<S>(arena, operand), C.data = take<S>(arena, operand);
    B.step = kLane ? (shape.B_invariant ? 0 : padded * W) : padded;
    C.step = kLane ? (shape.C_invariant ? 0 : padded * W) : padded;
    for (Span<S>* tile : {&dt, &x, &y, &memory_u, &memory_delta, &memory_z}) *tile = take<S>(arena, kChunk * W);
  }

  int64_t blocks() const { return (at.channels + W - 1) / W; }
  int64_t lanes(int64_t block) const { return std::min(W, at.channels - block * W); }
  int64_t channel(int64_t block) const { return at.first + block * W; }
  int64_t chunks() const { return (shape.length + kChunk - 1) / kChunk; }
  EAML_INLINE Rates<S> rates(int64_t j) const { return {A.at(j), A2 + j}; }

  // What all blocks of the unit share in a chunk: resets, and B and C where they vary in time.
  EAML_INLINE void stage_chunk(int64_t start, int64_t steps) {
    segments.count = 1, segments.begin[0] = 0, segments.first_reset = false;
    if (shape.reset) {
      const bool* reset = shape.reset + at.row * shape.reset_outer + start * shape.reset_inner;
      segments.first_reset = reset[0];
      for (int64_t t = 1; t < steps; ++t)
        if (reset[t * shape.reset_inner]) segments.begin[segments.count++] = t;
    }
    segments.begin[segments.count] = steps;
    if (!shape.B_invariant) stage_variable(&Inputs<T>::B, B, start, steps);
    if (!shape.C_invariant) stage_variable(&Inputs<T>::C, C, start, steps);
  }

  EAML_INLINE void stage_variable(In<T> Inputs<T>::* member, const Operand<S, kLane>& operand, int64_t start,
                                  int64_t steps) {
    source.each(member, operand.data, [&](T* to, const In<T>& in) {
      stage_states<kLane ? W : 1>(to, in, at, shape.state, padded, start, steps);
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

  // The chunk of an input, copied to `tile` only where lanes are not adjacent. The next chunk starts `ahead` steps on.
  EAML_INLINE View<S> view(In<T> Inputs<T>::* member, Span<S> tile, int64_t block, int64_t start, int64_t steps,
                           int64_t ahead) const {
    const auto rows = [&](T* to, const In<T>& in) EAML_LAMBDA -> View<T> {
      if (in.data != nullptr && in.channel == 1 && lanes(block) == W)
        return {origin(in, at.row, channel(block)) + start * in.inner, in.inner};
      stage_tile(to, in, at.row, channel(block), lanes(block), start, steps, ahead);
      return {to, W};
    };
    const View<T> value = rows(tile.value, source.values.*member);
    if constexpr (kIsDual<S>) {
      const View<T> tangent = rows(tile.tangent, source.tangents->*member);
      return {value.value, value.step, tangent.value, tangent.step};
    } else {
      return value;
    }
  }

  // dt = softplus(delta + bias), x = dt u, y = D u where the sum over states starts; with `slope`, also d dt / d delta.
  template <bool kSlope>
  EAML_INLINE void stage_block(int64_t block, int64_t start, int64_t steps, Span<S> slope) {
    if constexpr (kLane) stage_invariant(block);
    constexpr int64_t ahead = kSlope ? -kChunk : kChunk;  // backward walks backward
    u = view(&Inputs<T>::u, memory_u, block, start, steps, ahead);
    if (shape.gated) z = view(&Inputs<T>::z, memory_z, block, start, steps, ahead);
    const View<S> delta = view(&Inputs<T>::delta, memory_delta, block, start, steps, ahead), u_ = u;
    const Span<S> dt_ = dt, x_ = x, y_ = y, offset = bias.at(block * W), d = D.at(block * W);
    const bool last = block + 1 == blocks();  // what comes next: the next block, or the first one of the next chunk
    const int64_t later = last ? ahead : 0, over = last ? -block * W : W;
    const auto each = [&](auto f) EAML_LAMBDA {
      for (int64_t t = 0; t < steps; t += kTogether) {
        int64_t rows[kTogether];
        for (int k = 0; k < kTogether; ++k) {
          rows[k] = std::min(t + k, steps - 1);  // the last step may be done twice
          u_.prefetch(rows[k] + later, over), delta.prefetch(rows[k] + later, over);
        }
        EAML_IVDEP
        for (int64_t i = 0; i < W; ++i) {
          S shifted[kTogether];
          Softplus<S> step[kTogether];
          EAML_UNROLL
          for (int k = 0; k < kTogether; ++k) shifted[k] = delta.get(rows[k], i) + offset.get(i);
          f(shifted, step);
          EAML_UNROLL
          for (int k = 0; k < kTogether; ++k) {
            const int64_t j = rows[k] * W + i;
            const S input = u_.get(rows[k], i);
            dt_.set(j, step[k].value), x_.set(j, step[k].value * input), y_.set(j, d.get(i) * input);
            if constexpr (kSlope) slope.set(j, step[k].slope);
          }
        }
      }
    };
    using Rows = S[kTogether];
    using Steps = Softplus<S>[kTogether];
    if (shape.softplus)
      each([](const Rows& v, Steps& out) EAML_LAMBDA { softplus(v, out); });
    else
      each([](const Rows& v, Steps& out) EAML_LAMBDA {
        for (int k = 0; k < kTogether; ++k) out[k] = {v[k], S(T(1))};
      });
  }
};

// Advances the states of a group through a chunk and adds C h to y.
template <class S, bool kLane>
EAML_INLINE void forward_states(const Segments& segments, Rates<S> rates, Span<S> state, Span<S> dt, Span<S> x,
                                Operand<S, kLane> B, Operand<S, kLane> C, Span<S> y) {
  constexpr int64_t W = kLanes<scalar_t<S>>;
  Registers<S> registers;
  const Span<S> h = registers.span();
  copy(h, state, kGroup<S>);
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    if (segments.reset(segment)) clear(h, kGroup<S>);
    for (int64_t t = segments.begin[segment]; t < segments.begin[segment + 1]; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) {
        const S step = dt.get(t * W + i), input = x.get(t * W + i);
        S a[kStates], sum = y.get(t * W + i);
        rates.decays(step, i, a);
        EAML_UNROLL
        for (int n = 0; n < kStates; ++n) {
          const int64_t j = n * W + i;
          const S next = advance(a[n], h.get(j), input, B.get(t, n, i));
          h.set(j, next);
          sum = sum + C.get(t, n, i) * next;
        }
        y.set(t * W + i, sum);
      }
    }
  }
  copy(state, h, kGroup<S>);
}

template <class S, bool kLane>
EAML_INLINE void forward_unit(Arena& arena, const Shape& shape, const Source<S>& source,
                              const Outputs<scalar_t<S>>& out, int64_t index) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>;
  Unit<S, kLane> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, chunks = unit.chunks();
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
      const Span<S> state = h.at(block * size), y = unit.y;
      save(out.checkpoints, state.value, chunk, block);
      if constexpr (kIsDual<S>) save(out.checkpoint_tangents, state.tangent, chunk, block);
      unit.template stage_block<false>(block, start, steps, y);
      for (int64_t n = 0; n < unit.padded; n += kStates)
        forward_states(unit.segments, unit.rates(block * size + n * W), state.at(n * W), unit.dt, unit.x,
                       unit.B.states_from(n), unit.C.states_from(n), y);
      if (shape.gated) {
        const View<S> z = unit.z;
        for (int64_t t = 0; t < steps; ++t) {
          EAML_IVDEP
          for (int64_t i = 0; i < W; ++i) {
            const S gate = z.get(t, i);
            tile[t * W + i] = output(y.get(t * W + i) * (gate * sigmoid(gate)));
          }
        }
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
  T *A, *B, *C;            // of one group: [state][lane]; [step][state][lane]
  int64_t B_step, C_step;  // 0 where B, C are invariant in time: all steps add to one place
};

// Tiles of gradients of one chunk and block.
template <class S>
struct GradientTiles {
  Span<S> y, x, dt;  // in; sums over states of dL/dx, and of dL/d(dt A) A
};

// Takes the states of a group back through a chunk, from `start`, their values before it.
template <class S, bool kLane>
EAML_INLINE void backward_states(const Segments& segments, bool gated, Rates<S> rates, Span<S> start, Span<S> dt,
                                 Span<S> x, Operand<S, kLane> B, Operand<S, kLane> C, Span<S> y, Span<S> grad_state,
                                 GradientTiles<S> grad, Span<S> decays, Span<S> states, Span<S> zeros,
                                 Sums<scalar_t<S>> sums) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>, size = kGroup<S>;

  Registers<S> registers;
  const Span<S> h = registers.span();
  copy(h, start, size);
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    if (segments.reset(segment)) clear(h, size);
    for (int64_t t = segments.begin[segment]; t < segments.begin[segment + 1]; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) {
        const S step = dt.get(t * W + i), input = x.get(t * W + i);
        S a[kStates];
        rates.decays(step, i, a);
        EAML_UNROLL
        for (int n = 0; n < kStates; ++n) {
          const int64_t j = n * W + i;
          const S next = advance(a[n], h.get(j), input, B.get(t, n, i));
          h.set(j, next), decays.set(t * size + j, a[n]), states.set(t * size + j, next);
        }
      }
    }
  }
  if (gated) {
    for (int64_t t = 0; t < segments.begin[segments.count]; ++t) {
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) {
        S sum = y.get(t * W + i);
        EAML_UNROLL
        for (int n = 0; n < kStates; ++n) sum = sum + C.get(t, n, i) * states.get(t * size + n * W + i);
        y.set(t * W + i, sum);
      }
    }
  }

  Registers<S> grad_registers, A_registers;
  Registers<T, size> sum_registers;
  const Span<S> grad_h = grad_registers.span(), current = registers.span(), A = A_registers.span();
  const Span<T> sum_A = sum_registers.span();
  copy(A, rates.A, size);
  copy(grad_h, grad_state, size);
  for (int64_t j = 0; j < size; ++j) sum_A.set(j, sums.A[j]);
  for (int64_t segment = segments.count - 1; segment >= 0; --segment) {
    const int64_t first = segments.begin[segment];
    const Span<S> initial = segments.reset(segment) ? zeros : start;
    copy(current, states.at((segments.begin[segment + 1] - 1) * size), size);
    for (int64_t t = segments.begin[segment + 1] - 1; t >= first; --t) {
      const Span<S> before = t == first ? initial : states.at((t - 1) * size);
      const Span<S> a = decays.at(t * size);
      T* const sum_B = sums.B + t * sums.B_step;
      T* const sum_C = sums.C + t * sums.C_step;
      EAML_IVDEP
      for (int64_t i = 0; i < W; ++i) {
        const S gy = grad.y.get(t * W + i), step = dt.get(t * W + i), input = x.get(t * W + i);
        S gx = grad.x.get(t * W + i), gdt = grad.dt.get(t * W + i);
        EAML_UNROLL
        for (int n = 0; n < kStates; ++n) {
          const int64_t j = n * W + i;
          const S h_prev = before.get(j);
          const StepGradient<S> g =
              step_backward(grad_h.get(j), gy, a.get(j), h_prev, current.get(j), input, B.get(t, n, i), C.get(t, n, i));
          current.set(j, h_prev);
          grad_h.set(j, g.h_prev);
          sum_C[j] += output(g.C);
          sum_B[j] += output(g.B);
          gx = gx + g.x;
          gdt = gdt + g.dt_A * A.get(j);
          sum_A.set(j, sum_A.get(j) + output(g.dt_A * step));
        }
        grad.x.set(t * W + i, gx);
        grad.dt.set(t * W + i, gdt);
      }
    }
    if (segments.reset(segment)) clear(grad_h, size);
  }
  copy(grad_state, grad_h, size);
  for (int64_t j = 0; j < size; ++j) sums.A[j] = sum_A.get(j);
}

template <class S, bool kLane>
EAML_INLINE void backward_unit(Arena& arena, const Shape& shape, const Source<S>& source,
                               const Gradients<scalar_t<S>>& out, int64_t index) {
  using T = scalar_t<S>;
  constexpr int64_t W = kLanes<T>, group = kGroup<S>, tile = kChunk * W;
  Unit<S, kLane> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, blocks = unit.blocks(), chunks = unit.chunks();

  const Span<S> grad_h = take<S>(arena, blocks * size), h0 = take<S>(arena, size), zeros = take<S>(arena, group);
  const Span<S> decays = take<S>(arena, kChunk * group), states = take<S>(arena, kChunk * group);
  const Span<S> slope = take<S>(arena, tile), memory_gy = take<S>(arena, tile);
  const Span<S> gate = take<S>(arena, tile);  // sigmoid(z)
  const GradientTiles<S> grad{take<S>(arena, tile), take<S>(arena, tile), take<S>(arena, tile)};
  const auto zeroed = [&](int64_t count) {
    T* const sum = arena.take<T>(count);
    std::fill_n(sum, count, T(0));
    return sum;
  };
  T* const sum_A = zeroed(blocks * size);
  T* const sum_B = zeroed((shape.B_invariant ? blocks : kChunk) * size);  // variable: [group][step][state][lane]
  T* const sum_C = zeroed((shape.C_invariant ? blocks : kChunk) * size);
  T* const sum_D = zeroed(blocks * W);
  T* const sum_bias = zeroed(blocks * W);
  T* const tile_u = arena.take<T>(tile);
  T* const tile_delta = arena.take<T>(tile);
  T* const tile_z = arena.take<T>(tile);
  clear(zeros, group);
  for (int64_t block = 0; block < blocks; ++block)
    source.each(&Inputs<T>::grad_state, grad_h.at(block * size), [&](T* to, const In<T>& in) {
      stage_matrix(to, in, row, unit.channel(block), unit.lanes(block), shape.state, unit.padded);
    });

  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, shape.length - start);
    unit.stage_chunk(start, steps);
    if (!shape.B_invariant) std::fill_n(sum_B, kChunk * size, T(0));
    if (!shape.C_invariant) std::fill_n(sum_C, kChunk * size, T(0));

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = unit.channel(block), lanes = unit.lanes(block);
      unit.template stage_block<true>(block, start, steps, slope);
      const View<S> u = unit.u, z = unit.z, gy = unit.view(&Inputs<T>::grad_y, memory_gy, block, start, steps, -kChunk);
      const Span<S> dt = unit.dt, y = unit.y;
      if (shape.gated) {
        for (int64_t t = 0; t < steps; ++t) {
          EAML_IVDEP
          for (int64_t i = 0; i < W; ++i) gate.set(t * W + i, sigmoid(z.get(t, i)));
          EAML_IVDEP
          for (int64_t i = 0; i < W; ++i) grad.y.set(t * W + i, gy.get(t, i) * (z.get(t, i) * gate.get(t * W + i)));
        }
      } else {
        gy.copy_to(grad.y, steps);
      }
      stage_matrix(h0.value, checkpoint(out.checkpoints, shape, row, chunk, chunks), 0, channel, lanes, shape.state,
                   unit.padded);
      if constexpr (kIsDual<S>)
        stage_matrix(h0.tangent, checkpoint(out.checkpoint_tangents, shape, row, chunk, chunks), 0, channel, lanes,
                     shape.state, unit.padded);
      clear(grad.x, steps * W);
      clear(grad.dt, steps * W);

      for (int64_t n = 0; n < unit.padded; n += kStates) {
        const int64_t j = block * size + n * W;
        const Sums<T> sums{sum_A + j, sum_B + (shape.B_invariant ? j : n * tile),
                           sum_C + (shape.C_invariant ? j : n * tile), shape.B_invariant ? 0 : group,
                           shape.C_invariant ? 0 : group};
        backward_states(unit.segments, shape.gated, unit.rates(j), h0.at(n * W), dt, unit.x, unit.B.states_from(n),
                        unit.C.states_from(n), y, grad_h.at(j), grad, decays, states, zeros, sums);
      }

      const Span<S> d = unit.D.at(block * W);
      T* const block_D = sum_D + block * W;
      T* const block_bias = sum_bias + block * W;
      for (int64_t t = 0; t < steps; ++t) {
        EAML_IVDEP
        for (int64_t i = 0; i < W; ++i) {
          const int64_t j = t * W + i;
          tile_u[j] = output(dt.get(j) * grad.x.get(j) + d.get(i) * grad.y.get(j));
          tile_delta[j] = output((grad.dt.get(j) + u.get(t, i) * grad.x.get(j)) * slope.get(j));
        }
        EAML_IVDEP
        for (int64_t i = 0; i < W; ++i) {
          block_D[i] += output(grad.y.get(t * W + i) * u.get(t, i));
          block_bias[i] += tile_delta[t * W + i];
        }
      }
      store_tile(out.u, tile_u, row, channel, lanes, start, steps);
      store_tile(out.delta, tile_delta, row, channel, lanes, start, steps);
      if (shape.gated) {
        for (int64_t t = 0; t < steps; ++t) {
          EAML_IVDEP
          for (int64_t i = 0; i < W; ++i) {
            const S s = gate.get(t * W + i);
            tile_z[t * W + i] = output(gy.get(t, i) * y.get(t * W + i) * (s + z.get(t, i) * (s * (S(T(1)) - s))));
          }
        }
        store_tile(out.z, tile_z, row, channel, lanes, start, steps);
      }
    }

    const int64_t unit_row = row * units_per_group<T>(shape) * shape.groups + unit.at.unit;
    const auto reduce_lanes = [&](T* to, const T* sums) EAML_LAMBDA {
      T line[kChunk * kStates];
      for (int64_t n = 0; n < shape.state; n += kStates) {
        sum_lanes(line, sums + n * tile);
        transpose(to + (unit_row * shape.state + n) * shape.length + start, shape.length, line, kStates, steps,
                  std::min<int64_t>(kStates, shape.state - n));
      }
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

}  // namespace eaml::selective_scan
