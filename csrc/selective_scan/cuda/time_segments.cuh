// Kernels of time segments: the contribution of each segment, and the states carried from segment to segment.
#pragma once

#include "selective_scan/cuda/block.cuh"

namespace eaml::selective_scan {
namespace {

// Computes a segment's contribution to the gradient of the state before it, which does not depend on any state.
template <class L>
EAML_KERNEL(L::kThreads, L::kForwardBlocks)
local_backward_kernel(EAML_CONSTANT BackwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  constexpr int kStates = L::kStates;
  Block<L> block(p.params, p.arrays, p.segments.count);
  const int64_t begin = block.first_chunk(block.segment);
  Z A[kStates], grad_h[kStates];
  Rate<Z> rate[kStates];
  S total{};
  bool has_reset = false;
  block.stage_vectors();
  block.read_rates(A, rate);
  Operand<L, true> C;
  C.start(block, &Inputs<T>::C, p.params.C_invariant);
  EAML_UNROLL
  for (int k = 0; k < kStates; ++k) grad_h[k] = Z{};

  for (int64_t chunk = block.first_chunk(block.segment + 1) - 1; chunk >= begin; --chunk) {
    const int steps = block.steps(chunk);
    const std::uint32_t resets = block.resets(chunk, steps);
    has_reset = has_reset || resets != 0;
    block.staged = -1;
    cuda::sync_block();
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = block.time(chunk) + t;
      S grad_y = block.template read_sequence<half>(&Inputs<T>::grad_y, c, time);
      if (p.params.gated) {
        const S z = block.template read_sequence<half>(&Inputs<T>::z, c, time);
        grad_y = grad_y * (z * sigmoid(z));
      }
      const int i = t * L::kRow + c;
      block.dt.set(i, block.template read_step<half>(c, time).value), block.y.set(i, conjugate_pair_sum<Z>(grad_y));
    });
    cuda::sync_block();
    for (int t = steps - 1; t >= 0; --t) {
      block.need_matrices(chunk, t, false, true);
      if (!block.has_channel()) continue;
      const S dt = block.dt.get(block.tile_at(t)), grad_y = block.y.get(block.tile_at(t));
      const bool reset = resets >> t & 1;
      Z a[kStates];
      decay_of_thread(shares_decay(p.arrays), dt, A, rate, a);
      C.step(block.C, block.matrix_at(t));
      EAML_UNROLL
      for (int k = 0; k < kStates; ++k) {
        const Z g = grad_h[k] + times_conjugate(grad_y, C.x[k]);
        grad_h[k] = reset ? Z{} : decayed(conjugate(a[k]), g);
      }
      total = total + dt;
    }
  }

  const int64_t segment = block.row * block.segments + block.segment;
  block.write_saved(p.segments.states, p.segments.state_tangents, segment, grad_h);
  write_steps(block, p.segments, total, has_reset);
}

// Carries each state from segment to segment: replaces a segment's contribution by the state that the segment starts
// from.
template <class Z, bool kBackward>
EAML_KERNEL(256)
carry_kernel(EAML_CONSTANT ScanParams params, EAML_CONSTANT Arrays<vector_t<Z>> arrays,
             EAML_CONSTANT TimeSegments<vector_t<Z>> segments) {
  using S = real_t<Z>;
  using T = vector_t<Z>;
  const int64_t index = cuda::block() * 256 + cuda::thread();
  if (index >= params.batch * params.dstate * params.dim) return;
  const int64_t channel = index % params.dim, n = index / params.dim % params.dstate,
                row = index / params.dim / params.dstate;
  const auto at = [&](const In<T>& in) { return row_offset(in, row) + channel * in.channel + n * in.inner; };
  Z h = read_input<Z>(arrays, kBackward ? &Inputs<T>::grad_state : &Inputs<T>::initial_state, at);
  const Z A[1] = {read_input<Z>(arrays, &Inputs<T>::A, at)};
  const Rate<Z> rate[1] = {rate_of(A[0])};
  for (int64_t i = 0; i < segments.count; ++i) {
    const int64_t segment = row * segments.count + (kBackward ? segments.count - 1 - i : i);
    const int64_t step = segment * params.dim + channel;
    const int64_t state = (segment * params.dstate + n) * kNumComponents<Z> * params.dim + channel;
    const Z added = get_saved<Z>(segments.states, segments.state_tangents, state, params.dim);
    const S dt = get_saved<S>(segments.steps, segments.step_tangents, step, 0);
    set_saved(segments.states, segments.state_tangents, state, params.dim, h);
    Z a[1];
    decay(dt, A, rate, a);
    h = segments.has_reset[step] != T(0) ? added : decayed(kBackward ? conjugate(a[0]) : a[0], h) + added;
  }
}

}  // namespace
}  // namespace eaml::selective_scan
