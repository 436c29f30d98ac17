// The unit of work: its scratch memory, and how the inputs of a chunk and block are staged. A part of kernel_inl.h.

// B or C of one chunk. If both vary in time: [step][state][component], shared by all lanes. Otherwise, per lane:
// [step][state][component][lane], where the one that is invariant in time has step stride 0.
template <class Z>
struct Matrix {
  Span<Z> data;
  int64_t step;
};
// B or C from state n on. kPerLane is its layout, as a compile-time constant.
template <class Z, bool kPerLane>
struct Operand {
  Span<Z> data;
  int64_t step;
  EAML_INLINE Operand(const Matrix<Z>& matrix, int64_t n)
      : data(matrix.data.at(kPerLane ? n * kLanes<Z> : n)), step(matrix.step) {}
  EAML_INLINE auto get(int64_t t, int64_t n) const {
    if constexpr (kPerLane)
      return data.get(t * step + n * kLanes<Z>);
    else
      return data.number(t * step + n);
  }
};

// to[step][state][component][copy] of a B or C that varies in time. The kCopies copies, one per lane, are equal. States
// from `state` up to `padded` are zeros.
template <int64_t kCopies, int64_t kCount, class T>
EAML_SHARED void stage_states(T* to, const In<T>& in, const UnitIndex& at, int64_t state, int64_t padded, int64_t start,
                              int64_t steps) {
  if (in.data == nullptr || padded != state) std::fill_n(to, steps * padded * kCount * kCopies, T(0));
  if (in.data == nullptr) return;
  const T* from = in.data + at.row * in.outer + at.group * in.group + start * in.inner;
  if (kCopies == 1 && kCount == 1 && in.inner == 1) return transpose(to, padded, from, in.channel, state, steps);
  if (kCopies == 1 && in.channel == kCount) {
    for (int64_t t = 0; t < steps; ++t) std::copy_n(from + t * in.inner, state * kCount, to + t * padded * kCount);
    return;
  }
  for (int64_t n = 0; n < state; ++n)
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t c = 0; c < kCount; ++c)
        std::fill_n(to + ((t * padded + n) * kCount + c) * kCopies, kCopies, from[n * in.channel + t * in.inner + c]);
}

// Rates in memory, [state][kCount][lane]: log2, and for a complex A the high and low part of the angle. Offsets are
// those of A's Span.
template <class Z>
struct RateSpan {
  using V = vector_t<Z>;
  static constexpr int64_t kCount = kNumComponents<Z> == 2 ? 3 : 1;
  number_t<Z>* data;

  EAML_INLINE Rate<Z> get(int64_t i) const {
    const number_t<Z>* const from = data + i * kCount;
    constexpr int64_t W = kLanes<Z>;
    if constexpr (kCount == 3)
      return {load<V>(from), {load<V>(from + W), load<V>(from + 2 * W)}};
    else
      return {load<V>(from)};
  }
  // Computes the rates of `count` numbers of A.
  EAML_INLINE void fill(Span<Z> A, int64_t count) const {
    constexpr int64_t W = kLanes<Z>;
    for (int64_t i = 0; i < count; i += W) {
      const number_t<Z>* const from = A.at(i).value;
      number_t<Z>* const to = data + i * kCount;
      for (int64_t lane = 0; lane < W; ++lane) {
        to[lane] = from[lane] * number_t<Z>(kLog2e);
        if constexpr (kCount == 3) {
          const auto angle = half_turns(from[W + lane]);
          to[W + lane] = angle.high, to[2 * W + lane] = angle.low;
        }
      }
    }
  }
};

// A and its rates for a group of states.
template <class Z>
struct Rates {
  Z A[kStates<Z>];
  Rate<Z> rate[kStates<Z>];
  EAML_INLINE Rates(Span<Z> from, RateSpan<Z> A_rates, int64_t offset) {
    read(A, from.at(offset));
    each_state<Z>([&](auto n) EAML_LAMBDA { rate[n] = A_rates.get(offset + n * kLanes<Z>); });
  }
};

// A chunk as runs of steps between resets, so that the loops over time have no branches.
struct ResetRuns {
  int64_t count, begin[kChunk + 1];  // begin[count]: the end of the chunk
  bool first_run_resets;             // whether the first run starts with a reset; all others do
  EAML_INLINE bool reset(int64_t run) const { return run > 0 || first_run_resets; }
};

// One row per step of the caller's memory, which the next block or chunk reads. The hardware prefetcher does not
// predict rows of a matrix, and prefetching all rows at once would stall. So each step of a loop over time prefetches
// the rows of two arrays.
struct PrefetchRows {
  const char* row;
  int64_t step;  // in bytes
  EAML_INLINE void prefetch(int64_t t) const { EAML_PREFETCH(row + t * step); }
};
struct PrefetchPair {
  PrefetchRows first, second;
  EAML_INLINE void prefetch(int64_t t) const { first.prefetch(t), second.prefetch(t); }
};

// The scratch memory of a unit that forward and backward share, and the functions that fill it.
template <class Z>
struct Unit {
  using S = real_t<Z>;
  using V = vector_t<Z>;
  using T = number_t<Z>;
  static constexpr int64_t W = kLanes<Z>;

  const ScanParams& params;
  const Source<S>& source;
  UnitIndex at, after;  // this unit and the one likely to run next
  int64_t padded;       // states, rounded up to whole groups
  Span<Z> A;            // [block][state][lane]
  RateSpan<Z> A_rates;  // A as `decay` reads it
  Span<S> D, bias;      // [block][lane]
  bool per_lane;        // whether B and C have a lane dimension, because one of them is invariant in time
  bool shares_decay;    // whether the states of a channel have one A and B and C vary in time: one exponential a step
  Matrix<Z> B, C;       // of the current chunk (invariant: of the current block)
  Span<Z> staging_B, staging_C;
  StepTile<S> dt, x, y;  // of the current chunk and block
  StepTile<V> shared;    // exp(dt A) of the current chunk and block, if states share it
  StepTile<S> staging_u, staging_delta, staging_z;
  View<S> u, z;
  ResetRuns runs;
  static constexpr int64_t kMaxPrefetches = 12;
  PrefetchRows upcoming[kMaxPrefetches];  // of sequences, tangents and outputs; view() and target() add them
  int64_t num_prefetches;

  EAML_SHARED Unit(Arena& arena, const ScanParams& s, const Source<S>& src, int64_t index)
      : params(s),
        source(src),
        at(unit_index(s, index)),
        after(unit_index(s, std::min(index + 1, s.batch * units(s) - 1))),
        padded((s.dstate + kStates<Z> - 1) / kStates<Z> * kStates<Z>),
        per_lane(s.B_invariant || s.C_invariant),
        shares_decay(!per_lane && kNumComponents<Z> == 1 && src.values.A.inner == 0) {
    A = take<Z>(arena, blocks() * padded * W);
    A_rates.data = arena.take<T>(blocks() * padded * W * A_rates.kCount);
    D = take<S>(arena, blocks() * W);
    bias = take<S>(arena, blocks() * W);
    for (int64_t block = 0; block < blocks(); ++block) {
      source.each(&Inputs<T>::A, A.at(block * padded * W), [&](T* to, const In<T>& in) {
        stage_matrix<V, kNumComponents<Z>>(to, in, at.row, channel(block), lanes(block), params.dstate, padded);
      });
      // Padding states get A = -1: with A = 0 an infinite step size would make them exp(inf 0) = NaN.
      for (int64_t n = params.dstate; n < padded; ++n) std::fill_n(A.at((block * padded + n) * W).value, W, T(-1));
      source.each(&Inputs<T>::D, D.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector<W>(to, in, at.row, channel(block), lanes(block)); });
      source.each(&Inputs<T>::delta_bias, bias.at(block * W),
                  [&](T* to, const In<T>& in) { stage_vector<W>(to, in, at.row, channel(block), lanes(block)); });
    }
    A_rates.fill(A, blocks() * padded * W);
    const int64_t size = kChunk * padded * (per_lane ? W : 1);
    B = {staging_B = take<Z>(arena, size), 0}, C = {staging_C = take<Z>(arena, size), 0};
    for (StepTile<S>* tile : {&dt, &x, &y, &staging_u, &staging_delta, &staging_z}) *tile = step_tile<S>(arena);
    shared = step_tile<V>(arena);
  }

  int64_t blocks() const { return (at.channels + W - 1) / W; }
  int64_t lanes(int64_t block) const { return std::min(W, at.channels - block * W); }
  int64_t channel(int64_t block) const { return at.first + block * W; }
  int64_t chunks() const { return (params.length + kChunk - 1) / kChunk; }
  int64_t end_chunk() const { return std::min(params.end_chunk, chunks()); }

  // The rows that the loop over the group of states from n on prefetches. If none are left, it prefetches an address
  // that is in the cache.
  EAML_INLINE PrefetchPair prefetch_for(int64_t n) const {
    const int64_t i = n / kStates<Z> * 2;
    const PrefetchRows none{reinterpret_cast<const char*>(dt.value), 0};
    return {i < num_prefetches ? upcoming[i] : none, i + 1 < num_prefetches ? upcoming[i + 1] : none};
  }
  EAML_INLINE Rates<Z> rates(int64_t j) const { return {A, A_rates, j}; }

  // Stages the state (or cotangent) that a call starts from: its carry if it has one, else the input `given`.
  EAML_SHARED void stage_initial(In<T> Inputs<T>::* given, Span<Z> to, int64_t block) const {
    if (source.values.carry != nullptr) {
      stage_saved(to.value, source.values.carry, at.row, block);
      if constexpr (kIsDual<S>) stage_saved(to.tangent, source.tangents->carry, at.row, block);
      return;
    }
    source.each(given, to, [&](T* matrix, const In<T>& in) {
      stage_matrix<V, kNumComponents<Z>>(matrix, in, at.row, channel(block), lanes(block), params.dstate, padded);
    });
  }

  // Stages one block of a saved state, [state][component][lane].
  EAML_SHARED void stage_saved(T* to, const T* all, int64_t index, int64_t block) const {
    stage_matrix<V, 1>(to, saved_state(all, params, index), 0, channel(block), lanes(block),
                       params.dstate * kNumComponents<Z>, padded * kNumComponents<Z>);
  }
  EAML_SHARED void save(T* all, int64_t index, const T* matrix, int64_t block) const {
    if (all == nullptr) return;
    T* const to = all + index * params.dstate * params.num_components * params.dim + channel(block);
    store_matrix<V, 1>(to, 1, params.dim, matrix, lanes(block), params.dstate * kNumComponents<Z>);
  }

  // Stages the inputs of a chunk that all blocks share: resets, and B and C where they vary in time.
  EAML_SHARED void stage_chunk(int64_t start, int64_t steps) {
    runs.count = 1, runs.begin[0] = 0, runs.first_run_resets = false;
    if (params.reset) {
      const bool* reset = params.reset + at.row * params.reset_outer + start * params.reset_inner;
      runs.first_run_resets = reset[0];
      for (int64_t t = 1; t < steps; ++t)
        if (reset[t * params.reset_inner]) runs.begin[runs.count++] = t;
    }
    runs.begin[runs.count] = steps;
    if (!params.B_invariant) stage_variable(&Inputs<T>::B, staging_B, B, start, steps);
    if (!params.C_invariant) stage_variable(&Inputs<T>::C, staging_C, C, start, steps);
  }

  // Sets `matrix` to a chunk of a B or C that varies in time: the caller's memory if states are adjacent there, else a
  // copy in `memory`.
  EAML_SHARED void stage_variable(In<T> Inputs<T>::* member, Span<Z> memory, Matrix<Z>& matrix, int64_t start,
                                  int64_t steps) const {
    constexpr int64_t count = kNumComponents<Z>;
    const auto first = [&](const In<T>& in) EAML_LAMBDA {
      return const_cast<T*>(in.data + at.row * in.outer + at.group * in.group + start * in.inner);
    };
    const In<T>& in = source.values.*member;
    bool in_place = !per_lane && padded == params.dstate && in.channel == count && in.inner % count == 0;
    if constexpr (kIsDual<S>) {
      const In<T>& tangent = source.tangents->*member;
      in_place = in_place && tangent.data != nullptr && tangent.channel == count && tangent.inner == in.inner;
      if (in_place) matrix.data.tangent = first(tangent);
    }
    if (in_place) {
      matrix.data.value = first(in), matrix.step = in.inner / count;
      return;
    }
    matrix = {memory, per_lane ? padded * W : padded};
    source.each(member, memory, [&](T* to, const In<T>& from) {
      if (per_lane)
        stage_states<W, count>(to, from, at, params.dstate, padded, start, steps);
      else
        stage_states<1, count>(to, from, at, params.dstate, padded, start, steps);
    });
  }

  // Stages B and C of a block where they are invariant in time.
  EAML_SHARED void stage_invariant(int64_t block) const {
    const auto stage = [&](In<T> Inputs<T>::* member, const Matrix<Z>& matrix) {
      source.each(member, matrix.data, [&](T* to, const In<T>& in) {
        stage_matrix<V, kNumComponents<Z>>(to, in, at.row, channel(block), lanes(block), params.dstate, padded);
      });
    };
    if (params.B_invariant) stage(&Inputs<T>::B, B);
    if (params.C_invariant) stage(&Inputs<T>::C, C);
  }

  // A view of a chunk of an input, copied to `tile` if lanes are not adjacent. The chunk that runs next starts `ahead`
  // steps later; backward, ahead is negative.
  View<S> view(In<T> Inputs<T>::* member, StepTile<S> tile, int64_t block, int64_t start, int64_t steps,
               int64_t ahead) {
    const View<V> value = rows(tile.value, source.values.*member, block, start, steps, ahead);
    if constexpr (kIsDual<S>) {
      const View<V> tangent = rows(tile.tangent(), source.tangents->*member, block, start, steps, ahead);
      return {value.value, value.step, tangent.value, tangent.step};
    } else {
      return value;
    }
  }
  // The values or the tangents of view(). `to` is the tile for copies.
  EAML_SHARED View<V> rows(T* to, const In<T>& in, int64_t block, int64_t start, int64_t steps, int64_t ahead) {
    const bool adjacent = in.data != nullptr && in.channel == 1 && lanes(block) == W;
    if constexpr (sizeof(T) == 4) {
      if (in.data != nullptr && in.half != Half::kNone) {
        if (!adjacent) {
          stage_half_tile<W>(to, in, at.row, channel(block), lanes(block), start, steps);
        } else {
          const std::uint16_t* const row = halves(in.data) + at.row * in.outer + channel(block) + start * in.inner;
          prefetch_next(halves(in.data), in, block, start, ahead);
          with_half(in.half, [&](auto half) EAML_LAMBDA {
            for (int64_t t = 0; t < steps; ++t) store(to + t * W, load_half<half, V>(row + t * in.inner));
          });
        }
        return {to, W};
      }
    }
    if (adjacent) {
      const T* const row = origin(in, at.row, channel(block)) + start * in.inner;
      prefetch_next(in.data, in, block, start, ahead);
      return {row, in.inner};
    }
    stage_tile<W>(to, in, at.row, channel(block), lanes(block), start, steps, ahead);
    return {to, W};
  }

  // The destination of a chunk of an output: the caller's memory, or `tile`, which store_tile then copies there.
  EAML_SHARED Target<V> target(const Out<T>& out, T* tile, int64_t block, int64_t start, int64_t ahead) {
    if (!has_rows<V>(out, lanes(block))) return {tile, W};
    T* const row = out.data + at.row * out.outer + channel(block) + start * out.inner;
    prefetch_next(out.data, out, block, start, ahead);
    return {row, out.inner};
  }

  // The caller's memory as destination in reduced precision; null if no full vector can be stored there.
  std::uint16_t* half_target(const Out<T>& out, int64_t block, int64_t start, int64_t ahead) {
    if (out.data == nullptr || out.half == Half::kNone || out.channel != 1 || lanes(block) != W) return nullptr;
    std::uint16_t* const data = reinterpret_cast<std::uint16_t*>(out.data);
    prefetch_next(data, out, block, start, ahead);
    return data + at.row * out.outer + channel(block) + start * out.inner;
  }

  // Adds the rows of the next block, chunk or unit to those that the loops prefetch.
  template <class N, class Sequence>
  void prefetch_next(const N* data, const Sequence& sequence, int64_t block, int64_t start, int64_t ahead) {
    if (num_prefetches == kMaxPrefetches) return;
    int64_t row = at.row, next = channel(block) + W, t = start;
    if (block + 1 == blocks()) {
      next = at.first, t += ahead;
      if (t < 0 || t >= params.length) row = after.row, next = after.first, t = ahead < 0 ? (chunks() - 1) * kChunk : 0;
    }
    const N* const from = data + offset_of(sequence, row) + next * sequence.channel + t * sequence.inner;
    upcoming[num_prefetches++] = {reinterpret_cast<const char*>(from), sequence.inner * int64_t(sizeof(N))};
  }

  // Stages dt = softplus(delta + bias), x = dt u and y = D u of a block. The loops over time add the sum over states to
  // y. Backward sets kSlope, and gets slope = d(dt) / d(delta).
  template <bool kSlope>
  EAML_SHARED void stage_block(int64_t block, int64_t start, int64_t steps, StepTile<S> slope) {
    stage_invariant(block);
    num_prefetches = 0;
    constexpr int64_t ahead = kSlope ? -kChunk : kChunk;  // backward goes to earlier chunks
    if (params.gated) z = view(&Inputs<T>::z, staging_z, block, start, steps, ahead);
    if constexpr (sizeof(T) == 4 && !kSlope && !kIsDual<S>) {  // u and delta are read once
      const In<T>&in_u = source.values.u, &in_delta = source.values.delta;
      if (in_u.half != Half::kNone && lanes(block) == W && in_u.channel == 1 && in_delta.channel == 1) {
        const auto rows = [&](const In<T>& in) EAML_LAMBDA {
          prefetch_next(halves(in.data), in, block, start, ahead);
          return halves(in.data) + at.row * in.outer + channel(block) + start * in.inner;
        };
        return with_half(in_u.half, [&](auto half) EAML_LAMBDA {
          const HalfView<half, V> u_{rows(in_u), in_u.inner}, delta{rows(in_delta), in_delta.inner};
          stage_steps<kSlope>(block, steps, slope, u_, delta);
        });
      }
    }
    u = view(&Inputs<T>::u, staging_u, block, start, steps, ahead);
    stage_steps<kSlope>(block, steps, slope, u, view(&Inputs<T>::delta, staging_delta, block, start, steps, ahead));
  }

  template <bool kSlope, class Sequence>
  void stage_steps(int64_t block, int64_t steps, StepTile<S> slope, Sequence u_, Sequence delta) {
    const StepTile<S> dt_ = dt, x_ = x, y_ = y;
    const S offset = bias.get(block * W), d = D.get(block * W);
    const bool needs_y = !kSlope || params.gated;  // backward needs y only for the gradient of z
    const auto each = [&](auto f) EAML_LAMBDA {
      for (int64_t t = 0; t < steps; t += kSoftplusSteps) {
        int64_t rows[kSoftplusSteps];
        for (int k = 0; k < kSoftplusSteps; ++k)
          rows[k] = std::min(t + k, steps - 1);  // the last step may be computed twice
        S shifted[kSoftplusSteps];
        Softplus<S> step[kSoftplusSteps];
        EAML_UNROLL
        for (int k = 0; k < kSoftplusSteps; ++k) shifted[k] = delta.get(rows[k]) + offset;
        f(shifted, step);
        EAML_UNROLL
        for (int k = 0; k < kSoftplusSteps; ++k) {
          const S input = u_.get(rows[k]);
          dt_.set(rows[k] * W, step[k].value), x_.set(rows[k] * W, step[k].value * input);
          if (needs_y) y_.set(rows[k] * W, d * input);
          if constexpr (kSlope) slope.set(rows[k] * W, step[k].slope);
        }
      }
    };
    using Rows = S[kSoftplusSteps];
    using Steps = Softplus<S>[kSoftplusSteps];
    if (params.softplus)
      each([](const Rows& v, Steps& out) EAML_LAMBDA { softplus(v, out); });
    else
      each([](const Rows& v, Steps& out) EAML_LAMBDA {
        for (int k = 0; k < kSoftplusSteps; ++k) out[k] = {v[k], one<S>()};
      });
  }

  // Stages the exponentials of a block whose states share them; their bits are those of `decay`.
  EAML_SHARED void stage_shared_decay(int64_t block, int64_t steps) const {
    if (!shares_decay) return;
    const V rate = load<V>(A_rates.data + block * padded * W);
    const StepTile<V> to = shared;
    for (int64_t t = 0; t < steps; t += kVectors) {
      V exponents[kVectors], decays[kVectors];
      EAML_UNROLL
      for (int k = 0; k < kVectors; ++k) exponents[k] = load<V>(dt.value + std::min(t + k, steps - 1) * W) * rate;
      exp2_(exponents, decays);
      EAML_UNROLL
      for (int k = 0; k < kVectors; ++k) to.set(std::min(t + k, steps - 1) * W, decays[k]);
    }
  }
};
