// Lanes are channels. A part of kernel_inl.h.
//
// A unit goes through time in tiles of kTile steps. A row of a tile has the channels of one step, adjacent in memory:
// in place where the tensor is channel-last, else staged. Each step reads `width` rows, those of its own input and of
// earlier ones, of a state, or of zeros.

constexpr int64_t kTile = 32;                           // steps
constexpr int64_t kRows = kTile + 2 * (kMaxWidth - 1);  // of a tile with the steps before and after it

// Whether the rows of a tensor serve in place: full vectors of adjacent channels, in full precision.
template <class X, class T>
bool in_place(const X& x, const Unit<T>& u) {
  return x.channel == 1 && x.half == Half::kNone && u.lanes == u.channels;
}

// Zeros the lanes beyond the channels.
template <class T>
void pad(T* row, const Unit<T>& u) {
  std::fill(row + u.channels, row + u.lanes, T(0));
}

// A tile of an input: rows[i] has the channels of step `begin` + i.
template <class T>
struct Tile {
  const T* rows[kRows];
  T *staged, *line;

  explicit Tile(Arena& arena)
      : staged(arena.take<T>(kRows * kUnitLanes<T>)), line(arena.take<T>(kUnitLanes<T> * kTransposed)) {}

  void read(const In<T>& x, const Unit<T>& u, int64_t begin, int64_t count) {
    const int64_t origin = u.row * x.outer + u.first * x.channel + begin * x.inner;
    for (int64_t i = 0; i < count; ++i) rows[i] = staged + i * kUnitLanes<T>, pad(staged + i * kUnitLanes<T>, u);
    if (in_place(x, u)) {
      for (int64_t i = 0; i < count; ++i) rows[i] = x.data + origin + i * x.inner;
    } else if (x.inner != 1 || x.channel == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i)
        load_line(staged + i * kUnitLanes<T>, x, origin + i * x.inner, x.channel, u.channels);
    } else {
      for (int64_t c = 0; c < u.channels; ++c) load_line(line + c * kTransposed, x, origin + c * x.channel, 1, count);
      transpose(staged, kUnitLanes<T>, line, kTransposed, u.channels, count);
    }
  }

 private:
  static constexpr int64_t kTransposed = kRows + 1;
};

// A tile of an output. Rows of kTile steps at most are computed, then written to the tensor unless they are in place.
template <class T>
struct OutTile {
  T *staged, *line;

  explicit OutTile(Arena& arena)
      : staged(arena.take<T>(kTile * kUnitLanes<T>)), line(arena.take<T>(kUnitLanes<T> * kTile)) {}

  T* row(const Out<T>& y, const Unit<T>& u, int64_t begin, int64_t i) const {
    if (in_place(y, u)) return y.data + u.row * y.outer + u.first + (begin + i) * y.inner;
    return staged + i * kUnitLanes<T>;
  }
  void write(const Out<T>& y, const Unit<T>& u, int64_t begin, int64_t count) const {
    const int64_t origin = u.row * y.outer + u.first * y.channel + begin * y.inner;
    if (in_place(y, u)) return;
    if (y.inner != 1 || y.channel == 1) {
      for (int64_t i = 0; i < count; ++i)
        store_line(y, origin + i * y.inner, y.channel, staged + i * kUnitLanes<T>, u.channels);
    } else {
      transpose(line, kTile, staged, kUnitLanes<T>, count, u.channels);
      for (int64_t c = 0; c < u.channels; ++c) store_line(y, origin + c * y.channel, 1, line + c * kTile, count);
    }
  }
};

// Weight and bias of the channels of a unit, [tap][lane] and [lane].
template <class T>
struct Parameters {
  T *weight, *bias;
  int64_t loaded = -1;  // the offset of the channels that are loaded

  explicit Parameters(Arena& arena)
      : weight(arena.take<T>(kMaxWidth * kUnitLanes<T>)), bias(arena.take<T>(kUnitLanes<T>)) {}

  void load(const ConvParams<T>& p, const Unit<T>& u) {
    const int64_t at = u.row / p.rows_per_task * p.dim + u.first;
    if (at == loaded) return;
    loaded = at;
    for (int k = 0; k < p.width; ++k) {
      T* const tap = weight + k * kUnitLanes<T>;
      for (int64_t c = 0; c < u.channels; ++c) tap[c] = p.weight[(at + c) * p.width + k];
      pad(tap, u);
    }
    std::fill_n(bias, u.lanes, T(0));
    if (p.bias) std::copy_n(p.bias + at, u.channels, bias);
  }
};

// The inputs before a run: rows of zeros, or of the state of a sequence.
template <class T>
struct History {
  T *zeros, *state;
  int64_t staged;  // the sequence of the unit whose state is staged, -1 for none

  explicit History(Arena& arena)
      : zeros(arena.take<T>(kUnitLanes<T>)), state(arena.take<T>(kMaxWidth * kUnitLanes<T>)) {
    std::fill_n(zeros, kUnitLanes<T>, T(0));
  }

  // The input `distance` > 0 steps before the run of a position.
  const T* before(const ConvParams<T>& p, const Unit<T>& u, const Position& at, int distance) {
    if (at.zero || p.states.data == nullptr) return zeros;
    if (staged != at.sequence) {
      const In<T>& s = p.states;
      const int64_t origin = u.row * s.outer + at.sequence * s.sequence + u.first * s.channel;
      for (int k = 0; k < p.width - 1; ++k) {
        T* const to = state + k * kUnitLanes<T>;
        load_line(to, s, origin + k * s.inner, s.channel, u.channels), pad(to, u);
      }
      staged = at.sequence;
    }
    return state + (p.width - 1 - distance) * kUnitLanes<T>;
  }
};

// ---- rows ----

// The sum of `width` products of rows, from the oldest on.
template <int kWidth, class V, class T>
EAML_INLINE V filter(const T* const* tap, const Parameters<T>& w, int64_t lane) {
  V sum = load<V>(w.bias + lane);
  EAML_UNROLL
  for (int k = 0; k < kWidth; ++k)
    sum = fused(load<V>(tap[k] + lane), load<V>(w.weight + k * kUnitLanes<T> + lane), sum);
  return sum;
}

template <int kWidth, bool kSilu, class T>
EAML_SHARED void filter_row(T* y, const T* const* tap, const Parameters<T>& w, int64_t lanes) {
  using V = VectorOf<T>;
  for (int64_t l = 0; l < lanes; l += Lanes<V>::count) {
    const V sum = filter<kWidth, V>(tap, w, l);
    store(y + l, kSilu ? sum * sigmoid(sum) : sum);
  }
}

// The gradient of the sum: that of y times silu's derivative at the sum.
template <int kWidth, class T>
EAML_SHARED void gate_row(T* grad, const T* grad_y, const T* const* tap, const Parameters<T>& w, int64_t lanes) {
  using V = VectorOf<T>;
  for (int64_t l = 0; l < lanes; l += Lanes<V>::count) {
    store(grad + l, gated(load<V>(grad_y + l), filter<kWidth, V>(tap, w, l)));
  }
}

// sums[k] += grad * tap[k], sums[width] += grad
template <int kWidth, class T>
EAML_SHARED void accumulate_row(T* sums, const T* grad, const T* const* tap, int64_t lanes) {
  using V = VectorOf<T>;
  for (int64_t l = 0; l < lanes; l += Lanes<V>::count) {
    const V g = load<V>(grad + l);
    EAML_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      T* const sum = sums + k * kUnitLanes<T> + l;
      store(sum, fused(g, load<V>(tap[k] + l), load<V>(sum)));
    }
    T* const sum = sums + kWidth * kUnitLanes<T> + l;
    store(sum, load<V>(sum) + g);
  }
}

// The gradient of an input that `count` sums contain: grads[j] is the gradient of a sum, in which the tap of the input
// is newest - j.
template <class T>
EAML_SHARED void transposed_row(T* to, const T* const* grads, int count, int newest, const Parameters<T>& w,
                                int64_t lanes) {
  using V = VectorOf<T>;
  for (int64_t l = 0; l < lanes; l += Lanes<V>::count) {
    V sum = splat<V>(T(0));
    for (int j = 0; j < count; ++j)
      sum = fused(load<V>(grads[j] + l), load<V>(w.weight + (newest - j) * kUnitLanes<T> + l), sum);
    store(to + l, sum);
  }
}

// ---- units ----

// taps[k] is the row of the input width - 1 - k steps before the position; `row` is that of its own step.
template <int kWidth, class T>
EAML_INLINE void find_taps(const T* (&taps)[kWidth], const ConvParams<T>& p, const Unit<T>& u, History<T>& history,
                           const Position& at, const T* const* row) {
  for (int j = 0; j < kWidth; ++j)
    taps[kWidth - 1 - j] = j <= at.past ? row[-j] : history.before(p, u, at, j - at.past);
}

// Scratch arrays of a thread, for one unit after the other.
template <class T>
struct ChannelScratch {
  Parameters<T> w;
  History<T> history;
  Tile<T> x, grad_y;
  OutTile<T> out;
  T *gates, *sums, *grad_state;

  explicit ChannelScratch(Arena& arena)
      : w(arena),
        history(arena),
        x(arena),
        grad_y(arena),
        out(arena),
        gates(arena.take<T>(kRows * kUnitLanes<T>)),
        sums(arena.take<T>((kMaxWidth + 1) * kUnitLanes<T>)),
        grad_state(arena.take<T>(kUnitLanes<T>)) {}

  void start(const ConvParams<T>& p, const Unit<T>& u) { w.load(p, u), history.staged = -1; }
};

template <int kWidth, class T>
EAML_SHARED void forward_unit(ChannelScratch<T>& scratch, const ConvParams<T>& p, const Unit<T>& u) {
  Tile<T>& x = scratch.x;
  const OutTile<T>& y = scratch.out;
  for (int64_t begin = u.begin; begin < u.end; begin += kTile) {
    const int64_t count = std::min(kTile, u.end - begin), before = std::min<int64_t>(kWidth - 1, begin);
    x.read(p.x, u, begin - before, before + count);
    Position at = position<kWidth>(p.runs, u.row, begin);
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0) advance<kWidth>(p.runs, u.row, at);
      const T* taps[kWidth];
      find_taps(taps, p, u, scratch.history, at, x.rows + before + i);
      T* const to = y.row(p.y, u, begin, i);
      p.silu ? filter_row<kWidth, true>(to, taps, scratch.w, u.lanes)
             : filter_row<kWidth, false>(to, taps, scratch.w, u.lanes);
    }
    y.write(p.y, u, begin, count);
  }
}

template <int kWidth, class T>
EAML_SHARED void backward_unit(ChannelScratch<T>& scratch, const ConvParams<T>& p, const Unit<T>& u) {
  auto& [w, history, x, grad_y, grad_x, gates, sums, grad_state] = scratch;
  std::fill_n(sums, (kWidth + 1) * kUnitLanes<T>, T(0));
  for (int64_t begin = u.begin; begin < u.end; begin += kTile) {
    // A tile and the steps after it, whose sums its inputs contribute to.
    const int64_t count = std::min(kTile, u.end - begin), before = std::min<int64_t>(kWidth - 1, begin);
    const int64_t with_after = std::min(count + kWidth - 1, p.runs.length - begin);
    x.read(p.x, u, begin - before, before + with_after), grad_y.read(p.grad_y, u, begin, with_after);
    Position at[kRows];
    const T* grads[kRows];  // of the sums
    for (int64_t i = 0; i < with_after; ++i) {
      if (i == 0)
        at[0] = position<kWidth>(p.runs, u.row, begin);
      else
        at[i] = at[i - 1], advance<kWidth>(p.runs, u.row, at[i]);
      const T* taps[kWidth];
      find_taps(taps, p, u, history, at[i], x.rows + before + i);
      grads[i] = grad_y.rows[i];
      if (p.silu) {
        T* const to = gates + i * kUnitLanes<T>;
        gate_row<kWidth>(to, grad_y.rows[i], taps, w, u.lanes), grads[i] = to;
      }
      if (i < count) accumulate_row<kWidth>(sums, grads[i], taps, u.lanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      int later = 0;  // steps of the run after this one, at most width - 1
      while (later < kWidth - 1 && i + later + 1 < with_after && at[i + later + 1].past > later) ++later;
      transposed_row(grad_x.row(p.y, u, begin, i), grads + i, later + 1, kWidth - 1, w, u.lanes);
      if (p.grad_states.data == nullptr || !starts_from_state(at[i])) continue;
      const Out<T>& s = p.grad_states;
      const int64_t origin = u.row * s.outer + at[i].sequence * s.sequence + u.first * s.channel;
      for (int k = 0; k < kWidth - 1; ++k) {  // the input width - 1 - k steps before this one
        transposed_row(grad_state, grads + i, std::min(later, k) + 1, k, w, u.lanes);
        store_line(s, origin + k * s.inner, s.channel, grad_state, u.channels);
      }
    }
    grad_x.write(p.y, u, begin, count);
  }
  T* const partial = p.partial + (u.row * p.segments + u.segment) * (kWidth + 1) * p.dim + u.first;
  for (int k = 0; k <= kWidth; ++k) std::copy_n(sums + k * kUnitLanes<T>, u.channels, partial + k * p.dim);
}
