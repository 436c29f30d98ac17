// Sums over lanes, in an order that does not depend on the number of threads. A part of kernel_inl.h.

// to[state][step] = from[step][state] for the first `count` of kVectors / 2 complex states.
template <class T>
EAML_SHARED void transpose_complex(T* to, int64_t length, const T* from, int64_t steps, int64_t count) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t t = 0; t < steps; ++t) std::copy_n(from + t * kVectors + 2 * n, 2, to + 2 * (n * length + t));
}

// sums[row] = sum over the lanes of a row, in a fixed order: vectors of Q lanes are added, then the Q lanes of
// their sum.
template <class V, int64_t kRows, class T = element_t<V>>
EAML_INLINE void sum_lanes(T (&sums)[kRows], const T* rows) {
  constexpr int64_t W = Lanes<V>::count, Q = W < 4 ? W : 4;
  T partial[kRows * Q];
  for (int64_t r = 0; r < kRows; ++r) {
    auto sum = load<Vec<T, Q>>(rows + r * W);
    EAML_UNROLL
    for (int64_t k = Q; k < W; k += Q) sum += load<Vec<T, Q>>(rows + r * W + k);
    store(partial + r * Q, sum);
  }
  for (int64_t r = 0; r < kRows; ++r) {
    T sum = partial[r * Q] + partial[r * Q + 1];
    if constexpr (Q == 4) sum += partial[r * Q + 2] + partial[r * Q + 3];
    sums[r] = sum;
  }
}

// Sums over the lanes of four vectors, each to be reduced by itself. add_folded reduces the four to one vector, kFolded
// partial sums, and adds it to an accumulator. At the end reduce_folded reduces the accumulator to four sums. Folding
// costs six shuffles; four separate accumulators in memory would cost three more loads and stores.
template <class V>
constexpr int64_t kFolded = Lanes<V>::count < kVectors ? kVectors : Lanes<V>::count;

// Shuffle indices: lane i of the result is lane neighbour(i) or half_lane(i) of a followed by b. neighbour alternates
// between a and b, and takes the lower (upper) half of each 16 bytes, because shuffles within 16 bytes are cheap.
// half_lane takes the lower (upper) half of a, then of b.
//
// With four lanes, adding neighbours gives [a0 + a2, b0 + b2, a1 + a3, b1 + b3]. Adding halves of two such vectors
// gives the sums of a, b, c and d.
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
  const V components[kVectors] = {x[0].re, x[0].im, x[1].re, x[1].im};
  add_folded(sums, components);
}
template <class V>
EAML_INLINE void reduce_folded(element_t<V>* to, const element_t<V>* sums) {
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
