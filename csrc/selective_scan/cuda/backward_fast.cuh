// The backward kernel for inputs that allow 16-byte accesses: real states in single precision, B and C that vary in
// time, whole blocks of channels.
//
// A step of a channel has a slot of four numbers in shared memory, which a thread reads in one access. The gradients of
// B and C are sums over channels. The threads of a warp exchange their terms and keep fewer states after each exchange.
// The order of a thread's states depends on its channel, so that every thread keeps its first states.
#pragma once

#include "selective_scan/cuda/fast_chunks.cuh"

namespace eaml::selective_scan {
namespace {

template <class L>
struct FastBackward {
  static constexpr int kWarpChannels = cuda::kWarp / L::kLanes;
  // Duals have fewer copies of B and C, because shared memory is limited.
  static constexpr int kCopies = (kWarpChannels < L::kStates ? kWarpChannels : L::kStates) / L::kNumbers;
  using Matrix = MatrixReader<L, kCopies>;
  static constexpr int kSlots = kSteps * L::kChannels * 4;
  static constexpr int kTermSteps = L::kPadded <= 16 ? 16 : 8;  // steps between two sums over the warps
  static constexpr int kTermsOfWarp = kTermSteps * 2 * L::kPadded;
  static constexpr std::size_t kBytes = ((kSlots + 2 * Matrix::kTile + L::kStarts + 3 * L::kVector) * L::kNumbers +
                                         L::kWarps * kTermsOfWarp + 2 * L::kThreads) *
                                        sizeof(float);
  static_assert(kBytes <= 99 << 10, "more shared memory than a block has on the smaller GPUs");
};

// Sums the terms of B and C of one step over the channels of a warp, which differ in the bits of the thread from kFrom
// on. At each exchange a thread keeps half of its kKept states; with one state left, it keeps the term of B or of C.
// While kKept > kSelected, the thread keeps the first half of its states, whose order depends on its bit. Else it
// selects the half by its bit. Returns the number of the first state that the thread keeps.
template <int kFrom, int kKept, int kSelected, int kStates>
EAML_DEVICE int sum_over_channels(float (&B)[kStates], float (&C)[kStates]) {
  if constexpr (kFrom == cuda::kWarp) {
    return 0;
  } else if constexpr (kKept > 1) {
    const bool upper = kKept <= kSelected && (cuda::thread() & kFrom);
    const auto exchange = [&](float (&x)[kStates]) {
      EAML_UNROLL
      for (int k = 0; k < kKept / 2; ++k) {
        const float given = upper ? x[k] : x[k + kKept / 2], kept = upper ? x[k + kKept / 2] : x[k];
        x[k] = kept + cuda::shuffle_xor(given, kFrom);
      }
    };
    exchange(B), exchange(C);
    return (upper ? kKept / 2 : 0) + sum_over_channels<2 * kFrom, kKept / 2, kSelected>(B, C);
  } else {
    static_assert(2 * kFrom == cuda::kWarp);
    const bool upper = cuda::thread() & kFrom;
    const float given = upper ? B[0] : C[0], kept = upper ? C[0] : B[0];
    B[0] = C[0] = kept + cuda::shuffle_xor(given, kFrom);
    return 0;
  }
}

// Reads the states before a chunk: checkpoints or, for the first chunk, initial states.
template <class L>
EAML_DEVICE void read_states_before(typename L::S (&h)[L::kStates], const Block<L, true>& block,
                                    const BackwardParams<float>& p, int chunk) {
  const auto read_numbers = [&](float (&to)[L::kStates], const float* checkpoints, const In<float>& initial_state) {
    const bool first = chunk == 0;
    const int64_t stride = first ? initial_state.inner : p.params.dim;
    const int64_t at = first ? block.row * initial_state.outer + (block.first + block.channel) * initial_state.channel +
                                   block.lane * L::kStates * stride
                             : block.saved_at(block.saved_before(chunk), block.permutation);
    const float* const from = first ? initial_state.data : checkpoints;
    EAML_UNROLL
    for (int k = 0; k < L::kStates; ++k) to[k] = from == nullptr ? 0.0f : from[at + (k ^ block.permutation) * stride];
  };
  if constexpr (L::kNumbers == 2) {
    float values[L::kStates], tangents[L::kStates];
    read_numbers(values, p.out.checkpoints, p.arrays.values.initial_state);
    read_numbers(tangents, p.out.checkpoint_tangents, p.arrays.tangents.initial_state);
    EAML_UNROLL
    for (int k = 0; k < L::kStates; ++k) h[k] = {values[k], tangents[k]};
  } else {
    read_numbers(h, p.out.checkpoints, p.arrays.values.initial_state);
  }
}

// kHalf: the type of the sequences. kAlongTime: they are contiguous along time, else along the channels.
template <class L, Half kHalf, bool kAlongTime, bool kGated>
EAML_KERNEL(L::kThreads, (L::kNumbers == 2 ? 2 : 3))
fast_backward_kernel(EAML_CONSTANT BackwardParams<float> p) {
  using S = typename L::S;
  using Layout = FastBackward<L>;
  using Matrix = typename Layout::Matrix;
  constexpr int kStates = L::kStates;
  constexpr int kWidth = kGated ? 4 : kVectorWidth<L, kHalf>;  // with a gate there are too few registers for more
  using Vector = SequenceVector<S, kHalf, kWidth>;
  using Grid = VectorGrid<L::kThreads, L::kChannels, kWidth, kAlongTime>;
  constexpr int kEach = Grid::kEach;
  Block<L, true> block(p.params, p.arrays, p.segments.count);
  // The number of the warp's channel that orders the states of a thread; see sum_over_channels. Its bits are reversed,
  // because the first exchange halves the states.
  const int copy = [&] {
    const int channel = block.channel % Layout::kCopies;
    return Layout::kCopies == 4 ? channel / 2 + channel % 2 * 2 : channel;
  }();
  block.permutation = copy * Matrix::kPermutation;
  const Grid grid{block.thread};
  float* memory = reinterpret_cast<float*>(cuda::shared_memory());
  const auto take = [&](int numbers) {
    float* const taken = memory;
    memory += numbers;
    return taken;
  };
  // A slot holds dt, dt u, dL/dy, and dt log2(e) or a shared exp(dt A). The recurrence replaces the last three by sums
  // over the states: dL/d(dt u), the term of dL/d dt, y. The last two become the terms of the gradients of D and
  // delta_bias.
  const Tile<S, Layout::kSlots> slots{{take(Layout::kSlots * L::kNumbers)}};
  const Tile<S, Matrix::kTile> B{{take(Matrix::kTile * L::kNumbers)}}, C{{take(Matrix::kTile * L::kNumbers)}};
  const Tile<S, L::kStarts> starts{{take(L::kStarts * L::kNumbers)}};  // [step tile][thread][state]
  const Shared<float> terms{take(L::kWarps * Layout::kTermsOfWarp)};   // [warp][step][B or C][state]
  const ChannelVector<L> D{{{take(L::kVector * L::kNumbers)}}}, bias{{{take(L::kVector * L::kNumbers)}}};
  const ChannelVector<L> shared_A{{{take(L::kVector * L::kNumbers)}}};
  const bool shared_decay = shares_decay(p.arrays);
  D.stage(block, p.arrays, &Inputs<float>::D), bias.stage(block, p.arrays, &Inputs<float>::delta_bias);
  shared_A.stage(block, p.arrays, &Inputs<float>::A);
  cuda::sync_block();
  // Channels are permuted within groups of eight, by the tile of the step. Thus threads access different banks, both
  // when they write steps of one channel and when they read one step.
  const auto slot = [&](int tile, int i, int c) {
    return 4 * ((tile * kStepsPerTile + i) * L::kChannels + (c ^ tile % 8));
  };

  S A[kStates], grad_h[kStates];
  block.read_states(A, &Inputs<float>::A);
  if (block.segments == 1)
    block.read_states(grad_h, &Inputs<float>::grad_state);
  else
    block.read_saved(grad_h, p.segments.states, p.segments.state_tangents, block.row * block.segments + block.segment);
  float sum_A[kStates] = {};
  // A thread's part of the gradients of D and delta_bias stays in shared memory, because registers are scarce.
  const Shared<float> totals{take(2 * L::kThreads)};
  const float zeros[2] = {};
  totals.set_row(zeros, 2 * block.thread);

  const int begin = static_cast<int>(block.first_chunk(block.segment));
  const int end = static_cast<int>(block.first_chunk(block.segment + 1));
  const auto stage = [&](int at, S u_t, S dt, S grad_y_t, S z_t, float A_c) {
    if constexpr (kGated) grad_y_t = grad_y_t * (z_t * sigmoid(z_t));
    const float dt_log2 = value_of(dt) * float(kLog2e);
    const S numbers[4] = {dt, dt * u_t, grad_y_t, S(shared_decay ? cuda::exp2(dt_log2 * A_c) : dt_log2)};
    slots.set_row(numbers, at);
  };
  struct Gradients {
    float u, delta, z;
  };
  const auto finish = [&](int at, S u_t, S slope, S grad_y_t, S z_t, S D_c) {
    S numbers[4];  // dt and the sums over the states
    slots.get_row(numbers, at);
    Gradients out{0, output((numbers[2] + u_t * numbers[1]) * slope), 0};
    if constexpr (kGated) {
      const S s = sigmoid(z_t), y = numbers[3] + D_c * u_t;
      out.z = output(grad_y_t * y * (s + z_t * (s * (S(1.0f) - s))));
      grad_y_t = grad_y_t * (z_t * s);
    }
    out.u = output(numbers[0] * numbers[1] + D_c * grad_y_t);
    const float terms_of_step[2] = {output(grad_y_t * u_t), out.delta};
    slots.data.set_row(terms_of_step, at + 2);
    return out;
  };

  // The states of the chunk and the sums of its steps, which replace the numbers in the slots. The chunk has kSteps
  // steps without a reset, or `count` of them.
  const auto recur = [&](auto whole, auto shared, int chunk, std::uint32_t resets, int count) {
    const int last = whole.value ? L::kStepTiles - 1 : (count - 1) / kStepsPerTile;  // tile
    const auto present = [&](int t) { return whole.value || t < count; };
    const auto zero_at_reset = [&](int t, S(&x)[kStates]) {
      if constexpr (!whole.value) {
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) x[k] = resets >> t & 1 ? S{} : x[k];
      }
    };
    const auto decay_at = [&](const S(&numbers)[4], S(&a)[kStates]) {
      if constexpr (shared.value)
        share_decay(value_of(numbers[3]), numbers[0], A, a);
      else
        decay(numbers[0], value_of(numbers[3]), A, a);
    };
    const int row = copy * L::kPadded + block.lane * kStates;
    constexpr int kTermTiles = Layout::kTermSteps / kStepsPerTile;
    S h[kStates];
    read_states_before(h, block, p, chunk);

    // Forward from the start of the chunk to the start of its last tile.
    EAML_UNROLL_BY(1)
    for (int tile = 0;; ++tile) {
      starts.set_row(h, (tile * L::kThreads + block.thread) * kStates);
      if (tile == last) break;
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = tile * kStepsPerTile + i;
        S numbers[4], b[kStates], a[kStates];
        slots.get_row(numbers, slot(tile, i, block.channel));
        B.get_row(b, t * Matrix::kRow + row);
        zero_at_reset(t, h);
        decay_at(numbers, a);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) h[k] = advance(a[k], h[k], numbers[1], b[k]);
      }
    }

    // Backward. Each tile is recomputed from its start, with decays and states in registers.
    EAML_UNROLL_BY(1)
    for (int tile = last; tile >= 0; --tile) {
      S a[kStepsPerTile][kStates], decayed_h[kStepsPerTile][kStates];
      S sums_x[kStepsPerTile], sums_dt[kStepsPerTile], sums_y[kStepsPerTile];
      const int first_terms =
          block.thread / cuda::kWarp * Layout::kTermSteps + tile % kTermTiles * kStepsPerTile;  // row of `terms`
      starts.get_row(h, (tile * L::kThreads + block.thread) * kStates);
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = tile * kStepsPerTile + i;
        sums_y[i] = S{};
        if (!present(t)) continue;
        S numbers[4], b[kStates], c[kStates];
        slots.get_row(numbers, slot(tile, i, block.channel));
        B.get_row(b, t * Matrix::kRow + row);
        if constexpr (kGated) C.get_row(c, t * Matrix::kRow + row);
        zero_at_reset(t, h);
        decay_at(numbers, a[i]);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) {
          decayed_h[i][k] = decayed(a[i][k], h[k]);
          h[k] = decayed_h[i][k] + numbers[1] * b[k];
          if constexpr (kGated) sums_y[i] = add_product(sums_y[i], h[k], c[k]);
        }
      }

      // The sums of y are reduced here, so that they take fewer registers from here on.
      constexpr int kSumsOfLane = kSumsLeft<1, L::kLanes, kStepsPerTile>;
      S y[kStepsPerTile] = {};
      int first = 0;
      if constexpr (kGated) sum_over_lanes<L>(sums_y, y, first);
      EAML_UNROLL
      for (int i = kStepsPerTile - 1; i >= 0; --i) {
        const int t = tile * kStepsPerTile + i;
        sums_x[i] = sums_dt[i] = S{};
        if (present(t)) {
          S numbers[4], b[kStates], c[kStates];
          slots.get_row(numbers, slot(tile, i, block.channel));
          B.get_row(b, t * Matrix::kRow + row), C.get_row(c, t * Matrix::kRow + row);
          float terms_B[kStates], terms_C[kStates];
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) {
            const S h_t = decayed_h[i][k] + numbers[1] * b[k];
            const auto g = step_backward(grad_h[k], numbers[2], a[i][k], decayed_h[i][k], numbers[1], b[k], c[k]);
            grad_h[k] = g.h_prev;
            sums_x[i] = sums_x[i] + g.x;
            sums_dt[i] = sums_dt[i] + g.dt_A * A[k];
            sum_A[k] = sum_A[k] + output(g.dt_A * numbers[0]);
            terms_B[k] = output(g.B), terms_C[k] = output(numbers[2] * h_t);
          }
          constexpr int kSelected = kStates / Layout::kCopies;
          const int first_state = sum_over_channels<L::kLanes, kStates, kSelected>(terms_B, terms_C);
          const int at = (first_terms + i) * 2 * L::kPadded + static_cast<int>(block.state(first_state));
          if constexpr (Layout::kWarpChannels > kStates) {
            terms.set(at + (block.thread & cuda::kWarp / 2 ? L::kPadded : 0), terms_B[0]);
          } else {
            EAML_UNROLL
            for (int k = 0; k < kStates / Layout::kWarpChannels; ++k)
              terms.set(at + k, terms_B[k]), terms.set(at + L::kPadded + k, terms_C[k]);
          }
        }
        zero_at_reset(t, grad_h);
      }

      cuda::sync_warp();  // all lanes of a channel have read the slots that these sums overwrite
      S grad_x[kStepsPerTile], grad_dt[kStepsPerTile];
      sum_over_lanes<L>(sums_x, grad_x, first);
      if (sum_over_lanes<L>(sums_dt, grad_dt, first)) {
        EAML_UNROLL
        for (int k = 0; k < kSumsOfLane; ++k) {
          const int at = slot(tile, first + k, block.channel);
          slots.set(at + 1, grad_x[k]);
          const S pair[2] = {grad_dt[k], y[k]};
          slots.set_row(pair, at + 2);
        }
      }
      if (tile % kTermTiles != 0) continue;

      // Sums over the warps, four states a thread.
      cuda::sync_block();
      EAML_UNROLL_BY(1)
      for (int i = 4 * block.thread; i < Layout::kTermsOfWarp; i += 4 * L::kThreads) {
        const int t = tile * kStepsPerTile + i / (2 * L::kPadded), which = i / L::kPadded % 2, column = i % L::kPadded;
        if (!present(t)) continue;
        float total[4];
        terms.get_row(total, i);
        EAML_UNROLL
        for (int warp = 1; warp < L::kWarps; ++warp) {
          float other[4];
          terms.get_row(other, warp * Layout::kTermsOfWarp + i);
          EAML_UNROLL
          for (int k = 0; k < 4; ++k) total[k] += other[k];
        }
        const int64_t time = block.index * p.params.length + block.time(chunk) + t;
        cuda::store_row((which ? p.out.C : p.out.B) + time * L::kPadded + column, total);
      }
      cuda::sync_block();
    }
  };
  int count = block.steps(end - 1);  // all chunks but the last are whole
  for (int chunk = end - 1; chunk >= begin; --chunk, count = kSteps) {
    cuda::sync_block();  // the previous chunk's slots and matrices are no longer read
    const auto each_vector = [&](auto f) {
      // Each chunk computes its pointers, because kept ones would take too many registers.
      const auto reader = [&, row = cuda::recomputed(block.batch_row)](In<float> Inputs<float>::* member) {
        return SequenceReader<Grid, S, kHalf>(grid, p.arrays, member, row, block.first, block.time(chunk));
      };
      const auto u = reader(&Inputs<float>::u), delta = reader(&Inputs<float>::delta);
      const auto grad_y = reader(&Inputs<float>::grad_y), z = reader(kGated ? &Inputs<float>::z : &Inputs<float>::u);
      EAML_UNROLL_BY(1)
      for (int i = 0; i < kEach; ++i) {
        if (!grid.has(i, count)) continue;
        Vector vectors[4];
        u.load(vectors[0], i), delta.load(vectors[1], i), grad_y.load(vectors[2], i);
        if constexpr (kGated) z.load(vectors[3], i);
        S u_t[kWidth], delta_t[kWidth], grad_y_t[kWidth], z_t[kWidth] = {};
        vectors[0].unpack(u_t), vectors[1].unpack(delta_t), vectors[2].unpack(grad_y_t);
        if constexpr (kGated) vectors[3].unpack(z_t);
        S bias_t[kWidth];
        bias.get(bias_t, grid, i);
        Softplus<S> dt[kWidth];
        const auto set_steps = [&](bool by_softplus) {
          EAML_UNROLL
          for (int k = 0; k < kWidth; ++k) dt[k] = step_size(delta_t[k] + bias_t[k], by_softplus);
        };
        p.params.softplus ? set_steps(true) : set_steps(false);
        f(i, u_t, dt, grad_y_t, z_t);
      }
    };
    // Vectors begin at a multiple of kStepsPerTile steps.
    const auto slot_of_element = [&](int i, int k) {
      return kAlongTime ? slot(grid.step(i) / kStepsPerTile + k / kStepsPerTile, k % kStepsPerTile, grid.row(i))
                        : slot(grid.step(i) / kStepsPerTile, grid.step(i) % kStepsPerTile, grid.row(i) + k);
    };
    using Numbers = S[kWidth];
    using Steps = Softplus<S>[kWidth];
    typename Matrix::Vectors next_B, next_C;
    const Matrix B_reader(block, p.arrays, &Inputs<float>::B, block.time(chunk)),
        C_reader(block, p.arrays, &Inputs<float>::C, block.time(chunk));
    B_reader.load(next_B, count), C_reader.load(next_C, count);
    each_vector([&](int i, const Numbers& u_t, const Steps& dt, const Numbers& grad_y_t, const Numbers& z_t) {
      S A_t[kWidth] = {};
      if (shared_decay) shared_A.get(A_t, grid, i);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k)
        stage(slot_of_element(i, k), u_t[k], dt[k].value, grad_y_t[k], z_t[k], value_of(A_t[k]));
    });
    B_reader.stage(B, next_B, count), C_reader.stage(C, next_C, count);
    const std::uint32_t resets = block.resets(chunk, count);
    cuda::sync_block();
    const auto recur_chunk = [&](auto shared) {
      if (resets == 0 && count == kSteps)
        recur(std::true_type(), shared, chunk, 0, kSteps);
      else
        recur(std::false_type(), shared, chunk, resets, count);
    };
    shared_decay ? recur_chunk(std::true_type()) : recur_chunk(std::false_type());
    each_vector([&](int i, const Numbers& u_t, const Steps& dt, const Numbers& grad_y_t, const Numbers& z_t) {
      S D_t[kWidth];
      D.get(D_t, grid, i);
      float out_u[kWidth], out_delta[kWidth], out_z[kWidth];
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        const Gradients g = finish(slot_of_element(i, k), u_t[k], dt[k].slope, grad_y_t[k], z_t[k], D_t[k]);
        out_u[k] = g.u, out_delta[k] = g.delta, out_z[k] = g.z;
      }
      const auto writer = [&](const Out<float>& out) {
        return VectorStream<Grid, kHalf, Out<float>>(grid, out, cuda::recomputed(block.batch_row), block.first,
                                                     block.time(chunk));
      };
      const auto grad_u = writer(p.out.u), grad_delta = writer(p.out.delta),
                 grad_z = writer(kGated ? p.out.z : p.out.u);
      grad_u.store(i, out_u), grad_delta.store(i, out_delta);
      if constexpr (kGated) grad_z.store(i, out_z);
    });
    cuda::sync_block();
    float total[2];
    totals.get_row(total, 2 * block.thread);
    for (int t = block.lane; t < count; t += L::kLanes) {
      float terms_of_step[2];
      slots.data.get_row(terms_of_step, slot(t / kStepsPerTile, t % kStepsPerTile, block.channel) + 2);
      total[0] += terms_of_step[0], total[1] += terms_of_step[1];
    }
    totals.set_row(total, 2 * block.thread);
  }

  const int64_t rows = block.row * block.segments + block.segment;
  EAML_UNROLL
  for (int k = 0; k < kStates; ++k) {
    p.out.A[block.partial_at(rows, k)] = sum_A[k];
    if (p.out.initial_state && block.segment == 0)
      p.out.initial_state[block.partial_at(block.row, k)] = output(grad_h[k]);
  }
  float total[2];
  totals.get_row(total, 2 * block.thread);
  int first = 0;
  bool mine = true;
  reduce_scatter<1, L::kLanes, 1>(&total[0], first, mine);
  reduce_scatter<1, L::kLanes, 1>(&total[1], first, mine);
  if (block.lane != 0) return;
  const int64_t at = rows * p.params.dim + block.first + block.channel;
  if (p.out.D) p.out.D[at] = total[0];
  if (p.out.delta_bias) p.out.delta_bias[at] = total[1];
}

}  // namespace
}  // namespace eaml::selective_scan
