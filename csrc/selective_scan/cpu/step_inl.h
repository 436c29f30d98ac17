// A single step of one unit. Lanes are states, not channels as elsewhere. A part of kernel_inl.h.

// Whether a call is one step whose states are adjacent in memory and fill vectors, as in reinforcement learning.
template <class V, class T = element_t<V>>
EAML_INLINE bool one_step(const ScanParams& params, const Inputs<T>& in, const Outputs<T>& out) {
  const bool full_precision = in.u.half == Half::kNone && in.delta.half == Half::kNone && in.z.half == Half::kNone;
  return params.length == 1 && params.dstate % Lanes<V>::count == 0 && params.num_partial_sums == 1 && !params.reset &&
         full_precision && !params.B_invariant && !params.C_invariant && in.A.inner == 1 &&
         in.initial_state.inner == 1 && out.y.data && out.last_state.inner == 1 && !out.checkpoints &&
         out.y.half == Half::kNone;
}

// One step. States are not transposed, because lanes are states. Channels are computed kChannels at a time; if some are
// missing at the end, the last channel is computed again.
template <class V, class T = element_t<V>>
EAML_SHARED void step_unit(Arena& arena, const ScanParams& params, const Inputs<T>& in, const Outputs<T>& out,
                           int64_t index) {
  constexpr int64_t W = Lanes<V>::count;
  constexpr int kChannels = 2 * kVectors;
  const UnitIndex at = unit_index<T>(params, index);
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
  T *const x = arena.take<T>(padded), *const dt2 = arena.take<T>(padded);  // dt u, dt log2(e)
  T* const sum_Ch = arena.take<T>(padded + kChannels);                     // [channel]: sum over states of C h
  for (int64_t i = 0; i < padded; i += W) {
    const V shifted[1] = {load<V>(delta + i) + load<V>(bias + i)}, input = load<V>(u + i);
    Softplus<V> step[1] = {{shifted[0], V{}}};
    if (params.softplus) softplus(shifted, step);
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
    for (int64_t n = 0; n < params.dstate; n += W) {
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
      reduce_folded<V>(sum_Ch + i + k, folded);
    }
  }

  for (int64_t i = 0; i < padded; i += W) {
    const V z = load<V>(gate + i), sum = load<V>(y + i) + load<V>(sum_Ch + i);
    store(y + i, params.gated ? sum * (z * sigmoid(z)) : sum);
  }
  T* const to = out.y.data + at.row * out.y.outer + at.first * out.y.channel;
  if (out.y.channel == 1)
    std::copy_n(y, at.channels, to);
  else
    for (int64_t i = 0; i < at.channels; ++i) to[i * out.y.channel] = y[i];
}
