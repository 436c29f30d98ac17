// A single step of one unit. Lanes are states, not channels as elsewhere. A part of kernel_inl.h.

// Whether a unit is one step whose channels fill a vector, and whose states are adjacent in memory and fill vectors, as
// in reinforcement learning.
template <class V, class T = element_t<V>>
EAML_INLINE bool one_step(const ScanParams& params, const UnitIndex& at, const Inputs<T>& in, const Outputs<T>& out) {
  constexpr int64_t W = Lanes<V>::count;
  const bool full_precision = in.u.half == Half::kNone && in.delta.half == Half::kNone && in.z.half == Half::kNone;
  return params.length == 1 && params.dstate % W == 0 && at.channels >= W && !params.reset && full_precision &&
         !params.B_invariant && !params.C_invariant && in.A.inner == 1 && in.initial_state.inner == 1 && out.y.data &&
         out.last_state.inner == 1 && !out.checkpoints && out.y.half == Half::kNone;
}

// Shuffle indices of transpose_lanes. interleave: elements 0, 2 (kUpper: 1, 3) of each quad of a and b, in turns;
// pair: the lower (upper) halves of each quad of a, then of b; every_other: the even (odd) quads of a, then of b.
template <int W, bool kUpper>
constexpr int interleave(int i) {
  return i / 4 * 4 + i % 4 / 2 + i % 2 * W + 2 * kUpper;
}
template <int W, bool kUpper>
constexpr int pair(int i) {
  return i / 4 * 4 + i % 2 + i % 4 / 2 * W + 2 * kUpper;
}
template <int W, bool kUpper>
constexpr int every_other(int i) {
  return i % (W / 2) / 4 * 8 + i % 4 + i / (W / 2) * W + 4 * kUpper;
}

// to[lane][row] = from[row][lane], in registers: first within quads of lanes, then the quads.
template <class V, int... i>
EAML_INLINE void transpose_lanes(const V (&from)[sizeof...(i)], V (&to)[sizeof...(i)],
                                 std::integer_sequence<int, i...>) {
  constexpr int W = sizeof...(i), quads = W / 4;
  V rows[4][quads];  // rows[k][g]: lanes k, 4 + k, 8 + k and so on of the rows 4 g, ..., 4 g + 3
  EAML_UNROLL
  for (int g = 0; g < quads; ++g) {
    const V* const x = from + 4 * g;
    const V low01 = __builtin_shufflevector(x[0], x[1], interleave<W, false>(i)...),
            high01 = __builtin_shufflevector(x[0], x[1], interleave<W, true>(i)...),
            low23 = __builtin_shufflevector(x[2], x[3], interleave<W, false>(i)...),
            high23 = __builtin_shufflevector(x[2], x[3], interleave<W, true>(i)...);
    rows[0][g] = __builtin_shufflevector(low01, low23, pair<W, false>(i)...);
    rows[1][g] = __builtin_shufflevector(low01, low23, pair<W, true>(i)...);
    rows[2][g] = __builtin_shufflevector(high01, high23, pair<W, false>(i)...);
    rows[3][g] = __builtin_shufflevector(high01, high23, pair<W, true>(i)...);
  }
  EAML_UNROLL
  for (int k = 0; k < 4; ++k) {
    const V(&x)[quads] = rows[k];
    if constexpr (quads == 1) {
      to[k] = x[0];
    } else if constexpr (quads == 2) {
      to[k] = __builtin_shufflevector(x[0], x[1], every_other<W, false>(i)...);
      to[4 + k] = __builtin_shufflevector(x[0], x[1], every_other<W, true>(i)...);
    } else {
      static_assert(quads == 4);
      const V even01 = __builtin_shufflevector(x[0], x[1], every_other<W, false>(i)...),
              odd01 = __builtin_shufflevector(x[0], x[1], every_other<W, true>(i)...),
              even23 = __builtin_shufflevector(x[2], x[3], every_other<W, false>(i)...),
              odd23 = __builtin_shufflevector(x[2], x[3], every_other<W, true>(i)...);
      to[k] = __builtin_shufflevector(even01, even23, every_other<W, false>(i)...);
      to[4 + k] = __builtin_shufflevector(odd01, odd23, every_other<W, false>(i)...);
      to[8 + k] = __builtin_shufflevector(even01, even23, every_other<W, true>(i)...);
      to[12 + k] = __builtin_shufflevector(odd01, odd23, every_other<W, true>(i)...);
    }
  }
}

// One step, with the bits of forward_unit. Lanes are states where the states advance, so that A and the states are not
// transposed, and channels where y is summed over the states, in the order of forward_states.
template <class V, class T = element_t<V>>
EAML_SHARED void step_unit(Arena& arena, const ScanParams& params, const Inputs<T>& in, const Outputs<T>& out,
                           const UnitIndex& at) {
  constexpr int64_t W = Lanes<V>::count;
  constexpr int kTogether = 4;  // channels whose exponentials are computed together, to hide latency
  const int64_t padded = (at.channels + W - 1) / W * W;
  const auto gather_channels = [&](const In<T>& of) {
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
  const auto gather_states = [&](const In<T>& of) {
    T* const to = arena.take<T>(params.dstate);
    for (int64_t n = 0; n < params.dstate; ++n)
      to[n] = of.data[at.row * of.outer + at.group * of.group + n * of.channel];
    return to;
  };
  T *const u = gather_channels(in.u), *const delta = gather_channels(in.delta),
           *const bias = gather_channels(in.delta_bias);
  // y holds D, then D u, then the output.
  T *const y = gather_channels(in.D), *const gate = gather_channels(in.z), *const B = gather_states(in.B),
           *const C = gather_states(in.C);
  T *const x = arena.take<T>(padded), *const dt = arena.take<T>(padded), *const sums = arena.take<T>(padded);
  for (int64_t i = 0; i < padded; i += W) {
    const V shifted[1] = {load<V>(delta + i) + load<V>(bias + i)}, input = load<V>(u + i);
    Softplus<V> step[1] = {{shifted[0], V{}}};
    if (params.softplus) softplus(shifted, step);
    store(dt + i, step[0].value), store(x + i, step[0].value * input), store(y + i, load<V>(y + i) * input);
  }

  for (int64_t i = 0; i < at.channels; i += W) {
    const int64_t first = std::min(i, at.channels - W);  // the last channels may be computed twice
    const T* const A = origin(in.A, at.row, at.first + first);
    const T* const before = origin(in.initial_state, at.row, at.first + first);
    T* const after = out.last_state.data + at.row * out.last_state.outer + (at.first + first) * out.last_state.channel;
    V sum = load<V>(y + first);
    for (int64_t n = 0; n < params.dstate; n += W) {
      V h[W], states[W];  // [channel] and [state]
      EAML_UNROLL
      for (int c = 0; c < W; c += kTogether) {
        V t[kTogether], a[kTogether];
        EAML_UNROLL
        for (int k = 0; k < kTogether; ++k)
          t[k] = load<V>(A + (c + k) * in.A.channel + n) * T(kLog2e) * dt[first + c + k];
        exp2_(t, a);
        EAML_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const V h_prev = load<V>(before + (c + k) * in.initial_state.channel + n);
          h[c + k] = advance(a[k], h_prev, load<V>(B + n), x[first + c + k]);
          store(after + (c + k) * out.last_state.channel + n, h[c + k]);
        }
      }
      transpose_lanes(h, states, std::make_integer_sequence<int, W>());
      EAML_UNROLL
      for (int k = 0; k < W; ++k) sum = add_product(sum, states[k], C[n + k]);
    }
    store(sums + first, sum);
  }
  for (int64_t i = 0; i < padded; i += W) {
    const V z = load<V>(gate + i), sum = load<V>(sums + i);
    store(y + i, params.gated ? sum * (z * sigmoid(z)) : sum);
  }
  T* const to = out.y.data + at.row * out.y.outer + at.first * out.y.channel;
  if (out.y.channel == 1)
    std::copy_n(y, at.channels, to);
  else
    for (int64_t i = 0; i < at.channels; ++i) to[i * out.y.channel] = y[i];
}
