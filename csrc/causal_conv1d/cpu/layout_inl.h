// Units of work, and lines of numbers in memory. A part of kernel_inl.h.

// Not Vec of a template parameter, which gcc takes for a single number.
template <class T>
struct VectorFor;
template <>
struct VectorFor<float> {
  using type = Vec<float, EAML_VECTOR_BYTES / sizeof(float)>;
};
template <>
struct VectorFor<double> {
  using type = Vec<double, EAML_VECTOR_BYTES / sizeof(double)>;
};
template <class T>
using VectorOf = typename VectorFor<T>::type;
static_assert(sizeof(VectorOf<float>) == EAML_VECTOR_BYTES && Lanes<VectorOf<float>>::count > 1);
template <class T>
constexpr int64_t kUnitLanes = kUnitBytes / sizeof(T);

template <class T>
struct Unit {
  int64_t row, segment, begin, end;  // [begin, end): steps
  int64_t first, channels, lanes;    // lanes: channels, padded to full vectors
};

// Units of the same channels follow one another, so that their parameters are loaded once.
template <class T>
Unit<T> unit(const ConvParams<T>& p, int64_t index) {
  constexpr int64_t W = Lanes<VectorOf<T>>::count;
  const int64_t per_block = p.batch * p.segments, row = index % per_block / p.segments;
  const int64_t segment = index % p.segments, begin = segment * kSegment;
  const int64_t first = index / per_block * kUnitLanes<T>, channels = std::min(kUnitLanes<T>, p.dim - first);
  return {row, segment, begin, std::min(begin + kSegment, p.runs.length), first, channels, (channels + W - 1) / W * W};
}

// ---- staging ----

template <Half kHalf, class T>
EAML_INLINE void load_halves(T* to, const std::uint16_t* from, int64_t stride, int64_t count) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<V>::count;
  int64_t i = 0;
  if (stride == 1)
    for (; i + W <= count; i += W) store(to + i, load_half<kHalf, V>(from + i));
  for (; i < count; ++i) to[i] = load_half<kHalf, T>(from + i * stride);
}
// to[i] = element i of a line of `count` elements that are `stride` apart, from the element at `offset` on.
template <class T>
EAML_SHARED void load_line(T* to, const In<T>& x, int64_t offset, int64_t stride, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    const auto* const halves = reinterpret_cast<const std::uint16_t*>(x.data) + offset;
    if (x.half == Half::kBfloat16) return load_halves<Half::kBfloat16>(to, halves, stride, count);
    if (x.half == Half::kFloat16) return load_halves<Half::kFloat16>(to, halves, stride, count);
  }
  const T* const from = x.data + offset;
  if (stride == 1)
    std::copy_n(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

template <Half kHalf, class T>
EAML_INLINE void store_halves(std::uint16_t* to, const T* from, int64_t stride, int64_t count) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<V>::count;
  int64_t i = 0;
  if (stride == 1)
    for (; i + W <= count; i += W) store_half<kHalf>(to + i, load<V>(from + i));
  for (; i < count; ++i) store_half<kHalf>(to + i * stride, from[i]);
}
template <class T>
EAML_SHARED void store_line(const Out<T>& y, int64_t offset, int64_t stride, const T* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    auto* const halves = reinterpret_cast<std::uint16_t*>(y.data) + offset;
    if (y.half == Half::kBfloat16) return store_halves<Half::kBfloat16>(halves, from, stride, count);
    if (y.half == Half::kFloat16) return store_halves<Half::kFloat16>(halves, from, stride, count);
  }
  T* const to = y.data + offset;
  if (stride == 1)
    std::copy_n(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) to[i * stride] = from[i];
}

// Calls f(width) with a constant.
template <class F>
EAML_INLINE void with_width(int width, F f) {
  switch (width) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, 4>());
  }
}

// The gradient of a sum from that of silu of it.
template <class V>
EAML_INLINE V gated(V grad_y, V sum) {
  using T = element_t<V>;
  const V s = sigmoid(sum);
  return grad_y * (s * (T(1) + sum * (T(1) - s)));
}
