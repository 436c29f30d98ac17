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
