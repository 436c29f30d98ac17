// The forward kernel for all kinds of states, strides and lengths.
#pragma once

#include "selective_scan/cuda/block.cuh"

namespace eaml::selective_scan {
namespace {

// Writes the states of a block after the last step.
template <class L, bool kWhole>
EAML_DEVICE void write_last_state(const Block<L, kWhole>& block, const Out<typename L::T>& out,
                                  const typename L::Z (&h)[L::kStates]) {
  EAML_UNROLL
  for (int k = 0; k < L::kStates; ++k) {
    if (!block.has_state(k)) continue;
    const int64_t channel = block.first + block.channel;
    put(out.data + block.row * out.outer + channel * out.channel + block.state(k) * out.inner, output(h[k]));
  }
}

template <class L, bool kInvariant>
EAML_KERNEL(L::kThreads, L::kForwardBlocks)
forward_kernel(EAML_CONSTANT ForwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  constexpr int kStates = L::kStates;
  Block<L> block(p.params, p.arrays, p.segments.count);
  const bool outputs = p.out.y.data != nullptr, local = p.segments.local, shared_decay = shares_decay(p.arrays);
  const int64_t end = block.first_chunk(block.segment + 1);

  Z A[kStates], h[kStates];
  Rate<Z> rate[kStates];
  block.stage_vectors();
  block.read_rates(A, rate);
  const int64_t segment = block.row * block.segments + block.segment;
  if (block.segments == 1) {
    block.read_states(h, &Inputs<T>::initial_state);
  } else if (local) {
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) h[k] = Z{};
  } else {
    block.read_saved(h, p.segments.states, p.segments.state_tangents, segment);
  }
  Operand<L, kInvariant> B, C;
  B.start(block, &Inputs<T>::B, p.params.B_invariant);
  if (outputs) C.start(block, &Inputs<T>::C, p.params.C_invariant);
  S total{};  // the sum of step sizes, in a local run
  bool has_reset = false;

  for (int64_t chunk = block.first_chunk(block.segment); chunk < end; ++chunk) {
    const int steps = block.steps(chunk);
    if (p.out.checkpoints && chunk > 0)
      block.write_saved(p.out.checkpoints, p.out.checkpoint_tangents, block.first_saved + chunk - 1, h);
    const std::uint32_t resets = block.resets(chunk, steps);
    has_reset = has_reset || resets != 0;
    block.staged = -1;
    cuda::sync_block();  // the previous chunk's tiles are no longer read
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = block.time(chunk) + t;
      const S u = block.template read_sequence<half>(&Inputs<T>::u, c, time);
      const S dt = block.template read_step<half>(c, time).value;
      const int i = t * L::kRow + c;
      block.dt.set(i, dt), block.x.set(i, dt * u);
      if (outputs) block.y.set(i, rounded_product(block.D.get(c), u));
    });
    cuda::sync_block();

    for (int start = 0; start < steps; start += kStepsPerTile) {
      block.need_matrices(chunk, start, true, outputs);
      S sums[kStepsPerTile];
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = start + i;
        sums[i] = S{};
        if (t >= steps) continue;
        if (resets >> t & 1) {
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) h[k] = Z{};
        }
        if (!block.has_channel()) continue;
        const int at = block.tile_at(t), row = block.matrix_at(t);
        const S dt = block.dt.get(at), x = block.x.get(at);
        Z a[kStates];
        decay_of_thread(shared_decay, dt, A, rate, a);
        B.step(block.B, row);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) h[k] = advance(a[k], h[k], x, B.x[k]);
        if (outputs) {
          C.step(block.C, row);
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) sums[i] = add_product(sums[i], h[k], C.x[k]);
          sums[i] = conjugate_pair_sum<Z>(sums[i]);
        }
        if (local) total = total + dt;
      }
      if (outputs) put_sums<L>(sums, block.y, block.tile_at(start), true);
    }

    if (!outputs) continue;
    cuda::sync_block();
    const Out<T>& out = p.out.y;
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = block.time(chunk) + t;
      const S y = block.y.get(t * L::kRow + c);
      T term = output(y);
      if (p.params.gated) {
        const S z = block.template read_sequence<half>(&Inputs<T>::z, c, time);
        term = output(y * (z * sigmoid(z)));
      }
      write<half>(out, block.batch_row * out.outer + (block.first + c) * out.channel + time * out.inner, term);
    });
  }

  if (local) {
    block.write_saved(p.segments.states, p.segments.state_tangents, segment, h);
    write_steps(block, p.segments, total, has_reset);
  } else if (p.out.last_state.data && block.segment == block.segments - 1) {
    write_last_state(block, p.out.last_state, h);
  }
}

}  // namespace
}  // namespace eaml::selective_scan
