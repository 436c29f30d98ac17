// The backward pass of one unit. A part of kernel_inl.h.

// Accumulators of gradients that are summed over time or lanes, for one group of states. They hold values or, in a Dual
// run, tangents, never both.
template <class Z>
struct Sums {
  Span<output_t<Z>> A;     // [state][lane]
  Span<output_t<Z>> B, C;  // [step][kFolded] or, with kPerLane, [step][state][lane]
  int64_t B_step, C_step;  // 0 where B or C is invariant in time: all steps add to one row
};

// Gradients with respect to sequences, of one chunk and block.
template <class S>
struct ChunkGradients {
  View<S> y;          // dL/dy, which is given
  StepTile<S> x, dt;  // sums over states of dL/dx, and of dL/d(dt A) A
};

// Adds the terms of a group of states to a step's sums over lanes.
template <class Z, bool kPerLane>
EAML_INLINE void add_terms(Span<output_t<Z>> sums, const output_t<Z> (&terms)[kStates<Z>]) {
  if constexpr (!kPerLane) return add_folded(sums.value, terms);
  each_state<Z>([&](auto n) EAML_LAMBDA { sums.set(n * kLanes<Z>, sums.get(n * kLanes<Z>) + terms[n]); });
}

// Backward pass of a group of states through a chunk. First recomputes the states from `start`, the states before the
// chunk. If there is a gate, also recomputes y.
template <bool kGated, bool kShared, class Z, bool kPerLane>
EAML_INLINE void backward_states(const ResetRuns& runs, PrefetchPair upcoming, Rates<Z> rates,
                                 StepTile<vector_t<Z>> shared, Span<Z> start, StepTile<real_t<Z>> dt,
                                 StepTile<real_t<Z>> x, Operand<Z, kPerLane> B, Operand<Z, kPerLane> C,
                                 StepTile<real_t<Z>> y, Span<Z> grad_state, ChunkGradients<real_t<Z>> grad,
                                 GroupTile<Z> decays, GroupTile<Z> states, Sums<Z> sums) {
  using S = real_t<Z>;
  constexpr int64_t W = kLanes<Z>, size = kGroup<Z>;
  const auto cotangent = [&](int64_t t) EAML_LAMBDA { return conjugate_pair_sum<Z>(grad.y.get(t)); };

  Z h[kStates<Z>];
  read(h, start);
  for (int64_t run = 0; run < runs.count; ++run) {
    if (runs.reset(run)) reset_states(h);
    for (int64_t t = runs.begin[run]; t < runs.begin[run + 1]; ++t) {
      const S step = dt.get(t * W), input = x.get(t * W), gy = cotangent(t);
      Z a[kStates<Z>];
      output_t<Z> terms[kStates<Z>];
      upcoming.prefetch(t);
      decay_at<kShared>(t, step, rates, shared, a);
      each_state<Z>([&](auto n) EAML_LAMBDA {
        decays.set(t * size + n * W, a[n]);
        states.set(t * size + n * W, h[n]);
        h[n] = advance(a[n], h[n], input, B.get(t, n));
        terms[n] = output(times_conjugate(gy, h[n]));
      });
      add_terms<Z, kPerLane>(sums.C.at(t * sums.C_step), terms);
      if constexpr (kGated) y.set(t * W, add_outputs<Z>(y.get(t * W), h, C, t));
    }
  }

  // dL/dh_t without the term of y_t, from the last step to the first.
  Z grad_h[kStates<Z>];
  output_t<Z> sum_A[kStates<Z>];
  read(grad_h, grad_state);
  read(sum_A, sums.A);
  for (int64_t run = runs.count - 1; run >= 0; --run) {
    for (int64_t t = runs.begin[run + 1] - 1; t >= runs.begin[run]; --t) {
      const S gy = cotangent(t), step = dt.get(t * W), input = x.get(t * W);
      S gx = grad.x.get(t * W), gdt = grad.dt.get(t * W);
      output_t<Z> terms[kStates<Z>];
      each_state<Z>([&](auto n) EAML_LAMBDA {
        const int64_t i = t * size + n * W;
        const StepGradient<Z, S> g =
            step_backward<false>(grad_h[n], gy, decays.get(i), states.get(i), input, B.get(t, n), C.get(t, n));
        grad_h[n] = g.h_prev;
        terms[n] = output(g.B);
        gx = gx + g.x;
        gdt = gdt + real(times_conjugate(g.dt_A, rates.A[n]));
        sum_A[n] = sum_A[n] + output(g.dt_A * step);
      });
      add_terms<Z, kPerLane>(sums.B.at(t * sums.B_step), terms);
      grad.x.set(t * W, gx);
      grad.dt.set(t * W, gdt);
    }
    if (runs.reset(run)) reset_states(grad_h);
  }
  write(grad_state, grad_h);
  write(sums.A, sum_A);
}

// Destinations of the sequences' gradients, of one chunk and block.
template <class V>
struct SequenceTargets {
  Target<V> u, delta, z;
};

// Computes the gradients of u, delta and z from those of x and dt. sum_D and sum_bias receive the chunk's terms of the
// gradients of D and delta_bias.
template <class Z>
EAML_SHARED void write_gradients(const Unit<Z>& unit, int64_t block, int64_t steps,
                                 const ChunkGradients<real_t<Z>>& grad, View<real_t<Z>> gy, StepTile<real_t<Z>> slope,
                                 StepTile<real_t<Z>> sigmoid_z, const SequenceTargets<vector_t<Z>>& to,
                                 number_t<Z>* sum_D, number_t<Z>* sum_bias) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  constexpr int64_t W = kLanes<Z>;
  const S d = unit.D.get(block * W);
  V block_D = load<V>(sum_D), block_bias = load<V>(sum_bias);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t j = t * W;
    const S gx = grad.x.get(j), input = unit.u.get(t);
    const V grad_delta = output((grad.dt.get(j) + input * gx) * slope.get(j));
    to.u.set(t, output(unit.dt.get(j) * gx + d * grad.y.get(t)));
    to.delta.set(t, grad_delta);
    block_bias += grad_delta;
    block_D += output(grad.y.get(t) * input);
    if (unit.params.gated) {
      const S s = sigmoid_z.get(j);
      to.z.set(t, output(gy.get(t) * unit.y.get(j) * (s + unit.z.get(t) * (s * (one<S>() - s)))));
    }
  }
  store(sum_D, block_D), store(sum_bias, block_bias);
}

// Operands and sums of backward_block.
template <class Z>
struct BackwardOperands {
  Span<Z> start, grad_state;  // of the block
  ChunkGradients<real_t<Z>> grad;
  GroupTile<Z> decays, states;
  Span<output_t<Z>> sum_A;         // of the block
  Span<output_t<Z>> sum_B, sum_C;  // of the block, or of the chunk
};

// Numbers per step in the terms of B or C of one group, before they are summed over lanes.
template <class Z>
constexpr int64_t row_size(bool per_lane) {
  return per_lane ? kGroup<Z> : kFolded<vector_t<Z>> / kNumComponents<Z>;
}

template <bool kGated, bool kPerLane, bool kShared, class Z>
EAML_SHARED void backward_block(const Unit<Z>& unit, int64_t offset, const BackwardOperands<Z>& operands) {
  constexpr int64_t W = kLanes<Z>, row = row_size<Z>(kPerLane);
  const ScanParams& params = unit.params;
  for (int64_t n = 0; n < params.dstate; n += kStates<Z>) {
    const int64_t j = n * W, k = n / kStates<Z> * kChunk * row;
    const Sums<Z> sums{operands.sum_A.at(j), operands.sum_B.at(params.B_invariant ? j : k),
                       operands.sum_C.at(params.C_invariant ? j : k), params.B_invariant ? 0 : row,
                       params.C_invariant ? 0 : row};
    backward_states<kGated, kShared, Z, kPerLane>(unit.runs, unit.prefetch_for(n), unit.rates(offset + j), unit.shared,
                                                  operands.start.at(j), unit.dt, unit.x, {unit.B, n}, {unit.C, n},
                                                  unit.y, operands.grad_state.at(j), operands.grad, operands.decays,
                                                  operands.states, sums);
  }
}

// Sums a chunk's terms of B or C, [group of states][step][row_size], over lanes and stores them in
// `to`: (dstate, length).
template <class Z, bool kPerLane>
EAML_SHARED void reduce_lanes(number_t<Z>* to, Span<output_t<Z>> sums, const ScanParams& params, int64_t steps) {
  using V = vector_t<Z>;
  constexpr int64_t row = row_size<Z>(kPerLane);
  number_t<Z> line[kChunk * kVectors];
  for (int64_t n = 0; n < params.dstate; n += kStates<Z>) {
    const Span<output_t<Z>> rows = sums.at(n / kStates<Z> * kChunk * row);
    if constexpr (kPerLane) {
      sum_lanes<V>(line, rows.value);
    } else {
      for (int64_t t = 0; t < kChunk; ++t) reduce_folded<V>(line + t * kVectors, rows.at(t * row).value);
    }
    number_t<Z>* const first = to + n * params.all_length * kNumComponents<Z>;
    const int64_t count = std::min<int64_t>(kStates<Z>, params.dstate - n);
    if constexpr (kNumComponents<Z> == 2)
      transpose_complex(first, params.all_length, line, steps, count);
    else
      transpose(first, params.all_length, line, kVectors, steps, count);
  }
}

template <class Z>
EAML_SHARED void backward_unit(Arena& arena, const ScanParams& params, const Source<real_t<Z>>& source,
                               const Gradients<number_t<Z>>& out, int64_t index) {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  constexpr int64_t W = kLanes<Z>, tile = kChunk * W, num_components = kNumComponents<Z>;
  Unit<Z> unit(arena, params, source, index);
  const int64_t row = unit.at.row, size = unit.padded * W, blocks = unit.blocks(), chunks = unit.chunks();

  const Span<Z> grad_h = take<Z>(arena, blocks * size), h0 = take<Z>(arena, size);
  const GroupTile<Z> decays = group_tile<Z>(arena), states = group_tile<Z>(arena);
  const StepTile<S> slope = step_tile<S>(arena), staging_gy = step_tile<S>(arena);
  const StepTile<S> sigmoid_z = step_tile<S>(arena);
  const StepTile<S> gated_gy = step_tile<S>(arena), grad_x = step_tile<S>(arena), grad_dt = step_tile<S>(arena);
  const auto zeroed = [&](int64_t count) {
    T* const sum = arena.take<T>(count);
    std::fill_n(sum, count, T(0));
    return sum;
  };
  const auto zeroed_states = [&](int64_t count) { return Span<output_t<Z>>{zeroed(count * num_components)}; };
  const Span<output_t<Z>> sum_A = zeroed_states(blocks * size);
  const int64_t sums_size = unit.padded / kStates<Z> * kChunk * row_size<Z>(unit.per_lane);  // [group][step][row_size]
  const Span<output_t<Z>> sum_B = zeroed_states(params.B_invariant ? blocks * size : sums_size);
  const Span<output_t<Z>> sum_C = zeroed_states(params.C_invariant ? blocks * size : sums_size);
  T* const sum_D = zeroed(blocks * W);
  T* const sum_bias = zeroed(blocks * W);
  T* const tile_u = arena.take<T>(tile);
  T* const tile_delta = arena.take<T>(tile);
  T* const tile_z = arena.take<T>(tile);
  for (int64_t block = 0; block < blocks; ++block)
    unit.stage_initial(&Inputs<T>::grad_state, grad_h.at(block * size), block);

  for (int64_t chunk = unit.end_chunk() - 1; chunk >= params.first_chunk; --chunk) {
    const int64_t start = chunk * kChunk, steps = std::min(kChunk, params.length - start);
    unit.stage_chunk(start, steps);
    if (!params.B_invariant) clear(sum_B, sums_size);
    if (!params.C_invariant) clear(sum_C, sums_size);

    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = unit.channel(block), lanes = unit.lanes(block);
      unit.template stage_block<true>(block, start, steps, slope);
      unit.stage_shared_decay(block, steps);
      const View<S> z = unit.z, gy = unit.view(&Inputs<T>::grad_y, staging_gy, block, start, steps, -kChunk);
      const SequenceTargets<V> to{unit.target(out.u, tile_u, block, start, -kChunk),
                                  unit.target(out.delta, tile_delta, block, start, -kChunk),
                                  unit.target(out.z, tile_z, block, start, -kChunk)};
      ChunkGradients<S> grad{gy, grad_x, grad_dt};
      if (params.gated) {
        for (int64_t t = 0; t < steps; ++t) {
          const S s = sigmoid(z.get(t));
          sigmoid_z.set(t * W, s), gated_gy.set(t * W, gy.get(t) * (z.get(t) * s));
        }
        grad.y = view_of<S>(gated_gy);
      }
      const auto stage_start = [&](T* to, const T* all) EAML_LAMBDA {
        const int64_t index = row * (chunks - 1) + chunk - 1;
        unit.stage_saved(to, all, index, block);
        // Prefetches the states of the next block, or of the first block of the chunk before: the previous entry.
        const bool last = block + 1 == blocks;
        const T* const next = saved_state(all, params, index - last).data + (last ? unit.at.first : channel + W);
        for (int64_t n = 0; n < params.dstate * num_components; ++n) EAML_PREFETCH(next + n * params.dim);
      };
      if (chunk == 0) {
        source.each(&Inputs<T>::initial_state, h0, [&](T* to, const In<T>& in) {
          stage_matrix<V, num_components>(to, in, row, channel, lanes, params.dstate, unit.padded);
        });
      } else {
        stage_start(h0.value, out.checkpoints);
        if constexpr (kIsDual<S>) stage_start(h0.tangent, out.checkpoint_tangents);
      }
      clear<S>(grad.x, steps * W);
      clear<S>(grad.dt, steps * W);
      const BackwardOperands<Z> operands{h0,
                                         grad_h.at(block * size),
                                         grad,
                                         decays,
                                         states,
                                         sum_A.at(block * size),
                                         sum_B.at(params.B_invariant ? block * size : 0),
                                         sum_C.at(params.C_invariant ? block * size : 0)};
      const auto run = [&](auto gated) {
        constexpr bool kGated = gated;
        if (unit.per_lane) return backward_block<kGated, true, false>(unit, block * size, operands);
        if constexpr (num_components == 1)
          if (unit.shares_decay) return backward_block<kGated, false, true>(unit, block * size, operands);
        backward_block<kGated, false, false>(unit, block * size, operands);
      };
      params.gated ? run(std::true_type()) : run(std::false_type());
      write_gradients<Z>(unit, block, steps, grad, gy, slope, sigmoid_z, to, sum_D + block * W, sum_bias + block * W);
      store_tile<V>(out.u, tile_u, row, channel, lanes, start, steps);
      store_tile<V>(out.delta, tile_delta, row, channel, lanes, start, steps);
      if (params.gated) store_tile<V>(out.z, tile_z, row, channel, lanes, start, steps);
    }

    const int64_t unit_row = row * units(params) + unit.at.unit;
    const int64_t first = (unit_row * params.dstate * params.all_length + start) * num_components;
    const auto reduce = [&](T* to, Span<output_t<Z>> sums) {
      unit.per_lane ? reduce_lanes<Z, true>(to, sums, params, steps) : reduce_lanes<Z, false>(to, sums, params, steps);
    };
    if (!params.B_invariant && out.B) reduce(out.B + first, sum_B);
    if (!params.C_invariant && out.C) reduce(out.C + first, sum_C);
  }

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t channel = row * params.dim + unit.channel(block), lanes = unit.lanes(block);
    const auto store = [&](T* to, const T* matrix) {
      if (to == nullptr) return;
      const int64_t stride = params.dstate * num_components;
      store_matrix<V, num_components>(to + channel * stride, stride, num_components, matrix, lanes, params.dstate);
    };
    store(out.A, sum_A.at(block * size).value);
    if (params.B_invariant) store(out.B, sum_B.at(block * size).value);
    if (params.C_invariant) store(out.C, sum_C.at(block * size).value);
    const Span<Z> state = grad_h.at(block * size);
    if (params.first_chunk == 0) store(out.initial_state, state.output_data());
    unit.save(out.carry, row, state.value, block);
    if constexpr (kIsDual<S>) unit.save(out.carry_tangent, row, state.tangent, block);
    if (out.D) std::copy_n(sum_D + block * W, lanes, out.D + channel);
    if (out.delta_bias) std::copy_n(sum_bias + block * W, lanes, out.delta_bias + channel);
  }
}
