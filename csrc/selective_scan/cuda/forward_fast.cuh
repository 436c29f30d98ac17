// The forward kernel for inputs that allow 16-byte accesses: real states in single precision, B and C that vary in
// time, whole blocks of channels. It computes the bits of forward_kernel.
//
// A thread loads vectors of 16 bytes along whichever dimension is contiguous, and prefetches those of the next chunk
// into registers. It stores the elements of y that it loaded of u, so u stays in registers.
#pragma once

#include "selective_scan/cuda/fast_chunks.cuh"
#include "selective_scan/cuda/forward.cuh"

namespace eaml::selective_scan {
namespace {

template <class L>
struct FastForward {
  using Matrix = MatrixReader<L, 1>;
  static constexpr std::size_t kBytes =
      (3 * L::kTile + 2 * Matrix::kTile + 3 * L::kVector) * L::kNumbers * sizeof(float);
};

// Blocks on a multiprocessor: four leave 128 registers to a thread, which is too few for some kernels in single
// precision and for those on duals.
template <class L, Half kHalf, bool kAlongTime, bool kGated>
constexpr int kFastForwardBlocks = L::kNumbers == 2                                                     ? 2
                                   : kHalf == Half::kNone && (L::kLanes > 4 || (kGated && !kAlongTime)) ? 3
                                                                                                        : 4;

// kHalf: the type of the sequences. kAlongTime: u, delta, z and y are contiguous along time, else along the channels.
template <class L, Half kHalf, bool kAlongTime, bool kGated>
EAML_KERNEL(L::kThreads, (kFastForwardBlocks<L, kHalf, kAlongTime, kGated>))
fast_forward_kernel(EAML_CONSTANT ForwardParams<float> p) {
  using S = typename L::S;
  using Vector = SequenceVector<S, kHalf, kVectorWidth<L, kHalf>>;
  using Grid = VectorGrid<L::kThreads, L::kChannels, kVectorWidth<L, kHalf>, kAlongTime>;
  using Matrix = typename FastForward<L>::Matrix;
  constexpr int kStates = L::kStates, kWidth = kVectorWidth<L, kHalf>, kEach = Grid::kEach;
  const Block<L, true> block(p.params, p.arrays, p.segments.count);
  const Grid grid{block.thread};
  float* memory = reinterpret_cast<float*>(cuda::shared_memory());
  const auto take = [&](int numbers) {
    float* const taken = memory;
    memory += numbers * L::kNumbers;
    return taken;
  };
  const Tile<S, 2 * L::kTile> steps{{take(2 * L::kTile)}};  // (dt, dt u) of [step][channel]
  const Tile<S, Matrix::kTile> B{{take(Matrix::kTile)}}, C{{take(Matrix::kTile)}};
  // [step][channel]: first the values of exp(dt A) if states share them, then sums over the states.
  const Tile<S, L::kTile> sums{{take(L::kTile)}};
  const ChannelVector<L> D{{{take(L::kVector)}}}, bias{{{take(L::kVector)}}}, shared_A{{{take(L::kVector)}}};
  const bool shared_decay = shares_decay(p.arrays);
  D.stage(block, p.arrays, &Inputs<float>::D), bias.stage(block, p.arrays, &Inputs<float>::delta_bias);
  shared_A.stage(block, p.arrays, &Inputs<float>::A);
  cuda::sync_block();

  S A[kStates], h[kStates];
  Rate<S> rate[kStates];
  block.read_rates(A, rate);
  const int64_t segment = block.row * block.segments + block.segment;
  if (block.segments == 1)
    block.read_states(h, &Inputs<float>::initial_state);
  else
    block.read_saved(h, p.segments.states, p.segments.state_tangents, segment);
  const int begin = static_cast<int>(block.first_chunk(block.segment));
  const int end = static_cast<int>(block.first_chunk(block.segment + 1));
  using Reader = SequenceReader<Grid, S, kHalf>;
  const auto reader = [&](In<float> Inputs<float>::* member) {
    return Reader(grid, p.arrays, member, block.batch_row, block.first, block.time(begin));
  };
  Reader u = reader(&Inputs<float>::u), delta = reader(&Inputs<float>::delta);
  Reader z = reader(kGated ? &Inputs<float>::z : &Inputs<float>::u);
  VectorStream<Grid, kHalf, Out<float>> y(grid, p.out.y, block.batch_row, block.first, block.time(begin));
  Matrix B_reader(block, p.arrays, &Inputs<float>::B, block.time(begin)),
      C_reader(block, p.arrays, &Inputs<float>::C, block.time(begin));

  Vector next_u[kEach], next_delta[kEach];
  typename Matrix::Vectors next_B, next_C;
  const auto prefetch = [&](int steps_of_chunk) {
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i)
      if (grid.has(i, steps_of_chunk)) u.load(next_u[i], i), delta.load(next_delta[i], i);
    B_reader.load(next_B, steps_of_chunk), C_reader.load(next_C, steps_of_chunk);
    u.advance(), delta.advance(), B_reader.advance(), C_reader.advance();
  };
  // y of an element, from its sum over the states.
  const auto result = [&](int t, int c, S D_c, S u_t, S z_t) {
    const S out = rounded_product(D_c, u_t) + sums.get(t * L::kRow + c);
    return output(kGated ? out * (z_t * sigmoid(z_t)) : out);
  };
  // The steps of the chunk in shared memory: all kSteps without a reset, or `count` of them.
  const auto recur = [&](auto whole, auto shared, std::uint32_t resets, int count) {
    EAML_UNROLL_BY(1)
    for (int start = 0; start < kSteps; start += kStepsPerTile) {
      S sum[kStepsPerTile];
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = start + i;
        sum[i] = S{};
        if constexpr (!whole.value) {
          if (t >= count) continue;
          if (resets >> t & 1) {
            EAML_UNROLL
            for (int k = 0; k < kStates; ++k) h[k] = S{};
          }
        }
        S step[2], b[kStates], c[kStates], a[kStates];
        steps.get_row(step, 2 * (t * L::kRow + block.channel));
        B.get_row(b, t * Matrix::kRow + block.lane * kStates);
        C.get_row(c, t * Matrix::kRow + block.lane * kStates);
        if constexpr (shared.value)
          share_decay(sums.data.get(t * L::kRow + block.channel), step[0], A, a);
        else
          decay(step[0], A, rate, a);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) {
          h[k] = advance(a[k], h[k], step[1], b[k]);
          sum[i] = add_product(sum[i], h[k], c[k]);
        }
      }
      if constexpr (shared.value) cuda::sync_warp();  // all lanes have read the decays that the sums overwrite
      put_sums<L>(sum, sums, start * L::kRow + block.channel, false);
    }
  };
  int64_t checkpoint = block.saved_at(block.first_saved + begin - 1, 0);  // before the next chunk
  if (begin < end) prefetch(block.steps(begin));
  for (int chunk = begin; chunk < end; ++chunk) {
    const int count = block.steps(chunk);
    if (p.out.checkpoints != nullptr && chunk > 0) {
      EAML_UNROLL
      for (int k = 0; k < kStates; ++k)
        set_saved(p.out.checkpoints, p.out.checkpoint_tangents, checkpoint + k * p.params.dim, 0, h[k]);
    }
    checkpoint += p.params.dstate * p.params.dim;
    Vector this_u[kEach], this_z[kEach];
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      this_u[i] = next_u[i];
      if (!grid.has(i, count)) continue;
      S u_t[kWidth], delta_t[kWidth], bias_t[kWidth], dt[kWidth];
      next_u[i].unpack(u_t), next_delta[i].unpack(delta_t);
      bias.get(bias_t, grid, i);
      const auto set_steps = [&](bool by_softplus) {
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k) dt[k] = step_size(delta_t[k] + bias_t[k], by_softplus).value;
      };
      p.params.softplus ? set_steps(true) : set_steps(false);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        const S pair[2] = {dt[k], dt[k] * u_t[k]};
        steps.set_row(pair, 2 * (grid.step(i, k) * L::kRow + grid.row(i, k)));
      }
      if (shared_decay) {
        S A_t[kWidth];
        shared_A.get(A_t, grid, i);
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k)
          sums.data.set(grid.step(i, k) * L::kRow + grid.row(i, k),
                        cuda::exp2(value_of(dt[k]) * (value_of(A_t[k]) * float(kLog2e))));
      }
    }
    B_reader.stage(B, next_B, count), C_reader.stage(C, next_C, count);
    const std::uint32_t resets = block.resets(chunk, count);
    cuda::sync_block();
    if (chunk + 1 < end) prefetch(block.steps(chunk + 1));
    if constexpr (kGated) {  // z is needed after the recurrence only
      EAML_UNROLL
      for (int i = 0; i < kEach; ++i)
        if (grid.has(i, count)) z.load(this_z[i], i);
      z.advance();
    }
    const auto recur_chunk = [&](auto shared) {
      if (resets == 0 && count == kSteps)
        recur(std::true_type(), shared, 0, kSteps);
      else
        recur(std::false_type(), shared, resets, count);
    };
    shared_decay ? recur_chunk(std::true_type()) : recur_chunk(std::false_type());
    cuda::sync_block();
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (!grid.has(i, count)) continue;
      S u_t[kWidth], D_t[kWidth], z_t[kWidth] = {};
      float out[kWidth];
      this_u[i].unpack(u_t);
      D.get(D_t, grid, i);
      if constexpr (kGated) this_z[i].unpack(z_t);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) out[k] = result(grid.step(i, k), grid.row(i, k), D_t[k], u_t[k], z_t[k]);
      y.store(i, out);
    }
    y.advance();
  }

  if (p.out.last_state.data && block.segment == block.segments - 1) write_last_state(block, p.out.last_state, h);
}

}  // namespace
}  // namespace eaml::selective_scan
