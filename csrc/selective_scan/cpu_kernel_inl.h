// The CPU kernels as templates on a vector of lanes. cpu_kernel_versions.h includes this file once per instruction set;
// a file per precision, EAML_NUMBER, instantiates it for real states, and another one, with EAML_COMPLEX, for complex
// states.
//
// Lanes are channels, so there is no horizontal sum per step and the exponential runs at full vector width. A unit of
// work is one batch row times kUnitBytes of channels, in blocks of one vector. Time is walked in chunks: inputs of a
// chunk are staged as [step][lane] tiles, states are taken a few at a time and stay in registers through the chunk.
// Backward walks the chunks from the last to the first and recomputes each from the state saved at its start, the
// first one from the initial state.
//
// A function that runs once per chunk is compiled once and called: inlining it everywhere would triple the time of
// compilation. The loops over time are templates on all that would be a branch inside them.

namespace EAML_ISA {
namespace {

using Vector = Vec<Number, EAML_VECTOR_BYTES / sizeof(Number)>;

// Kernels are templates on Z, what A, B, C and the states are: a vector of lanes V, a Dual<V>, or a Complex of either.
// Sequences are real_t<Z>, S: V or Dual<V>.
template <class Z>
using number_t = element_t<vector_t<Z>>;
template <class Z>
constexpr int64_t kLanes = Lanes<vector_t<Z>>::count;

// An array in memory, read and written a vector at a time; of duals it is two arrays.
template <class V>
struct Span {
  element_t<V>* value;
  EAML_INLINE V get(int64_t i) const { return load<V>(value + i); }
  EAML_INLINE void set(int64_t i, V x) const { store(value + i, x); }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset}; }
  EAML_INLINE element_t<V> number(int64_t i) const { return value[i]; }
  EAML_INLINE element_t<V>* written() const { return value; }
};
template <class V>
struct Span<Dual<V>> {
  element_t<V>* value;
  element_t<V>* tangent;
  EAML_INLINE Dual<V> get(int64_t i) const { return {load<V>(value + i), load<V>(tangent + i)}; }
  EAML_INLINE void set(int64_t i, Dual<V> x) const { store(value + i, x.value), store(tangent + i, x.tangent); }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset, tangent + offset}; }
  EAML_INLINE Dual<element_t<V>> number(int64_t i) const { return {value[i], tangent[i]}; }
  EAML_INLINE element_t<V>* written() const { return tangent; }  // what leaves the kernel of a Dual run
};

// Of complex numbers, the vector of the imaginary parts follows that of the real ones; offsets count the latter alone.
template <class S>
struct Span<Complex<S>> : Span<S> {
  EAML_INLINE Complex<S> get(int64_t i) const { return {Span<S>::get(2 * i), Span<S>::get(2 * i + kLanes<S>)}; }
  EAML_INLINE void set(int64_t i, Complex<S> x) const {
    Span<S>::set(2 * i, x.re), Span<S>::set(2 * i + kLanes<S>, x.im);
  }
  EAML_INLINE Span at(int64_t offset) const { return {Span<S>::at(2 * offset)}; }
  EAML_INLINE auto number(int64_t i) const {
    return Complex<decltype(Span<S>::number(i))>{Span<S>::number(2 * i), Span<S>::number(2 * i + 1)};
  }
};

// The same of a size known beforehand: of duals, tangents stand kSize numbers behind values, and one address serves
// both.
template <class V, int64_t kSize>
struct Tile {
  element_t<V>* value;
  EAML_INLINE V get(int64_t i) const { return load<V>(value + i); }
  EAML_INLINE void set(int64_t i, V x) const { store(value + i, x); }
};
template <class V, int64_t kSize>
struct Tile<Dual<V>, kSize> {
  element_t<V>* value;
  EAML_INLINE Dual<V> get(int64_t i) const { return {load<V>(value + i), load<V>(value + kSize + i)}; }
  EAML_INLINE void set(int64_t i, Dual<V> x) const { store(value + i, x.value), store(value + kSize + i, x.tangent); }
  EAML_INLINE element_t<V>* tangent() const { return value + kSize; }
};

template <class S, int64_t kSize>
struct Tile<Complex<S>, kSize> : Tile<S, 2 * kSize> {
  using Parts = Tile<S, 2 * kSize>;
  EAML_INLINE Complex<S> get(int64_t i) const { return {Parts::get(2 * i), Parts::get(2 * i + kLanes<S>)}; }
  EAML_INLINE void set(int64_t i, Complex<S> x) const { Parts::set(2 * i, x.re), Parts::set(2 * i + kLanes<S>, x.im); }
};

constexpr int kVectors = 4;  // of states in flight: enough independent chains, few enough registers
template <class Z>
constexpr int kStates = kVectors / kComponents<Z>;

constexpr int kTogether = 4;  // steps whose softplus is computed side by side

template <class S>
constexpr int64_t kGroup = kStates<S> * kLanes<S>;  // numbers of one vector for each state in flight

template <class S>
using StepTile = Tile<S, kChunk * kLanes<S>>;  // [step][lane]
template <class S>
using GroupTile = Tile<S, kChunk * kGroup<S>>;  // [step][state in flight][lane]

template <class S>
EAML_INLINE S one() {
  return splat<vector_t<S>>(number_t<S>(1));
}

template <class S>
EAML_SHARED Span<S> take(Arena& arena, int64_t count) {
  if constexpr (kComponents<S> == 2)
    return {take<real_t<S>>(arena, 2 * count)};
  else if constexpr (kIsDual<S>)
    return {arena.take<number_t<S>>(count), arena.take<number_t<S>>(count)};
  else
    return {arena.take<number_t<S>>(count)};
}

template <class S>
StepTile<S> step_tile(Arena& arena) {
  return {arena.take<number_t<S>>((1 + kIsDual<S>)*kChunk * kLanes<S>)};
}
template <class Z>
GroupTile<Z> group_tile(Arena& arena) {
  return {arena.take<number_t<Z>>((1 + kIsDual<Z>)*kChunk * kGroup<Z> * kComponents<Z>)};
}

template <class S>
EAML_INLINE void clear(StepTile<S> tile, int64_t count) {
  std::fill_n(tile.value, count, number_t<S>(0));
  if constexpr (kIsDual<S>) std::fill_n(tile.tangent(), count, number_t<S>(0));
}
template <class Z>
EAML_INLINE void clear(Span<Z> span, int64_t count) {
  std::fill_n(span.value, count * kComponents<Z>, number_t<Z>(0));
  if constexpr (kIsDual<Z>) std::fill_n(span.tangent, count * kComponents<Z>, number_t<Z>(0));
}

// f(n) for each state in flight. What stays in registers from step to step is an array that only constants index: where
// a loop does, unrolled or not, gcc keeps a copy of a Dual in memory and writes it at each step.
template <class F, int... n>
EAML_INLINE void each_state(F f, std::integer_sequence<int, n...>) {
  (f(std::integral_constant<int, n>()), ...);
}
template <class Z, class F>
EAML_INLINE void each_state(F f) {
  each_state(f, std::make_integer_sequence<int, kStates<Z>>());
}

// One vector per state in flight, between memory and registers.
template <class S>
EAML_INLINE void read(S (&to)[kStates<S>], Span<S> from) {
  each_state<S>([&](auto n) EAML_LAMBDA { to[n] = from.get(n * kLanes<S>); });
}
template <class S>
EAML_INLINE void write(Span<S> to, const S (&from)[kStates<S>]) {
  each_state<S>([&](auto n) EAML_LAMBDA { to.set(n * kLanes<S>, from[n]); });
}
template <class S>
EAML_INLINE void forget(S (&states)[kStates<S>]) {
  each_state<S>([&](auto n) EAML_LAMBDA { states[n] = S{}; });
}

template <class V>
EAML_INLINE void copy_rows(element_t<V>* to, int64_t to_step, const element_t<V>* from, int64_t from_step,
                           int64_t rows) {
  for (int64_t t = 0; t < rows; ++t) store(to + t * to_step, load<V>(from + t * from_step));
}

// Rows of full vectors: a staged tile, or the caller's own memory where lanes are adjacent in it.
template <class V>
struct View {
  const element_t<V>* value;
  int64_t step;
  EAML_INLINE V get(int64_t t) const { return load<V>(value + t * step); }
};
template <class V>
struct View<Dual<V>> {
  const element_t<V>* value;
  int64_t step;
  const element_t<V>* tangent;
  int64_t tangent_step;
  EAML_INLINE Dual<V> get(int64_t t) const { return {load<V>(value + t * step), load<V>(tangent + t * tangent_step)}; }
};

template <class S>
EAML_INLINE View<S> view_of(StepTile<S> tile) {
  if constexpr (kIsDual<S>)
    return {tile.value, kLanes<S>, tile.tangent(), kLanes<S>};
  else
    return {tile.value, kLanes<S>};
}

// The same of halves, widened where they are read.
template <Half kHalf, class V>
struct HalfView {
  const std::uint16_t* value;
  int64_t step;
  EAML_INLINE V get(int64_t t) const { return load_half<kHalf, V>(value + t * step); }
};

// The inputs of a run on S: values, and for duals their tangents.
template <class S>
struct Source {
  using T = number_t<S>;
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
Place place(const Shape& shape, int64_t index) {
  const int64_t per_group = units_per_group<T>(shape), per_row = per_group * shape.groups;
  const int64_t width = kUnitBytes / sizeof(T), dim = shape.dim / shape.groups;
  Place p;
  p.row = index / per_row, p.unit = index % per_row, p.group = p.unit / per_group;
  const int64_t offset = p.unit % per_group * width;
  p.first = p.group * dim + offset, p.channels = std::min(width, dim - offset);
  return p;
}

template <class T>
int64_t offset_of(const In<T>& in, int64_t row) {
  return row / in.rows_per_outer * in.outer;
}
template <class T>
int64_t offset_of(const Out<T>& out, int64_t row) {
  return row * out.outer;
}
template <class T>
const T* origin(const In<T>& in, int64_t row, int64_t channel) {
  return in.data + offset_of(in, row) + channel * in.channel;
}

inline const std::uint16_t* halves(const float* data) {
  return reinterpret_cast<const std::uint16_t*>(data);
}
inline std::uint16_t* halves(float* data) {
  return reinterpret_cast<std::uint16_t*>(data);
}

// Calls f(std::integral_constant<Half, half>).
template <class F>
EAML_INLINE void with_half(Half half, F f) {
  if (half == Half::kBfloat16)
    f(std::integral_constant<Half, Half::kBfloat16>());
  else
    f(std::integral_constant<Half, Half::kFloat16>());
}

template <Half kHalf, class V>
EAML_INLINE void store_narrow(std::uint16_t* to, V x) {
  if constexpr (sizeof(element_t<V>) == 4) store_half<kHalf>(to, x);
}

// Strided copies run once a chunk or less: they stay out of line, without instruction sets of their own.

// As stage_tile and scatter_tile below, for sequences of halves.
template <int64_t W>
EAML_SHARED void stage_half_tile(float* tile, const In<float>& in, int64_t row, int64_t channel, int64_t lanes,
                                 int64_t start, int64_t steps) {
  std::uint16_t narrow[W * kChunk] = {};
  float rows[W * kChunk];
  const std::uint16_t* from = halves(in.data) + row * in.outer + channel * in.channel + start * in.inner;
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t t = 0; t < steps; ++t) narrow[i * kChunk + t] = from[i * in.channel + t * in.inner];
  with_half(in.half, [&](auto half) EAML_LAMBDA {
    for (int64_t k = 0; k < lanes * kChunk; k += W) store(rows + k, load_half<half, Vec<float, W>>(narrow + k));
  });
  std::fill_n(tile, steps * W, 0.0f);
  transpose(tile, W, rows, kChunk, lanes, steps);
}
template <int64_t W>
EAML_SHARED void scatter_half_tile(std::uint16_t* to, const Out<float>& out, const float* tile, int64_t lanes,
                                   int64_t steps) {
  float rows[W * kChunk] = {};
  std::uint16_t narrow[W * kChunk];
  transpose(rows, kChunk, tile, W, steps, lanes);
  with_half(out.half, [&](auto half) EAML_LAMBDA {
    for (int64_t k = 0; k < lanes * kChunk; k += W) store_half<half>(narrow + k, load<Vec<float, W>>(rows + k));
  });
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t t = 0; t < steps; ++t) to[i * out.channel + t * out.inner] = narrow[i * kChunk + t];
}

// tile[step][lane] = in[row][channel + lane][start + step], zeros beyond `lanes`.
template <int64_t W, class T>
EAML_SHARED void stage_tile(T* tile, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t start,
                            int64_t steps, int64_t ahead) {
  if (in.data == nullptr || lanes < W) std::fill_n(tile, steps * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel) + start * in.inner;
  if (in.inner == 1) {
    for (int64_t i = 0; i < lanes; ++i)  // of the next chunk: rows are too short for the processor to see them coming
      for (int64_t t = 0; t < kChunk; t += kAlignment / sizeof(T)) EAML_PREFETCH(from + i * in.channel + ahead + t);
    transpose(tile, W, from, in.channel, lanes, steps);
  } else {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t i = 0; i < lanes; ++i) tile[t * W + i] = from[t * in.inner + i * in.channel];
  }
}

template <int64_t W, class T>
EAML_SHARED void scatter_tile(T* to, const Out<T>& out, const T* tile, int64_t lanes, int64_t steps) {
  if (out.inner == 1) return transpose(to, out.channel, tile, W, steps, lanes);
  for (int64_t t = 0; t < steps; ++t)
    for (int64_t i = 0; i < lanes; ++i) to[t * out.inner + i * out.channel] = tile[t * W + i];
}

// Where a tile's rows go: the caller's own memory if a vector can be written there, or the tile, to be stored after.
template <class V>
struct Target {
  element_t<V>* row;
  int64_t step;
  EAML_INLINE V get(int64_t t) const { return load<V>(row + t * step); }
  EAML_INLINE void set(int64_t t, V x) const { store(row + t * step, x); }
};
template <class V, class T = element_t<V>>
EAML_INLINE bool has_rows(const Out<T>& out, int64_t lanes) {
  return out.data != nullptr && out.half == Half::kNone && out.channel == 1 && lanes == Lanes<V>::count;
}

template <class V, class T = element_t<V>>
EAML_SHARED void store_tile(const Out<T>& out, const T* tile, int64_t row, int64_t channel, int64_t lanes,
                            int64_t start, int64_t steps) {
  constexpr int64_t W = Lanes<V>::count;
  if (out.data == nullptr) return;
  const int64_t offset = row * out.outer + channel * out.channel + start * out.inner;
  if constexpr (sizeof(T) == 4) {
    if (out.half != Half::kNone) {
      std::uint16_t* const to = halves(out.data) + offset;
      if (lanes != W || out.channel != 1) return scatter_half_tile<W>(to, out, tile, lanes, steps);
      return with_half(out.half, [&](auto half) EAML_LAMBDA {
        for (int64_t t = 0; t < steps; ++t) store_half<half>(to + t * out.inner, load<V>(tile + t * W));
      });
    }
  }
  if (!has_rows<V>(out, lanes)) scatter_tile<W>(out.data + offset, out, tile, lanes, steps);
}

// matrix[state][component][lane] of a (rows, dim, state) input, zeros beyond `lanes` and beyond the true state count.
// Components of a complex number are neighbours in memory.
template <int64_t W, int64_t kCount, class T>
void gather_matrix(T* matrix, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t state,
                   int64_t padded) {
  std::fill_n(matrix, padded * kCount * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  if (in.inner == kCount) return transpose(matrix, W, from, in.channel, lanes, state * kCount);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n)
      for (int64_t c = 0; c < kCount; ++c) matrix[(n * kCount + c) * W + i] = from[i * in.channel + n * in.inner + c];
}

template <class V, int64_t kCount, class T = element_t<V>>
EAML_SHARED void stage_matrix(T* matrix, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t state,
                              int64_t padded) {
  constexpr int64_t W = Lanes<V>::count;
  if (kCount == 1 && in.data != nullptr && in.channel == 1 && lanes == W && state == padded)
    copy_rows<V>(matrix, W, origin(in, row, channel), in.inner, state);
  else
    gather_matrix<W, kCount>(matrix, in, row, channel, lanes, state, padded);
}

template <int64_t W, int64_t kCount, class T>
void scatter_matrix(T* to, int64_t channel_stride, int64_t inner_stride, const T* matrix, int64_t lanes,
                    int64_t state) {
  if (inner_stride == kCount) return transpose(to, channel_stride, matrix, W, state * kCount, lanes);
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t n = 0; n < state; ++n)
      for (int64_t c = 0; c < kCount; ++c)
        to[i * channel_stride + n * inner_stride + c] = matrix[(n * kCount + c) * W + i];
}

template <class V, int64_t kCount, class T = element_t<V>>
EAML_SHARED void store_matrix(T* to, int64_t channel_stride, int64_t inner_stride, const T* matrix, int64_t lanes,
                              int64_t state) {
  constexpr int64_t W = Lanes<V>::count;
  if (kCount == 1 && lanes == W && channel_stride == 1)
    copy_rows<V>(to, inner_stride, matrix, W, state);
  else
    scatter_matrix<W, kCount>(to, channel_stride, inner_stride, matrix, lanes, state);
}

// One value per lane of a (rows, dim) input.
template <int64_t W, class T>
EAML_SHARED void stage_vector(T* vector, const In<T>& in, int64_t row, int64_t channel, int64_t lanes) {
  std::fill_n(vector, W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel);
  for (int64_t i = 0; i < lanes; ++i) vector[i] = from[i * in.channel];
}

// Entry `index` of saved states (index, state, component, dim), each component a state of an input of its own. Those at
// the start of a row's chunks, but the first, have an index of row * (chunks - 1) + chunk - 1; a carry's is the row.
template <class T>
In<T> saved_state(const T* all, const Shape& shape, int64_t index) {
  return {all + index * shape.all_states * shape.components * shape.dim, 0, 1, shape.dim};
}

// to[state][step] = from[step][state] of complex numbers, kVectors / 2 states of which `count` are taken.
template <class T>
EAML_SHARED void scatter_steps(T* to, int64_t length, const T* from, int64_t steps, int64_t count) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t t = 0; t < steps; ++t) std::copy_n(from + t * kVectors + 2 * n, 2, to + 2 * (n * length + t));
}

// sums[row] = sum over the lanes of a row, in a fixed order: vectors of four (or two) are added, then their lanes.
template <class V, int64_t kRows, class T = element_t<V>>
EAML_INLINE void sum_lanes(T (&sums)[kRows], const T* rows) {
  constexpr int64_t W = Lanes<V>::count, Q = W < 4 ? W : 4;
  T part[kRows * Q];
  for (int64_t r = 0; r < kRows; ++r) {
    auto sum = load<Vec<T, Q>>(rows + r * W);
    EAML_UNROLL
    for (int64_t k = Q; k < W; k += Q) sum += load<Vec<T, Q>>(rows + r * W + k);
    store(part + r * Q, sum);
  }
  for (int64_t r = 0; r < kRows; ++r) {
    T sum = part[r * Q] + part[r * Q + 1];
    if constexpr (Q == 4) sum += part[r * Q + 2] + part[r * Q + 3];
    sums[r] = sum;
  }
}

// Four vectors' sums over lanes, halfway: kFolded numbers, of which `unfold` does the rest. It costs six shuffles
// where four accumulators in memory would cost three more loads and stores.
template <class V>
constexpr int64_t kFolded = Lanes<V>::count < kVectors ? kVectors : Lanes<V>::count;

// Which of the lanes of (a, b) goes to lane i: the lower (upper) ones of each 16 bytes, a and b in turn, as shuffles
// inside 16 bytes are the cheap ones; or a's and then b's lower (upper) half. Of four lanes, neighbours added are
// [a0 + a2, b0 + b2, a1 + a3, b1 + b3], and halves of two such the sums of a, b, c and d.
template <int kLanes, int kSlot, bool kUpper>
constexpr int neighbour(int i) {
  return i / kSlot * kSlot + i % kSlot / 2 + i % 2 * kLanes + kUpper * kSlot / 2;
}
template <int kLanes, bool kUpper>
constexpr int half_lane(int i) {
  return i + (i < kLanes / 2 ? 0 : kLanes / 2) + kUpper * kLanes / 2;
}
template <class V, int... i>
EAML_INLINE V add_neighbours(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i), slot = 16 / sizeof(element_t<V>);
  return __builtin_shufflevector(a, b, neighbour<n, slot, false>(i)...) +
         __builtin_shufflevector(a, b, neighbour<n, slot, true>(i)...);
}
template <class V, int... i>
EAML_INLINE V add_halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, half_lane<n, false>(i)...) +
         __builtin_shufflevector(a, b, half_lane<n, true>(i)...);
}
template <class V>
EAML_INLINE void add_folded(element_t<V>* sums, const V (&x)[kVectors]) {
  static_assert(kVectors == 4);
  constexpr int64_t W = Lanes<V>::count;
  const auto lanes = std::make_integer_sequence<int, W>();
  const V low = add_neighbours(x[0], x[1], lanes), high = add_neighbours(x[2], x[3], lanes);
  if constexpr (W < kVectors)
    store(sums, load<V>(sums) + low), store(sums + W, load<V>(sums + W) + high);
  else
    store(sums, load<V>(sums) + add_halves(low, high, lanes));
}
template <class V>
EAML_INLINE void add_folded(element_t<V>* sums, const Complex<V> (&x)[kVectors / 2]) {
  const V parts[kVectors] = {x[0].re, x[0].im, x[1].re, x[1].im};
  add_folded(sums, parts);
}
template <class V>
EAML_INLINE void unfold(element_t<V>* to, const element_t<V>* sums) {
  using Four = Vec<element_t<V>, 4>;
  constexpr int64_t half = kFolded<V> / 2;
  if constexpr (half < 4) {
    store(to, load<Four>(sums));
  } else {
    Four low = load<Four>(sums), high = load<Four>(sums + half);
    EAML_UNROLL
    for (int64_t i = 4; i < half; i += 4) low += load<Four>(sums + i), high += load<Four>(sums + half + i);
    store(to, __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7));
  }
}

// B or C of one chunk: [step][state][component], the same for every lane, or [step][state][component][lane] with step
// stride 0 when invariant in time.
template <class Z>
struct Matrix {
  Span<Z> data;
  int64_t step;
};
// From a state on; which of the two it is, is known (kLane).
template <class Z, bool kLane>
struct Operand {
  Span<Z> data;
  int64_t step;
  EAML_INLINE Operand(const Matrix<Z>& matrix, int64_t n)
      : data(matrix.data.at(kLane ? n * kLanes<Z> : n)), step(matrix.step) {}
  EAML_INLINE auto get(int64_t t, int64_t n) const {
    if constexpr (kLane)
      return data.get(t * step + n * kLanes<Z>);
    else
      return data.number(t * step + n);
  }
};

// to[step][state][component][copy] of a variable B or C, zeros beyond the true state count.
template <int64_t kCopies, int64_t kCount, class T>
EAML_SHARED void stage_states(T* to, const In<T>& in, const Place& at, int64_t state, int64_t padded, int64_t start,
                              int64_t steps) {
  if (in.data == nullptr || padded != state) std::fill_n(to, steps * padded * kCount * kCopies, T(0));
  if (in.data == nullptr) return;
  const T* from = in.data + at.row * in.outer + at.group * in.group + start * in.inner;
  if (kCopies == 1 && kCount == 1 && in.inner == 1) return transpose(to, padded, from, in.channel, state, steps);
  if (kCopies == 1 && in.channel == kCount) {
    for (int64_t t = 0; t < steps; ++t) std::copy_n(from + t * in.inner, state * kCount, to + t * padded * kCount);
    return;
  }
  for (int64_t n = 0; n < state; ++n)
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < kCount; ++c)
        std::fill_n(to + ((t * padded + n) * kCount + c) * kCopies, kCopies, from[n * in.channel + t * in.inner + c]);
}

// Rates in memory, [state][number of the rate][lane]; offsets are those of A's Span.
template <class Z>
struct RateSpan {
  using V = vector_t<Z>;
  static constexpr int64_t kCount = kComponents<Z> == 2 ? 3 : 1;
  number_t<Z>* data;

  EAML_INLINE Rate<Z> get(int64_t i) const {
    const number_t<Z>* const from = data + i * kCount;
    constexpr int64_t W = kLanes<Z>;
    if constexpr (kCount == 3)
      return {load<V>(from), {load<V>(from + W), load<V>(from + 2 * W)}};
    else
      return {load<V>(from)};
  }
  // From `count` numbers of A.
  EAML_INLINE void fill(Span<Z> A, int64_t count) const {
    constexpr int64_t W = kLanes<Z>;
    for (int64_t i = 0; i < count; i += W) {
      const number_t<Z>* const from = A.at(i).value;
      number_t<Z>* const to = data + i * kCount;
      for (int64_t lane = 0; lane < W; ++lane) {
        to[lane] = from[lane] * number_t<Z>(kLog2e);
        if constexpr (kCount == 3) {
          const auto angle = half_turns(from[W + lane]);
          to[W + lane] = angle.high, to[2 * W + lane] = angle.low;
        }
      }
    }
  }
};

// A of the states in flight.
template <class Z>
struct Rates {
  Z A[kStates<Z>];
  Rate<Z> rate[kStates<Z>];
  EAML_INLINE Rates(Span<Z> from, RateSpan<Z> prepared, int64_t offset) {
    read(A, from.at(offset));
    each_state<Z>([&](auto n) EAML_LAMBDA { rate[n] = prepared.get(offset + n * kLanes<Z>); });
  }
};

// A chunk cut where the state is reset, so that the loops over time inside are free of branches.
struct Segments {
  int64_t count, begin[kChunk + 1];  // begin[count]: the end of the chunk
  bool first_reset;                  // of the first segment; all others start with a reset
  EAML_INLINE bool reset(int64_t segment) const { return segment > 0 || first_reset; }
};

// Rows of the caller's memory that are needed next. The loops over time prefetch two streams, a row of each per step:
// all at once, or left to the processor (which does not see rows of a matrix coming), they would stall it.
struct Stream {
  const char* row;
  int64_t step;  // in bytes
  EAML_INLINE void prefetch(int64_t t) const { EAML_PREFETCH(row + t * step); }
};
struct Streams {
  Stream first, second;
  EAML_INLINE void prefetch(int64_t t) const { first.prefetch(t), second.prefetch(t); }
};

// The part of a unit's scratch memory that forward and backward share, and how it is filled.
template <class Z>
struct Unit {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  static constexpr int64_t W = kLanes<Z>;

  const Shape& shape;
  const Source<S>& source;
  Place at, after;       // and the unit that is likely to come next
  int64_t padded;        // states, rounded up to whole groups
  Span<Z> A;             // [block][state][lane]
  RateSpan<Z> prepared;  // A as `decay` takes it
  Span<S> D, bias;       // [block][lane]
  bool lane;             // B and C are laid out per lane, because one of them is invariant in time
  Matrix<Z> B, C;        // of the current chunk (invariant: of the current block)
  Span<Z> memory_B, memory_C;
  StepTile<S> dt, x, y;  // of the current chunk and block
  StepTile<S> memory_u, memory_delta, memory_z;
  View<S> u, z;
  Segments segments;
  static constexpr int64_t kStreams = 12;
  Stream coming[kStreams];  // what the calls of view() and target() found: sequences, their tangents, outputs
  int64_t streams;

  EAML_SHARED Unit(Arena& arena, const Shape& s, const Source<S>& src, int64_t index)
      : shape(s),
        source(src),
        at(place<T>(s, index)),
        after(place<T>(s, std::min(index + 1, s.batch * units<T>(s) - 1))),
        padded((s.state + kStates<Z> - 1) / kStates<Z> * kStates<Z>),
        lane(s.B_invariant || s.C_invariant) {
    A = take<Z>(arena, blocks() * padded * W);
    prepared.data = arena.take<T>(blocks() * padded * W * prepared.kCount);
    D = take<S>(arena, blocks() * W);
    bias = take<S>(arena, blocks() * W);
    for (int64_t block = 0; block < blocks(); ++block) {
      source.each(&Inputs<T>::A, A.at(block * padded * W), [&](T* to, const In<T>& in) {
        stage_matrix<V, kComponents<Z>>(to, in, at.row, channel(block), lanes(block), shape.state, padded);
      });
      // States that only fill a group decay like others: of an infinite step, exp(inf 0) would be NaN.
      for (int64_t n = shape.state; n < padded; ++n) std::fill_n(A.at((block * padded + n) * W).value, W, T(-1));
      source.each(&Inputs<T>::D, D.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector<W>(to, in, at.row, channel(block), lanes(block)); });
      source.each(&Inputs<T>::delta_bias, bias.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector<W>(to, in, at.row, channel(block), lanes(block)); });
    }
    prepared.fill(A, blocks() * padded * W);
    const int64_t size = kChunk * padded * (lane ? W : 1);
    B = {memory_B = take<Z>(arena, size), 0}, C = {memory_C = take<Z>(arena, size), 0};
    for (StepTile<S>* tile : {&dt, &x, &y, &memory_u, &memory_delta, &memory_z}) *tile = step_tile<S>(arena);
  }

  int64_t blocks() const { return (at.channels + W - 1) / W; }
  int64_t lanes(int64_t block) const { return std::min(W, at.channels - block * W); }
  int64_t channel(int64_t block) const { return at.first + block * W; }
  int64_t chunks() const { return (shape.length + kChunk - 1) / kChunk; }
  int64_t end_chunk() const { return std::min(shape.end_chunk, chunks()); }

  // What the states from n on prefetch; the arrays' own memory, which is at hand, where there is nothing more to come.
  EAML_INLINE Streams streams_from(int64_t n) const {
    const int64_t i = n / kStates<Z> * 2;
    const Stream none{reinterpret_cast<const char*>(dt.value), 0};
    return {i < streams ? coming[i] : none, i + 1 < streams ? coming[i + 1] : none};
  }
  EAML_INLINE Rates<Z> rates(int64_t j) const { return {A, prepared, j}; }

  // What a call starts from: `given`, the initial state or a cotangent of the last one, or what stands for it.
  EAML_SHARED void stage_first(In<T> Inputs<T>::* given, Span<Z> to, int64_t block) const {
    if (source.values.carry != nullptr) {
      stage_saved(to.value, source.values.carry, at.row, block);
      if constexpr (kIsDual<S>) stage_saved(to.tangent, source.tangents->carry, at.row, block);
      return;
    }
    source.each(given, to, [&](T* matrix, const In<T>& in) {
      stage_matrix<V, kComponents<Z>>(matrix, in, at.row, channel(block), lanes(block), shape.state, padded);
    });
  }

  // One block of one component of a saved state, in [state][component][lane].
  EAML_SHARED void stage_saved(T* to, const T* all, int64_t index, int64_t block) const {
    stage_matrix<V, 1>(to, saved_state(all, shape, index), 0, channel(block), lanes(block),
                       shape.state * kComponents<Z>, padded * kComponents<Z>);
  }
  EAML_SHARED void save(T* all, int64_t index, const T* matrix, int64_t block) const {
    if (all == nullptr) return;
    T* const to = all + index * shape.all_states * shape.components * shape.dim + channel(block);
    store_matrix<V, 1>(to, 1, shape.dim, matrix, lanes(block), shape.state * kComponents<Z>);
  }

  // What all blocks of the unit share in a chunk: resets, and B and C where they vary in time.
  EAML_SHARED void stage_chunk(int64_t start, int64_t steps) {
    segments.count = 1, segments.begin[0] = 0, segments.first_reset = false;
    if (shape.reset) {
      const bool* reset = shape.reset + at.row * shape.reset_outer + start * shape.reset_inner;
      segments.first_reset = reset[0];
      for (int64_t t = 1; t < steps; ++t)
        if (reset[t * shape.reset_inner]) segments.begin[segments.count++] = t;
    }
    segments.begin[segments.count] = steps;
    if (!shape.B_invariant) stage_variable(&Inputs<T>::B, memory_B, B, start, steps);
    if (!shape.C_invariant) stage_variable(&Inputs<T>::C, memory_C, C, start, steps);
  }

  // Of a B or C that varies in time: read where it lies if its states are neighbours there, or copied to `memory`.
  EAML_SHARED void stage_variable(In<T> Inputs<T>::* member, Span<Z> memory, Matrix<Z>& matrix, int64_t start,
                                  int64_t steps) const {
    constexpr int64_t count = kComponents<Z>;
    const auto first = [&](const In<T>& in) EAML_LAMBDA {
      return const_cast<T*>(in.data + at.row * in.outer + at.group * in.group + start * in.inner);
    };
    const In<T>& in = source.values.*member;
    bool lies = !lane && padded == shape.state && in.channel == count && in.inner % count == 0;
    if constexpr (kIsDual<S>) {
      const In<T>& along = source.tangents->*member;
      lies = lies && along.data != nullptr && along.channel == count && along.inner == in.inner;
      if (lies) matrix.data.tangent = first(along);
    }
    if (lies) {
      matrix.data.value = first(in), matrix.step = in.inner / count;
      return;
    }
    matrix = {memory, lane ? padded * W : padded};
    source.each(member, memory, [&](T* to, const In<T>& from) {
      if (lane)
        stage_states<W, count>(to, from, at, shape.state, padded, start, steps);
      else
        stage_states<1, count>(to, from, at, shape.state, padded, start, steps);
    });
  }

  EAML_SHARED void stage_invariant(int64_t block) const {
    const auto stage = [&](In<T> Inputs<T>::* member, const Matrix<Z>& matrix) {
      source.each(member, matrix.data, [&](T* to, const In<T>& in) {
        stage_matrix<V, kComponents<Z>>(to, in, at.row, channel(block), lanes(block), shape.state, padded);
      });
    };
    if (shape.B_invariant) stage(&Inputs<T>::B, B);
    if (shape.C_invariant) stage(&Inputs<T>::C, C);
  }

  // The chunk of an input, copied to `tile` only where lanes are not adjacent. The next chunk starts `ahead` steps on.
  View<S> view(In<T> Inputs<T>::* member, StepTile<S> tile, int64_t block, int64_t start, int64_t steps,
               int64_t ahead) {
    const View<V> value = rows(tile.value, source.values.*member, block, start, steps, ahead);
    if constexpr (kIsDual<S>) {
      const View<V> tangent = rows(tile.tangent(), source.tangents->*member, block, start, steps, ahead);
      return {value.value, value.step, tangent.value, tangent.step};
    } else {
      return value;
    }
  }
  EAML_SHARED View<V> rows(T* to, const In<T>& in, int64_t block, int64_t start, int64_t steps, int64_t ahead) {
    const bool adjacent = in.data != nullptr && in.channel == 1 && lanes(block) == W;
    if constexpr (sizeof(T) == 4) {
      if (in.data != nullptr && in.half != Half::kNone) {
        if (!adjacent) {
          stage_half_tile<W>(to, in, at.row, channel(block), lanes(block), start, steps);
        } else {
          const std::uint16_t* const row = halves(in.data) + at.row * in.outer + channel(block) + start * in.inner;
          come(halves(in.data), in, block, start, ahead);
          with_half(in.half, [&](auto half) EAML_LAMBDA {
            for (int64_t t = 0; t < steps; ++t) store(to + t * W, load_half<half, V>(row + t * in.inner));
          });
        }
        return {to, W};
      }
    }
    if (adjacent) {
      const T* const row = origin(in, at.row, channel(block)) + start * in.inner;
      come(in.data, in, block, start, ahead);
      return {row, in.inner};
    }
    stage_tile<W>(to, in, at.row, channel(block), lanes(block), start, steps, ahead);
    return {to, W};
  }

  // Where a chunk of an output goes; store_tile does the rest.
  EAML_SHARED Target<V> target(const Out<T>& out, T* tile, int64_t block, int64_t start, int64_t ahead) {
    if (!has_rows<V>(out, lanes(block))) return {tile, W};
    T* const row = out.data + at.row * out.outer + channel(block) + start * out.inner;
    come(out.data, out, block, start, ahead);
    return {row, out.inner};
  }

  // The same of halves, null where rows cannot be written one by one.
  std::uint16_t* half_target(const Out<T>& out, int64_t block, int64_t start, int64_t ahead) {
    if (out.data == nullptr || out.half == Half::kNone || out.channel != 1 || lanes(block) != W) return nullptr;
    std::uint16_t* const data = reinterpret_cast<std::uint16_t*>(out.data);
    come(data, out, block, start, ahead);
    return data + at.row * out.outer + channel(block) + start * out.inner;
  }

  // Has the rows prefetched that the loops come to next: the next block's, the next chunk's, or the next unit's.
  template <class N, class Sequence>
  void come(const N* data, const Sequence& sequence, int64_t block, int64_t start, int64_t ahead) {
    if (streams == kStreams) return;
    int64_t row = at.row, next = channel(block) + W, t = start;
    if (block + 1 == blocks()) {
      next = at.first, t += ahead;
      if (t < 0 || t >= shape.length) row = after.row, next = after.first, t = ahead < 0 ? (chunks() - 1) * kChunk : 0;
    }
    const N* const from = data + offset_of(sequence, row) + next * sequence.channel + t * sequence.inner;
    coming[streams++] = {reinterpret_cast<const char*>(from), sequence.inner * int64_t(sizeof(N))};
  }

  // dt = softplus(delta + bias), x = dt u, y = D u where the sum over states starts; with `slope`, also d dt / d delta.
  template <bool kSlope>
  EAML_SHARED void stage_block(int64_t block, int64_t start, int64_t steps, StepTile<S> slope) {
    stage_invariant(block);
    streams = 0;
    constexpr int64_t ahead = kSlope ? -kChunk : kChunk;  // backward walks backward
    if (shape.gated) z = view(&Inputs<T>::z, memory_z, block, start, steps, ahead);
    if constexpr (sizeof(T) == 4 && !kSlope && !kIsDual<S>) {  // nobody reads u and delta of forward once more
      const In<T>&in_u = source.values.u, &in_delta = source.values.delta;
      if (in_u.half != Half::kNone && lanes(block) == W && in_u.channel == 1 && in_delta.channel == 1) {
        const auto rows = [&](const In<T>& in) EAML_LAMBDA {
          come(halves(in.data), in, block, start, ahead);
          return halves(in.data) + at.row * in.outer + channel(block) + start * in.inner;
        };
        return with_half(in_u.half, [&](auto half) EAML_LAMBDA {
          const HalfView<half, V> u_{rows(in_u), in_u.inner}, delta{rows(in_delta), in_delta.inner};
          stage_steps<kSlope>(block, steps, slope, u_, delta);
        });
      }
    }
    u = view(&Inputs<T>::u, memory_u, block, start, steps, ahead);
    stage_steps<kSlope>(block, steps, slope, u, view(&Inputs<T>::delta, memory_delta, block, start, steps, ahead));
  }

  template <bool kSlope, class Sequence>
  void stage_steps(int64_t block, int64_t steps, StepTile<S> slope, Sequence u_, Sequence delta) {
    const StepTile<S> dt_ = dt, x_ = x, y_ = y;
    const S offset = bias.get(block * W), d = D.get(block * W);
    const bool sums = !kSlope || shape.gated;  // backward needs y for the gate alone
    const auto each = [&](auto f) EAML_LAMBDA {
      for (int64_t t = 0; t < steps; t += kTogether) {
        int64_t rows[kTogether];
        for (int k = 0; k < kTogether; ++k) rows[k] = std::min(t + k, steps - 1);  // the last step may be done twice
        S shifted[kTogether];
        Softplus<S> step[kTogether];
        EAML_UNROLL
        for (int k = 0; k < kTogether; ++k) shifted[k] = delta.get(rows[k]) + offset;
        f(shifted, step);
        EAML_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const S input = u_.get(rows[k]);
          dt_.set(rows[k] * W, step[k].value), x_.set(rows[k] * W, step[k].value * input);
          if (sums) y_.set(rows[k] * W, d * input);
          if constexpr (kSlope) slope.set(rows[k] * W, step[k].slope);
        }
      }
    };
    using Rows = S[kTogether];
    using Steps = Softplus<S>[kTogether];
    if (shape.softplus)
      each([](const Rows& v, Steps& out) EAML_LAMBDA { softplus(v, out); });
    else
      each([](const Rows& v, Steps& out) EAML_LAMBDA {
        for (int k = 0; k < kTogether; ++k) out[k] = {v[k], one<S>()};
      });
  }
};

// y + sum C h over a group.
template <class Z, bool kLane>
EAML_INLINE real_t<Z> add_outputs(real_t<Z> y, const Z (&h)[kStates<Z>], Operand<Z, kLane> C, int64_t t) {
  real_t<Z> sum = kComponents<Z> == 2 ? real_t<Z>{} : y;
  each_state<Z>([&](auto n) EAML_LAMBDA { sum = sum + real(h[n] * C.get(t, n)); });
  return kComponents<Z> == 2 ? y + both<Z>(sum) : sum;
}

// Advances the states of a group through a chunk and, if kOutput, adds C h to y.
template <bool kOutput, class Z, bool kLane>
EAML_INLINE void forward_states(const Segments& segments, Streams coming, Rates<Z> rates, Span<Z> state,
                                StepTile<real_t<Z>> dt, StepTile<real_t<Z>> x, Operand<Z, kLane> B, Operand<Z, kLane> C,
                                StepTile<real_t<Z>> y) {
  constexpr int64_t W = kLanes<Z>;
  Z h[kStates<Z>], a[kStates<Z>];
  read(h, state);
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    if (segments.reset(segment)) forget(h);
    for (int64_t t = segments.begin[segment]; t < segments.begin[segment + 1]; ++t) {
      const real_t<Z> step = dt.get(t * W), input = x.get(t * W);
      coming.prefetch(t);
      decay(step, rates.A, rates.rate, a);
      each_state<Z>([&](auto n) EAML_LAMBDA { h[n] = advance(a[n], h[n], input, B.get(t, n)); });
      if constexpr (kOutput) y.set(t * W, add_outputs<Z>(y.get(t * W), h, C, t));
    }
  }
  write(state, h);
}

// Writes a chunk of y, gated, or adds a part's share to it; as halves, which have one part, to `half_row`.
template <class Z>
EAML_SHARED void write_outputs(const Unit<Z>& unit, int64_t steps, bool first_part, Half half, std::uint16_t* half_row,
                               int64_t half_step, Target<vector_t<Z>> to) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  const StepTile<S> y = unit.y;
  const auto each = [&](auto put) EAML_LAMBDA {
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t i = t * kLanes<Z>;
      if (unit.shape.gated) {
        const S gate = unit.z.get(t);
        put(t, output(y.get(i) * (gate * sigmoid(gate))));
      } else {
        put(t, output(y.get(i)));
      }
    }
  };
  if (half_row)
    with_half(half, [&](auto kind) EAML_LAMBDA {
      each([&](int64_t t, V term) EAML_LAMBDA { store_narrow<kind>(half_row + t * half_step, term); });
    });
  else if (first_part)
    each([&](int64_t t, V term) EAML_LAMBDA { to.set(t, term); });
  else
    each([&](int64_t t, V term) EAML_LAMBDA { to.set(t, to.get(t) + rounded(term)); });
}

// Advances the states of a part of a block through a chunk.
template <bool kOutput, bool kLane, class Z>
EAML_SHARED void forward_part(const Unit<Z>& unit, int64_t part, Span<Z> state, int64_t offset) {
  constexpr int64_t W = kLanes<Z>;
  for (int64_t n = part_begin(unit.shape, part); n < part_begin(unit.shape, part + 1); n += kStates<Z>)
    forward_states<kOutput, Z, kLane>(unit.segments, unit.streams_from(n), unit.rates(offset + n * W), state.at(n * W),
                                      unit.dt, unit.x, {unit.B, n}, {unit.C, n}, unit.y);
}

template <class Z>
EAML_SHARED void forward_unit(Arena& arena, const Shape& shape, const Source<real_t<Z>>& source,
                              const Outputs<number_t<Z>>& out, int64_t index) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  constexpr int64_t W = kLanes<Z>, components = kComponents<Z>;
  Unit<Z> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, chunks = unit.chunks();
  const Span<Z> h = take<Z>(arena, unit.blocks() * size);
  T* const tile = arena.take<T>(kChunk * W);
  for (int64_t block = 0; block < unit.blocks(); ++block)
    unit.stage_first(&Inputs<T>::initial_state, h.at(block * size), block);

  const bool saved_alone = !out.y.data && !out.last_state.data && !out.carry;  // no chunk starts after the last one
  const int64_t end = saved_alone ? std::min(unit.end_chunk(), chunks - 1) : unit.end_chunk();
  for (int64_t chunk = shape.first_chunk; chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, shape.length - start);
    unit.stage_chunk(start, steps);
    for (int64_t block = 0; block < unit.blocks(); ++block) {
      const Span<Z> state = h.at(block * size);
      // What infinite inputs leave in states that only fill a group ends with a chunk, as where a call starts later.
      if (unit.padded > shape.state) clear(state.at(shape.state * W), (unit.padded - shape.state) * W);
      unit.template stage_block<false>(block, start, steps, {});
      const Target<V> to = unit.target(out.y, tile, block, start, kChunk);
      std::uint16_t* const half_row = unit.half_target(out.y, block, start, kChunk);
      for (int64_t part = 0; part < shape.parts; ++part) {
        if (part > 0) clear<S>(unit.y, steps * W);
        const bool writes = out.y.data != nullptr;
        if (unit.lane)
          writes ? forward_part<true, true>(unit, part, state, block * size)
                 : forward_part<false, true>(unit, part, state, block * size);
        else
          writes ? forward_part<true, false>(unit, part, state, block * size)
                 : forward_part<false, false>(unit, part, state, block * size);
        if (!writes) continue;
        write_outputs<Z>(unit, steps, part == 0, out.y.half, half_row, out.y.inner, to);
      }
      if (!half_row) store_tile<V>(out.y, tile, row, unit.channel(block), unit.lanes(block), start, steps);
      if (chunk + 1 < chunks) {
        const int64_t next = row * (chunks - 1) + chunk;
        unit.save(out.checkpoints, next, state.value, block);
        if constexpr (kIsDual<S>) unit.save(out.checkpoint_tangents, next, state.tangent, block);
      }
    }
  }

  for (int64_t block = 0; block < unit.blocks(); ++block) {
    unit.save(out.carry, row, h.at(block * size).value, block);
    if constexpr (kIsDual<S>) unit.save(out.carry_tangent, row, h.at(block * size).tangent, block);
    const Out<T>& to = out.last_state;
    if (to.data == nullptr || unit.end_chunk() < chunks) continue;
    store_matrix<V, components>(to.data + row * to.outer + unit.channel(block) * to.channel, to.channel, to.inner,
                                h.at(block * size).written(), unit.lanes(block), shape.state);
  }
}

// Whether a call is one step whose states lie side by side in memory, in full vectors: as RL calls it.
template <class V, class T = element_t<V>>
EAML_INLINE bool one_step(const Shape& shape, const Inputs<T>& in, const Outputs<T>& out) {
  const bool plain = in.u.half == Half::kNone && in.delta.half == Half::kNone && in.z.half == Half::kNone;
  return shape.length == 1 && shape.state % Lanes<V>::count == 0 && shape.parts == 1 && !shape.reset && plain &&
         !shape.B_invariant && !shape.C_invariant && in.A.inner == 1 && in.initial_state.inner == 1 && out.y.data &&
         out.last_state.inner == 1 && !out.checkpoints && out.y.half == Half::kNone;
}

// Such a step with lanes for states, and no state transposed. Four channels go side by side; the last may be done
// twice.
template <class V, class T = element_t<V>>
EAML_SHARED void step_unit(Arena& arena, const Shape& shape, const Inputs<T>& in, const Outputs<T>& out,
                           int64_t index) {
  constexpr int64_t W = Lanes<V>::count;
  constexpr int kChannels = 2 * kVectors;
  const Place at = place<T>(shape, index);
  const int64_t padded = (at.channels + W - 1) / W * W;
  const auto channels = [&](const In<T>& of) {
    T* const to = arena.take<T>(padded);
    std::fill_n(to + padded - W, W, T(0));
    if (of.data == nullptr)
      std::fill_n(to, padded, T(0));
    else if (of.channel == 1)
      std::copy_n(origin(of, at.row, at.first), at.channels, to);
    else
      for (int64_t i = 0; i < at.channels; ++i) to[i] = origin(of, at.row, at.first)[i * of.channel];
    return to;
  };
  const auto states = [&](const In<T>& of) {
    T* const to = arena.take<T>(shape.state);
    for (int64_t n = 0; n < shape.state; ++n) to[n] = of.data[at.row * of.outer + at.group * of.group + n * of.channel];
    return to;
  };
  T *const u = channels(in.u), *const delta = channels(in.delta), *const bias = channels(in.delta_bias);
  T *const y = channels(in.D), *const gate = channels(in.z), *const B = states(in.B), *const C = states(in.C);
  T *const x = arena.take<T>(padded), *const dt2 = arena.take<T>(padded);  // dt u, dt log2(e)
  T* const contracted = arena.take<T>(padded + kChannels);
  for (int64_t i = 0; i < padded; i += W) {
    const V shifted[1] = {load<V>(delta + i) + load<V>(bias + i)}, input = load<V>(u + i);
    Softplus<V> step[1] = {{shifted[0], V{}}};
    if (shape.softplus) softplus(shifted, step);
    store(dt2 + i, step[0].value * T(kLog2e)), store(x + i, step[0].value * input),
        store(y + i, load<V>(y + i) * input);
  }

  const T* const A = origin(in.A, at.row, at.first);
  const T* const before = origin(in.initial_state, at.row, at.first);
  T* const after = out.last_state.data + at.row * out.last_state.outer + at.first * out.last_state.channel;
  for (int64_t i = 0; i < at.channels; i += kChannels) {
    int64_t channel[kChannels];
    V sums[kChannels / kVectors][kVectors];
    EAML_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      channel[k] = std::min<int64_t>(i + k, at.channels - 1);
      sums[k / kVectors][k % kVectors] = V{};
    }
    for (int64_t n = 0; n < shape.state; n += W) {
      V t[kChannels], a[kChannels];
      EAML_UNROLL
      for (int k = 0; k < kChannels; ++k) t[k] = load<V>(A + channel[k] * in.A.channel + n) * dt2[channel[k]];
      exp2_(t, a);
      EAML_UNROLL
      for (int k = 0; k < kChannels; ++k) {
        const V h_prev = load<V>(before + channel[k] * in.initial_state.channel + n);
        const V h = advance(a[k], h_prev, load<V>(B + n), x[channel[k]]);
        store(after + channel[k] * out.last_state.channel + n, h);
        sums[k / kVectors][k % kVectors] = sums[k / kVectors][k % kVectors] + h * load<V>(C + n);
      }
    }
    EAML_UNROLL
    for (int k = 0; k < kChannels; k += kVectors) {
      alignas(kAlignment) T folded[kFolded<V>] = {};
      add_folded(folded, sums[k / kVectors]);
      unfold<V>(contracted + i + k, folded);
    }
  }

  for (int64_t i = 0; i < padded; i += W) {
    const V z = load<V>(gate + i), sum = load<V>(y + i) + load<V>(contracted + i);
    store(y + i, shape.gated ? sum * (z * sigmoid(z)) : sum);
  }
  T* const to = out.y.data + at.row * out.y.outer + at.first * out.y.channel;
  if (out.y.channel == 1)
    std::copy_n(y, at.channels, to);
  else
    for (int64_t i = 0; i < at.channels; ++i) to[i * out.y.channel] = y[i];
}

// The gradients that backward accumulates; plain numbers, also in a Dual run, where they are tangents.
template <class Z>
struct Sums {
  Span<output_t<Z>> A, B, C;  // of one group: [state][lane]; [step][kFolded], or (kLane) [step][state][lane]
  int64_t B_step, C_step;     // 0 where B, C are invariant in time: all steps add to one place
};

// Gradients of one chunk and block.
template <class S>
struct ChunkGradients {
  View<S> y;          // in
  StepTile<S> x, dt;  // sums over states of dL/dx, and of dL/d(dt A) A
};

// Adds the terms of the states in flight to a step's sums over lanes.
template <class Z, bool kLane>
EAML_INLINE void add_terms(Span<output_t<Z>> sums, const output_t<Z> (&terms)[kStates<Z>]) {
  if constexpr (!kLane) return add_folded(sums.value, terms);
  each_state<Z>([&](auto n) EAML_LAMBDA { sums.set(n * kLanes<Z>, sums.get(n * kLanes<Z>) + terms[n]); });
}

// Takes the states of a group back through a chunk, from `start`, their values before it; a gate needs y again.
template <bool kGated, class Z, bool kLane>
EAML_INLINE void backward_states(const Segments& segments, Streams coming, Rates<Z> rates, Span<Z> start,
                                 StepTile<real_t<Z>> dt, StepTile<real_t<Z>> x, Operand<Z, kLane> B,
                                 Operand<Z, kLane> C, StepTile<real_t<Z>> y, Span<Z> grad_state,
                                 ChunkGradients<real_t<Z>> grad, GroupTile<Z> decays, GroupTile<Z> kept, Sums<Z> sums) {
  using S = real_t<Z>;
  constexpr int64_t W = kLanes<Z>, size = kGroup<Z>;
  const auto cotangent = [&](int64_t t) EAML_LAMBDA { return both<Z>(grad.y.get(t)); };

  Z h[kStates<Z>];
  read(h, start);
  for (int64_t segment = 0; segment < segments.count; ++segment) {
    if (segments.reset(segment)) forget(h);
    for (int64_t t = segments.begin[segment]; t < segments.begin[segment + 1]; ++t) {
      const S step = dt.get(t * W), input = x.get(t * W), gy = cotangent(t);
      Z a[kStates<Z>];
      output_t<Z> terms[kStates<Z>];
      coming.prefetch(t);
      decay(step, rates.A, rates.rate, a);
      each_state<Z>([&](auto n) EAML_LAMBDA {
        const Z rest = decayed(a[n], h[n]);
        decays.set(t * size + n * W, a[n]);
        kept.set(t * size + n * W, rest);
        h[n] = rest + input * B.get(t, n);
        terms[n] = output(times_conjugate(gy, h[n]));
      });
      add_terms<Z, kLane>(sums.C.at(t * sums.C_step), terms);
      if constexpr (kGated) y.set(t * W, add_outputs<Z>(y.get(t * W), h, C, t));
    }
  }

  Z grad_h[kStates<Z>];
  output_t<Z> sum_A[kStates<Z>];
  read(grad_h, grad_state);
  read(sum_A, sums.A);
  for (int64_t segment = segments.count - 1; segment >= 0; --segment) {
    for (int64_t t = segments.begin[segment + 1] - 1; t >= segments.begin[segment]; --t) {
      const S gy = cotangent(t), step = dt.get(t * W), input = x.get(t * W);
      S gx = grad.x.get(t * W), gdt = grad.dt.get(t * W);
      output_t<Z> terms[kStates<Z>];
      each_state<Z>([&](auto n) EAML_LAMBDA {
        const int64_t i = t * size + n * W;
        const StepGradient<Z, S> g =
            step_backward(grad_h[n], gy, decays.get(i), kept.get(i), input, B.get(t, n), C.get(t, n));
        grad_h[n] = g.h_prev;
        terms[n] = output(g.B);
        gx = gx + g.x;
        gdt = gdt + real(times_conjugate(g.dt_A, rates.A[n]));
        sum_A[n] = sum_A[n] + output(g.dt_A * step);
      });
      add_terms<Z, kLane>(sums.B.at(t * sums.B_step), terms);
      grad.x.set(t * W, gx);
      grad.dt.set(t * W, gdt);
    }
    if (segments.reset(segment)) forget(grad_h);
  }
  write(grad_state, grad_h);
  write(sums.A, sum_A);
}

// Where the gradients of one chunk and block of the sequences go.
template <class V>
struct SequenceTargets {
  Target<V> u, delta, z;
};

// From the gradients of x and dt, those of u, delta and z, written or, after the first part, added; and the chunk's
// share of those of D and delta_bias.
template <class Z>
EAML_SHARED void write_gradients(const Unit<Z>& unit, int64_t block, int64_t steps, bool first_part,
                                 const ChunkGradients<real_t<Z>>& grad, View<real_t<Z>> gy, StepTile<real_t<Z>> slope,
                                 StepTile<real_t<Z>> gate, const SequenceTargets<vector_t<Z>>& to, number_t<Z>* sum_D,
                                 number_t<Z>* sum_bias) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  constexpr int64_t W = kLanes<Z>;
  const auto each = [&](auto put, auto first) EAML_LAMBDA {
    const S d = first ? unit.D.get(block * W) : S{};
    V block_D = load<V>(sum_D), block_bias = load<V>(sum_bias);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t j = t * W;
      const S gx = grad.x.get(j), input = unit.u.get(t);
      const V grad_delta = output((grad.dt.get(j) + input * gx) * slope.get(j));
      put(to.u, t, output(unit.dt.get(j) * gx + d * grad.y.get(t)));
      put(to.delta, t, grad_delta);
      block_bias += grad_delta;
      if (first) block_D += output(grad.y.get(t) * input);
      if (unit.shape.gated) {
        const S s = gate.get(j);
        put(to.z, t, output(gy.get(t) * unit.y.get(j) * (s + unit.z.get(t) * (s * (one<S>() - s)))));
      }
    }
    store(sum_D, block_D), store(sum_bias, block_bias);
  };
  if (first_part)
    each([](Target<V> at, int64_t t, V x) EAML_LAMBDA { at.set(t, x); }, std::true_type());
  else
    each([](Target<V> at, int64_t t, V x) EAML_LAMBDA { at.set(t, at.get(t) + rounded(x)); }, std::false_type());
}

// What the states of a part of a block are taken back with, and where their sums go.
template <class Z>
struct PartGradients {
  Span<Z> start, grad_state;  // of the block
  ChunkGradients<real_t<Z>> grad;
  GroupTile<Z> decays, kept;
  Span<output_t<Z>> sum_A;         // of the block
  Span<output_t<Z>> sum_B, sum_C;  // of the block, or of the chunk
};

// Numbers in a step's terms of B or C of one group, not yet summed over lanes.
template <class Z>
constexpr int64_t row_size(bool lane) {
  return lane ? kGroup<Z> : kFolded<vector_t<Z>> / kComponents<Z>;
}

template <bool kGated, bool kLane, class Z>
EAML_SHARED void backward_part(const Unit<Z>& unit, int64_t part, int64_t offset, const PartGradients<Z>& with) {
  constexpr int64_t W = kLanes<Z>, row = row_size<Z>(kLane);
  const Shape& shape = unit.shape;
  for (int64_t n = part_begin(shape, part); n < part_begin(shape, part + 1); n += kStates<Z>) {
    const int64_t j = n * W, k = n / kStates<Z> * kChunk * row;
    const Sums<Z> sums{with.sum_A.at(j), with.sum_B.at(shape.B_invariant ? j : k),
                       with.sum_C.at(shape.C_invariant ? j : k), shape.B_invariant ? 0 : row,
                       shape.C_invariant ? 0 : row};
    backward_states<kGated, Z, kLane>(unit.segments, unit.streams_from(n), unit.rates(offset + j), with.start.at(j),
                                      unit.dt, unit.x, {unit.B, n}, {unit.C, n}, unit.y, with.grad_state.at(j),
                                      with.grad, with.decays, with.kept, sums);
  }
}

// Stores the sums over lanes of a chunk's terms of B or C, [group of states][step][..], in (state, length) from `to`
// on.
template <class Z, bool kLane>
EAML_SHARED void reduce_lanes(number_t<Z>* to, Span<output_t<Z>> sums, const Shape& shape, int64_t steps) {
  using V = vector_t<Z>;
  constexpr int64_t row = row_size<Z>(kLane);
  number_t<Z> line[kChunk * kVectors];
  for (int64_t n = 0; n < shape.state; n += kStates<Z>) {
    const Span<output_t<Z>> rows = sums.at(n / kStates<Z> * kChunk * row);
    if constexpr (kLane) {
      sum_lanes<V>(line, rows.value);
    } else {
      for (int64_t t = 0; t < kChunk; ++t) unfold<V>(line + t * kVectors, rows.at(t * row).value);
    }
    number_t<Z>* const first = to + n * shape.length * kComponents<Z>;
    const int64_t count = std::min<int64_t>(kStates<Z>, shape.state - n);
    if constexpr (kComponents<Z> == 2)
      scatter_steps(first, shape.length, line, steps, count);
    else
      transpose(first, shape.length, line, kVectors, steps, count);
  }
}

template <class Z>
EAML_SHARED void backward_unit(Arena& arena, const Shape& shape, const Source<real_t<Z>>& source,
                               const Gradients<number_t<Z>>& out, int64_t index) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  constexpr int64_t W = kLanes<Z>, tile = kChunk * W, components = kComponents<Z>;
  Unit<Z> unit(arena, shape, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, blocks = unit.blocks(), chunks = unit.chunks();

  const Span<Z> grad_h = take<Z>(arena, blocks * size), h0 = take<Z>(arena, size);
  const GroupTile<Z> decays = group_tile<Z>(arena), kept = group_tile<Z>(arena);
  const StepTile<S> slope = step_tile<S>(arena), memory_gy = step_tile<S>(arena);
  const StepTile<S> gate = step_tile<S>(arena);  // sigmoid(z)
  const StepTile<S> gated_gy = step_tile<S>(arena), grad_x = step_tile<S>(arena), grad_dt = step_tile<S>(arena);
  const auto zeroed = [&](int64_t count) {
    T* const sum = arena.take<T>(count);
    std::fill_n(sum, count, T(0));
    return sum;
  };
  const auto zeroed_states = [&](int64_t count) { return Span<output_t<Z>>{zeroed(count * components)}; };
  const Span<output_t<Z>> sum_A = zeroed_states(blocks * size);
  const int64_t sums_size = unit.padded / kStates<Z> * kChunk * row_size<Z>(unit.lane);  // [group][step][..]
  const Span<output_t<Z>> sum_B = zeroed_states(shape.B_invariant ? blocks * size : sums_size);
  const Span<output_t<Z>> sum_C = zeroed_states(shape.C_invariant ? blocks * size : sums_size);
  T* const sum_D = zeroed(blocks * W);
  T* const sum_bias = zeroed(shape.parts * blocks * W);  // [part][block][lane]
  T* const tile_u = arena.take<T>(tile);
  T* const tile_delta = arena.take<T>(tile);
  T* const tile_z = arena.take<T>(tile);
  for (int64_t block = 0; block < blocks; ++block)
    unit.stage_first(&Inputs<T>::grad_state, grad_h.at(block * size), block);

  for (int64_t chunk = unit.end_chunk() - 1; chunk >= shape.first_chunk; --chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, shape.length - start);
    unit.stage_chunk(start, steps);
    if (!shape.B_invariant) clear(sum_B, sums_size);
    if (!shape.C_invariant) clear(sum_C, sums_size);

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = unit.channel(block), lanes = unit.lanes(block);
      unit.template stage_block<true>(block, start, steps, slope);
      const View<S> z = unit.z, gy = unit.view(&Inputs<T>::grad_y, memory_gy, block, start, steps, -kChunk);
      const StepTile<S> y = unit.y;
      const SequenceTargets<V> to{unit.target(out.u, tile_u, block, start, -kChunk),
                                  unit.target(out.delta, tile_delta, block, start, -kChunk),
                                  unit.target(out.z, tile_z, block, start, -kChunk)};
      ChunkGradients<S> grad{gy, grad_x, grad_dt};
      if (shape.gated) {
        for (int64_t t = 0; t < steps; ++t) {
          const S s = sigmoid(z.get(t));
          gate.set(t * W, s), gated_gy.set(t * W, gy.get(t) * (z.get(t) * s));
        }
        grad.y = view_of<S>(gated_gy);
      }
      const auto stage_start = [&](T* to, const T* all) EAML_LAMBDA {
        const int64_t index = row * (chunks - 1) + chunk - 1;
        unit.stage_saved(to, all, index, block);
        // Of the next block, or of the first one in the chunk before, which is the array's previous entry.
        const bool last = block + 1 == blocks;
        const T* const next = saved_state(all, shape, index - last).data + (last ? unit.at.first : channel + W);
        for (int64_t n = 0; n < shape.state * components; ++n) EAML_PREFETCH(next + n * shape.dim);
      };
      if (chunk == 0) {
        source.each(&Inputs<T>::initial_state, h0, [&](T* to, const In<T>& in) {
          stage_matrix<V, components>(to, in, row, channel, lanes, shape.state, unit.padded);
        });
      } else {
        stage_start(h0.value, out.checkpoints);
        if constexpr (kIsDual<S>) stage_start(h0.tangent, out.checkpoint_tangents);
      }
      for (int64_t part = 0; part < shape.parts; ++part) {
        if (part > 0) clear<S>(y, steps * W);
        clear<S>(grad.x, steps * W);
        clear<S>(grad.dt, steps * W);

        const PartGradients<Z> with{h0,
                                    grad_h.at(block * size),
                                    grad,
                                    decays,
                                    kept,
                                    sum_A.at(block * size),
                                    sum_B.at(shape.B_invariant ? block * size : 0),
                                    sum_C.at(shape.C_invariant ? block * size : 0)};
        if (unit.lane)
          shape.gated ? backward_part<true, true>(unit, part, block * size, with)
                      : backward_part<false, true>(unit, part, block * size, with);
        else
          shape.gated ? backward_part<true, false>(unit, part, block * size, with)
                      : backward_part<false, false>(unit, part, block * size, with);
        write_gradients<Z>(unit, block, steps, part == 0, grad, gy, slope, gate, to, sum_D + block * W,
                           sum_bias + (part * blocks + block) * W);
      }
      store_tile<V>(out.u, tile_u, row, channel, lanes, start, steps);
      store_tile<V>(out.delta, tile_delta, row, channel, lanes, start, steps);
      if (shape.gated) store_tile<V>(out.z, tile_z, row, channel, lanes, start, steps);
    }

    const int64_t unit_row = row * units_per_group<T>(shape) * shape.groups + unit.at.unit;
    const int64_t first = (unit_row * shape.all_states * shape.length + start) * components;
    const auto reduce = [&](T* to, Span<output_t<Z>> sums) {
      unit.lane ? reduce_lanes<Z, true>(to, sums, shape, steps) : reduce_lanes<Z, false>(to, sums, shape, steps);
    };
    if (!shape.B_invariant && out.B) reduce(out.B + first, sum_B);
    if (!shape.C_invariant && out.C) reduce(out.C + first, sum_C);
  }

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t channel = row * shape.dim + unit.channel(block), lanes = unit.lanes(block);
    const auto store = [&](T* to, const T* matrix) {
      if (to == nullptr) return;
      const int64_t stride = shape.all_states * components;
      store_matrix<V, components>(to + channel * stride, stride, components, matrix, lanes, shape.state);
    };
    store(out.A, sum_A.at(block * size).value);
    if (shape.B_invariant) store(out.B, sum_B.at(block * size).value);
    if (shape.C_invariant) store(out.C, sum_C.at(block * size).value);
    const Span<Z> state = grad_h.at(block * size);
    if (shape.first_chunk == 0) store(out.initial_state, state.written());
    unit.save(out.carry, row, state.value, block);
    if constexpr (kIsDual<S>) unit.save(out.carry_tangent, row, state.tangent, block);
    if (out.D) std::copy_n(sum_D + block * W, lanes, out.D + channel);
    if (out.delta_bias == nullptr) continue;
    for (int64_t part = 1; part < shape.parts; ++part)
      for (int64_t i = 0; i < lanes; ++i) sum_bias[block * W + i] += sum_bias[(part * blocks + block) * W + i];
    std::copy_n(sum_bias + block * W, lanes, out.delta_bias + channel);
  }
}

template <class Z>
EAML_SHARED void run_forward(const Shape& shape, const Source<real_t<Z>>& source, const Outputs<number_t<Z>>& out,
                             int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    if constexpr (std::is_same_v<Z, vector_t<Z>>) {
      if (one_step<Z>(shape, source.values, out)) {
        step_unit<Z>(arena, shape, source.values, out, index);
        continue;
      }
    }
    forward_unit<Z>(arena, shape, source, out, index);
  }
}

template <class Z>
EAML_SHARED void run_backward(const Shape& shape, const Source<real_t<Z>>& source, const Gradients<number_t<Z>>& out,
                              int64_t begin, int64_t end) {
  static thread_local Arena arena;
  for (int64_t index = begin; index < end; ++index) {
    arena.reset();
    backward_unit<Z>(arena, shape, source, out, index);
  }
}

}  // namespace

EAML_ENTRY void forward(const Shape& shape, const Inputs<Number>& in, const Inputs<Number>* tangents,
                        const Outputs<Number>& out, int64_t begin, int64_t end) {
  if (tangents)
    run_forward<State<Dual<Vector>>>(shape, {in, tangents}, out, begin, end);
  else
    run_forward<State<Vector>>(shape, {in, nullptr}, out, begin, end);
}
EAML_ENTRY void backward(const Shape& shape, const Inputs<Number>& in, const Inputs<Number>* tangents,
                         const Gradients<Number>& out, int64_t begin, int64_t end) {
  if (tangents)
    run_backward<State<Dual<Vector>>>(shape, {in, tangents}, out, begin, end);
  else
    run_backward<State<Vector>>(shape, {in, nullptr}, out, begin, end);
}

}  // namespace EAML_ISA
