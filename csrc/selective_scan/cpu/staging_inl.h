// Copies between the caller's strided tensors and tiles whose last dimension is the lane. A part of kernel_inl.h.
//
// To stage is to copy into a tile, to scatter is to copy out of it, one number at a time. The store_* functions copy
// whole vectors where the layout permits it, and scatter otherwise.

// stage_tile and scatter_tile, which are defined below, for sequences of reduced precision.
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

// tile[step][lane] = in[row][channel + lane][start + step], zeros beyond `lanes`. The chunk that runs next
// starts `ahead` steps later; backward, ahead is negative.
template <int64_t W, class T>
EAML_SHARED void stage_tile(T* tile, const In<T>& in, int64_t row, int64_t channel, int64_t lanes, int64_t start,
                            int64_t steps, int64_t ahead) {
  if (in.data == nullptr || lanes < W) std::fill_n(tile, steps * W, T(0));
  if (in.data == nullptr) return;
  const T* from = origin(in, row, channel) + start * in.inner;
  if (in.inner == 1) {
    // Prefetches the next chunk, because a chunk of a row is too short for the hardware prefetcher.
    for (int64_t i = 0; i < lanes; ++i)
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

// Destination of a tile's rows: the caller's memory if a vector can be written there, else a tile that is copied later.
template <class V>
struct Target {
  element_t<V>* row;
  int64_t step;
  EAML_INLINE V get(int64_t t) const { return load<V>(row + t * step); }
  EAML_INLINE void set(int64_t t, V x) const { store(row + t * step, x); }
};
// Whether a full vector per step can be stored in the output itself.
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

// matrix[state][component][lane] of a (rows, dim, dstate) input, zeros beyond `lanes` and beyond `state` of the
// `padded` states. Components of a complex number are adjacent in the input.
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

// Entry `index` of saved states (entries, dstate, num_components, dim), as an input in which each component counts
// as a state. The state at the start of chunk c > 0 is entry row * (chunks - 1) + c - 1; a carry is entry row.
template <class T>
In<T> saved_state(const T* all, const ScanParams& params, int64_t index) {
  return {all + index * params.dstate * params.num_components * params.dim, 0, 1, params.dim};
}
