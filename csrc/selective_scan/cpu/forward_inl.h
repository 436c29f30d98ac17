// The forward pass of one unit. A part of kernel_inl.h.

// y plus the sum of C h over a group of states.
template <class Z, bool kPerLane>
EAML_INLINE real_t<Z> add_outputs(real_t<Z> y, const Z (&h)[kStates<Z>], Operand<Z, kPerLane> C, int64_t t) {
  real_t<Z> sum = kNumComponents<Z> == 2 ? real_t<Z>{} : y;
  each_state<Z>([&](auto n) EAML_LAMBDA { sum = add_product(sum, h[n], C.get(t, n)); });
  return kNumComponents<Z> == 2 ? y + conjugate_pair_sum<Z>(sum) : sum;
}

// exp(dt A) of a group of states at step t; with kShared, the states have it in common.
template <bool kShared, class Z>
EAML_INLINE void decay_at(int64_t t, real_t<Z> step, const Rates<Z>& rates, StepTile<vector_t<Z>> shared,
                          Z (&a)[kStates<Z>]) {
  if constexpr (kShared)
    share_decay(shared.get(t * kLanes<Z>), step, rates.A, a);
  else
    decay(step, rates.A, rates.rate, a);
}

// Advances a group of states through a chunk and, if kOutput, adds C h to y.
template <bool kOutput, bool kShared, class Z, bool kPerLane>
EAML_INLINE void forward_states(const ResetRuns& runs, PrefetchPair upcoming, Rates<Z> rates,
                                StepTile<vector_t<Z>> shared, Span<Z> state, StepTile<real_t<Z>> dt,
                                StepTile<real_t<Z>> x, Operand<Z, kPerLane> B, Operand<Z, kPerLane> C,
                                StepTile<real_t<Z>> y) {
  constexpr int64_t W = kLanes<Z>;
  Z h[kStates<Z>], a[kStates<Z>];
  read(h, state);
  for (int64_t run = 0; run < runs.count; ++run) {
    if (runs.reset(run)) reset_states(h);
    for (int64_t t = runs.begin[run]; t < runs.begin[run + 1]; ++t) {
      const real_t<Z> step = dt.get(t * W), input = x.get(t * W);
      upcoming.prefetch(t);
      decay_at<kShared>(t, step, rates, shared, a);
      each_state<Z>([&](auto n) EAML_LAMBDA { h[n] = advance(a[n], h[n], input, B.get(t, n)); });
      if constexpr (kOutput) y.set(t * W, add_outputs<Z>(y.get(t * W), h, C, t));
    }
  }
  write(state, h);
}

// Writes a chunk of y, times silu(z) if there is a gate: in reduced precision to `half_row` unless that is null.
template <class Z>
EAML_SHARED void write_outputs(const Unit<Z>& unit, int64_t steps, Half half, std::uint16_t* half_row,
                               int64_t half_step, Target<vector_t<Z>> to) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  const StepTile<S> y = unit.y;
  const auto each = [&](auto put) EAML_LAMBDA {
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t i = t * kLanes<Z>;
      if (unit.params.gated) {
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
  else
    each([&](int64_t t, V term) EAML_LAMBDA { to.set(t, term); });
}

// Advances the states of a block through a chunk.
template <bool kOutput, bool kPerLane, bool kShared, class Z>
EAML_SHARED void forward_block(const Unit<Z>& unit, Span<Z> state, int64_t offset) {
  constexpr int64_t W = kLanes<Z>;
  for (int64_t n = 0; n < unit.params.dstate; n += kStates<Z>)
    forward_states<kOutput, kShared, Z, kPerLane>(unit.runs, unit.prefetch_for(n), unit.rates(offset + n * W),
                                                  unit.shared, state.at(n * W), unit.dt, unit.x, {unit.B, n},
                                                  {unit.C, n}, unit.y);
}

template <class Z>
EAML_SHARED void forward_unit(Arena& arena, const ScanParams& params, const Source<real_t<Z>>& source,
                              const Outputs<number_t<Z>>& out, int64_t index) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  constexpr int64_t W = kLanes<Z>, num_components = kNumComponents<Z>;
  Unit<Z> unit(arena, params, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, chunks = unit.chunks();
  const Span<Z> h = take<Z>(arena, unit.blocks() * size);
  T* const tile = arena.take<T>(kChunk * W);
  for (int64_t block = 0; block < unit.blocks(); ++block)
    unit.stage_initial(&Inputs<T>::initial_state, h.at(block * size), block);

  // The last chunk has no checkpoint after it, so a call for checkpoints alone skips it.
  const bool only_checkpoints = !out.y.data && !out.last_state.data && !out.carry;
  const int64_t end = only_checkpoints ? std::min(unit.end_chunk(), chunks - 1) : unit.end_chunk();
  for (int64_t chunk = params.first_chunk; chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, params.length - start);
    unit.stage_chunk(start, steps);
    for (int64_t block = 0; block < unit.blocks(); ++block) {
      const Span<Z> state = h.at(block * size);
      // Padding states are zeroed at chunk boundaries: infinite inputs can make them NaN, and results must not depend
      // on where a call starts.
      if (unit.padded > params.dstate) clear(state.at(params.dstate * W), (unit.padded - params.dstate) * W);
      unit.template stage_block<false>(block, start, steps, {});
      unit.stage_shared_decay(block, steps);
      const Target<V> to = unit.target(out.y, tile, block, start, kChunk);
      std::uint16_t* const half_row = unit.half_target(out.y, block, start, kChunk);
      const bool writes = out.y.data != nullptr;
      if (unit.per_lane)
        writes ? forward_block<true, true, false>(unit, state, block * size)
               : forward_block<false, true, false>(unit, state, block * size);
      else if constexpr (kNumComponents<Z> == 1)
        !writes             ? forward_block<false, false, false>(unit, state, block * size)
        : unit.shares_decay ? forward_block<true, false, true>(unit, state, block * size)
                            : forward_block<true, false, false>(unit, state, block * size);
      else
        writes ? forward_block<true, false, false>(unit, state, block * size)
               : forward_block<false, false, false>(unit, state, block * size);
      if (writes) write_outputs<Z>(unit, steps, out.y.half, half_row, out.y.inner, to);
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
    store_matrix<V, num_components>(to.data + row * to.outer + unit.channel(block) * to.channel, to.channel, to.inner,
                                    h.at(block * size).output_data(), unit.lanes(block), params.dstate);
  }
}
