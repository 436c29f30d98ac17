// Arrays in memory as the kernels read them: spans, tiles of a chunk, views of the caller's rows, and the unit of work.
// A part of kernel_inl.h.

// Kernels are templates on Z, the type of A, B, C and the states: a vector of lanes V, a Dual<V>, or a Complex of
// either. Sequences have the type real_t<Z>, S: V or Dual<V>.
// number_t<Z> is float or double, the type of one lane.
template <class Z>
using number_t = element_t<vector_t<Z>>;
template <class Z>
constexpr int64_t kLanes = Lanes<vector_t<Z>>::count;

// An array in memory, read and written one vector at a time. An array of duals is two arrays.
template <class V>
struct Span {
  element_t<V>* value;
  EAML_INLINE V get(int64_t i) const { return load<V>(value + i); }
  EAML_INLINE void set(int64_t i, V x) const { store(value + i, x); }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset}; }
  EAML_INLINE element_t<V> number(int64_t i) const { return value[i]; }
  EAML_INLINE element_t<V>* output_data() const { return value; }
};
template <class V>
struct Span<Dual<V>> {
  element_t<V>* value;
  element_t<V>* tangent;
  EAML_INLINE Dual<V> get(int64_t i) const { return {load<V>(value + i), load<V>(tangent + i)}; }
  EAML_INLINE void set(int64_t i, Dual<V> x) const { store(value + i, x.value), store(tangent + i, x.tangent); }
  EAML_INLINE Span at(int64_t offset) const { return {value + offset, tangent + offset}; }
  EAML_INLINE Dual<element_t<V>> number(int64_t i) const { return {value[i], tangent[i]}; }
  EAML_INLINE element_t<V>* output_data() const { return tangent; }  // a Dual run outputs tangents
};

// In an array of complex numbers, each vector of real parts is followed by the vector of imaginary parts. An offset of
// i means i complex numbers.
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

// An array of kSize numbers. Tangents of duals follow the values, so that one address serves both.
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
  using Components = Tile<S, 2 * kSize>;
  EAML_INLINE Complex<S> get(int64_t i) const { return {Components::get(2 * i), Components::get(2 * i + kLanes<S>)}; }
  EAML_INLINE void set(int64_t i, Complex<S> x) const {
    Components::set(2 * i, x.re), Components::set(2 * i + kLanes<S>, x.im);
  }
};

constexpr int kVectors = 4;  // vectors per group of states: enough to hide latency, few enough to stay in registers
// States per group.
template <class Z>
constexpr int kStates = kVectors / kNumComponents<Z>;

constexpr int kSoftplusSteps = 4;  // steps whose softplus is computed together

template <class S>
constexpr int64_t kGroup = kStates<S> * kLanes<S>;  // offset from one step of a group to the next

template <class S>
using StepTile = Tile<S, kChunk * kLanes<S>>;  // [step][lane]
template <class S>
using GroupTile = Tile<S, kChunk * kGroup<S>>;  // [step][state of the group][lane]

template <class S>
EAML_INLINE S one() {
  return splat<vector_t<S>>(number_t<S>(1));
}

// Allocates a Span of `count` numbers in the arena.
template <class S>
EAML_SHARED Span<S> take(Arena& arena, int64_t count) {
  if constexpr (kNumComponents<S> == 2)
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
  return {arena.take<number_t<Z>>((1 + kIsDual<Z>)*kChunk * kGroup<Z> * kNumComponents<Z>)};
}

template <class S>
EAML_INLINE void clear(StepTile<S> tile, int64_t count) {
  std::fill_n(tile.value, count, number_t<S>(0));
  if constexpr (kIsDual<S>) std::fill_n(tile.tangent(), count, number_t<S>(0));
}
template <class Z>
EAML_INLINE void clear(Span<Z> span, int64_t count) {
  std::fill_n(span.value, count * kNumComponents<Z>, number_t<Z>(0));
  if constexpr (kIsDual<Z>) std::fill_n(span.tangent, count * kNumComponents<Z>, number_t<Z>(0));
}

// Calls f(n) for each state of a group, with n a constant. Arrays that stay in registers from step to step must be
// indexed by constants: with a loop variable, gcc stores a copy of each Dual at every step.
template <class F, int... n>
EAML_INLINE void each_state(F f, std::integer_sequence<int, n...>) {
  (f(std::integral_constant<int, n>()), ...);
}
template <class Z, class F>
EAML_INLINE void each_state(F f) {
  each_state(f, std::make_integer_sequence<int, kStates<Z>>());
}

// Copies one vector per state of a group between memory and registers.
template <class S>
EAML_INLINE void read(S (&to)[kStates<S>], Span<S> from) {
  each_state<S>([&](auto n) EAML_LAMBDA { to[n] = from.get(n * kLanes<S>); });
}
template <class S>
EAML_INLINE void write(Span<S> to, const S (&from)[kStates<S>]) {
  each_state<S>([&](auto n) EAML_LAMBDA { to.set(n * kLanes<S>, from[n]); });
}
template <class S>
EAML_INLINE void reset_states(S (&states)[kStates<S>]) {
  each_state<S>([&](auto n) EAML_LAMBDA { states[n] = S{}; });
}

template <class V>
EAML_INLINE void copy_rows(element_t<V>* to, int64_t to_step, const element_t<V>* from, int64_t from_step,
                           int64_t rows) {
  for (int64_t t = 0; t < rows; ++t) store(to + t * to_step, load<V>(from + t * from_step));
}

// One full vector per step: in a staged tile, or in the caller's memory if lanes are adjacent there.
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

// A View of the caller's memory in reduced precision, converted to float at each read.
template <Half kHalf, class V>
struct HalfView {
  const std::uint16_t* value;
  int64_t step;
  EAML_INLINE V get(int64_t t) const { return load_half<kHalf, V>(value + t * step); }
};

// The inputs of a run on S: values, and tangents if S is a Dual.
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

// The batch row and the channels of a unit.
struct UnitIndex {
  int64_t row, group, unit, first, channels;  // `unit` is its number within the row; channels [first, first + channels)
};

EAML_SHARED UnitIndex unit_index(const ScanParams& params, int64_t index) {
  const int64_t per_group = units_per_group(params), per_row = per_group * params.groups;
  const int64_t width = params.unit_channels, dim = params.dim / params.groups;
  UnitIndex p;
  p.row = index / per_row, p.unit = index % per_row, p.group = p.unit / per_group;
  const int64_t offset = p.unit % per_group * width;
  p.first = p.group * dim + offset, p.channels = std::min(width, dim - offset);
  return p;
}

// Offset of a batch row, and address of a channel in it.
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

// The 16-bit numbers of an array of reduced precision.
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

// store_half where the type permits it; doubles are never stored in reduced precision.
template <Half kHalf, class V>
EAML_INLINE void store_narrow(std::uint16_t* to, V x) {
  if constexpr (sizeof(element_t<V>) == 4) store_half<kHalf>(to, x);
}
