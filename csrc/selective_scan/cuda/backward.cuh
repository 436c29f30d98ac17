// The backward kernel. On duals it computes the second-order gradients.
#pragma once

#include "selective_scan/cuda/block.cuh"

namespace eaml::selective_scan {
namespace {

template <class L, bool kInvariant>
EAML_KERNEL(L::kThreads, L::kBackwardBlocks)
backward_kernel(EAML_CONSTANT BackwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  constexpr int kStates = L::kStates, kReals = L::kReals;
  constexpr int kTerms = 2 * kReals, kLeft = kSumsLeft<L::kLanes, cuda::kWarp, kTerms>;
  Block<L> block(p.params, p.arrays, p.segments.count);
  const int64_t begin = block.first_chunk(block.segment);
  Tile<Z, L::kStarts> starts;
  starts.data.data = block.unused_memory();
  const Shared<T> terms{block.unused_memory() + L::kStarts * L::kStateNumbers};
  const bool gated = p.params.gated, shared_decay = shares_decay(p.arrays);
  const int64_t columns = p.params.dstate * kNumComponents<Z>;

  Z A[kStates], grad_h[kStates];
  Rate<Z> rate[kStates];
  output_t<Z> sum_A[kStates], sum_B[kStates], sum_C[kStates];
  T sum_D = T(0), sum_bias = T(0);
  block.stage_vectors();
  block.read_rates(A, rate);
  if (block.segments == 1)
    block.read_states(grad_h, &Inputs<T>::grad_state);
  else
    block.read_saved(grad_h, p.segments.states, p.segments.state_tangents, block.row * block.segments + block.segment);
  Operand<L, kInvariant> B, C;
  B.start(block, &Inputs<T>::B, p.params.B_invariant);
  C.start(block, &Inputs<T>::C, p.params.C_invariant);
  EAML_UNROLL
  for (int k = 0; k < kStates; ++k) sum_A[k] = sum_B[k] = sum_C[k] = output_t<Z>{};

  for (int64_t chunk = block.first_chunk(block.segment + 1) - 1; chunk >= begin; --chunk) {
    const int steps = block.steps(chunk);
    const int last = (steps - 1) / kStepsPerTile * kStepsPerTile;
    const std::uint32_t resets = block.resets(chunk, steps);
    Z h[kStates];
    if (chunk > 0)
      block.read_saved(h, p.out.checkpoints, p.out.checkpoint_tangents, block.first_saved + chunk - 1);
    else
      block.read_states(h, &Inputs<T>::initial_state);
    cuda::sync_block();  // the previous chunk's tiles are no longer read
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = block.time(chunk) + t;
      const S u = block.template read_sequence<half>(&Inputs<T>::u, c, time);
      S grad_y = block.template read_sequence<half>(&Inputs<T>::grad_y, c, time);
      if (gated) {
        const S z = block.template read_sequence<half>(&Inputs<T>::z, c, time);
        grad_y = grad_y * (z * sigmoid(z));
      }
      const S dt = block.template read_step<half>(c, time).value;
      const int i = t * L::kRow + c;
      block.dt.set(i, dt), block.x.set(i, dt * u), block.y.set(i, conjugate_pair_sum<Z>(grad_y));
    });
    cuda::sync_block();

    // Forward from the start of the chunk to the start of its last tile.
    block.staged = -1;
    for (int start = 0;; start += kStepsPerTile) {
      EAML_UNROLL
      for (int k = 0; k < kStates; ++k)
        starts.set((start / kStepsPerTile * kStates + k) * L::kThreads + block.thread, h[k]);
      if (start == last) break;
      block.need_matrices(chunk, start, true, L::kMatrixSteps == kSteps);
      if (!block.has_channel()) continue;
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = start + i;
        if (resets >> t & 1) {
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) h[k] = Z{};
        }
        const int at = block.tile_at(t);
        const S x = block.x.get(at);
        Z a[kStates];
        decay_of_thread(shared_decay, block.dt.get(at), A, rate, a);
        B.step(block.B, block.matrix_at(t));
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) h[k] = advance(a[k], h[k], x, B.x[k]);
      }
    }

    // Backward. Each tile is recomputed from its start, with decays and states in registers.
    if (L::kMatrixSteps != kSteps) block.staged = -1;
    for (int start = last; start >= 0; start -= kStepsPerTile) {
      block.need_matrices(chunk, start, true, true);
      Z a[kStepsPerTile][kStates], decayed_h[kStepsPerTile][kStates];
      S sums_x[kStepsPerTile], sums_dt[kStepsPerTile], sums_y[kStepsPerTile];
      EAML_UNROLL
      for (int k = 0; k < kStates; ++k)
        h[k] = starts.get((start / kStepsPerTile * kStates + k) * L::kThreads + block.thread);
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = start + i;
        sums_y[i] = S{};
        if (t >= steps || !block.has_channel()) continue;
        if (resets >> t & 1) {
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) h[k] = Z{};
        }
        const int at = block.tile_at(t), row = block.matrix_at(t);
        const S x = block.x.get(at);
        decay_of_thread(shared_decay, block.dt.get(at), A, rate, a[i]);
        B.step(block.B, row);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) {
          decayed_h[i][k] = decayed(a[i][k], h[k]);
          h[k] = decayed_h[i][k] + x * B.x[k];
        }
        if (gated) {
          C.step(block.C, row);
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) sums_y[i] = add_product(sums_y[i], h[k], C.x[k]);
          sums_y[i] = conjugate_pair_sum<Z>(sums_y[i]);
        }
      }

      EAML_UNROLL
      for (int i = kStepsPerTile - 1; i >= 0; --i) {
        const int t = start + i;
        T term[kTerms];  // of the gradients of B, then of C
        EAML_UNROLL
        for (int k = 0; k < kTerms; ++k) term[k] = T(0);
        sums_x[i] = S{}, sums_dt[i] = S{};
        if (t < steps && block.has_channel()) {
          const int at = block.tile_at(t), row = block.matrix_at(t);
          const S dt = block.dt.get(at), x = block.x.get(at), grad_y = block.y.get(at);
          B.step(block.B, row), C.step(block.C, row);
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) {
            const output_t<Z> grad_C = output(times_conjugate(grad_y, decayed_h[i][k] + x * B.x[k]));
            const StepGradient<Z, S> g = step_backward(grad_h[k], grad_y, a[i][k], decayed_h[i][k], x, B.x[k], C.x[k]);
            grad_h[k] = g.h_prev;
            sums_x[i] = sums_x[i] + g.x;
            sums_dt[i] = sums_dt[i] + real(times_conjugate(g.dt_A, A[k]));
            sum_A[k] = sum_A[k] + output(g.dt_A * dt);
            if (kInvariant) sum_B[k] = sum_B[k] + output(g.B), sum_C[k] = sum_C[k] + grad_C;
            put(term + k * kNumComponents<Z>, output(g.B)), put(term + kReals + k * kNumComponents<Z>, grad_C);
          }
        }
        if (resets >> t & 1) {
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) grad_h[k] = Z{};
        }
        if (B.fixed && C.fixed) continue;
        int first_term = 0;
        bool mine = true;
        reduce_scatter<L::kLanes, cuda::kWarp, kTerms>(term, first_term, mine);
        if (!mine) continue;
        const int warp = block.thread / cuda::kWarp;
        EAML_UNROLL
        for (int k = 0; k < kLeft; ++k) {
          const int which = (first_term + k) / kReals, column = block.lane * kReals + (first_term + k) % kReals;
          terms.set(((warp * kStepsPerTile + i) * 2 + which) * L::kColumns + column, term[k]);
        }
      }

      cuda::sync_warp();  // all lanes of a channel have read the rows that these sums overwrite
      const int at = block.tile_at(start);
      put_sums<L>(sums_x, block.x, at, false);
      put_sums<L>(sums_dt, block.dt, at, false);
      if (gated) put_sums<L>(sums_y, block.y, at, false);
      if (B.fixed && C.fixed) continue;
      cuda::sync_block();
      for (int i = block.thread; i < L::kTermsOfWarp; i += L::kThreads) {
        const int column = i % L::kColumns, which = i / L::kColumns % 2, t = start + i / (2 * L::kColumns);
        if (t >= steps || column >= columns || (which ? C.fixed : B.fixed)) continue;
        T total = terms.get(i);
        for (int warp = 1; warp < L::kWarps; ++warp) total += terms.get(warp * L::kTermsOfWarp + i);
        const int64_t time = block.index * p.params.length + block.time(chunk) + t;
        (which ? p.out.C : p.out.B)[time * columns + column] = total;
      }
      cuda::sync_block();
    }

    cuda::sync_block();
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = block.time(chunk) + t, channel = block.first + c;
      const int i = t * L::kRow + c;
      const S u = block.template read_sequence<half>(&Inputs<T>::u, c, time), D = block.D.get(c);
      const Softplus<S> dt = block.template read_step<half>(c, time);
      const S grad_x = block.x.get(i), grad_dt = block.dt.get(i);
      S grad_y = block.template read_sequence<half>(&Inputs<T>::grad_y, c, time);
      const auto send = [&](const Out<T>& out, T x) {
        write<half>(out, block.batch_row * out.outer + channel * out.channel + time * out.inner, x);
      };
      if (gated) {
        const S z = block.template read_sequence<half>(&Inputs<T>::z, c, time), s = sigmoid(z),
                y = block.y.get(i) + D * u;
        send(p.out.z, output(grad_y * y * (s + z * (s * (S(T(1)) - s)))));
        grad_y = grad_y * (z * s);
      }
      const T grad_delta = output((grad_dt + u * grad_x) * dt.slope);
      send(p.out.u, output(dt.value * grad_x + D * grad_y));
      send(p.out.delta, grad_delta);
      // From here on, x and dt hold the terms of the gradients of D and delta_bias.
      block.x.data.set(i, output(grad_y * u)), block.dt.data.set(i, grad_delta);
    });
    cuda::sync_block();
    for (int t = block.lane; block.has_channel() && t < steps; t += L::kLanes)
      sum_D += block.x.data.get(block.tile_at(t)), sum_bias += block.dt.data.get(block.tile_at(t));
  }

  const int64_t rows = block.row * block.segments + block.segment;
  EAML_UNROLL
  for (int k = 0; k < kStates; ++k) {
    if (!block.has_state(k)) continue;
    const int64_t at = block.partial_at(rows, k);
    put(p.out.A + at, sum_A[k]);
    if (B.fixed) put(p.out.B + at, sum_B[k]);
    if (C.fixed) put(p.out.C + at, sum_C[k]);
    if (p.out.initial_state && block.segment == 0)
      put(p.out.initial_state + block.partial_at(block.row, k), output(grad_h[k]));
  }
  int first = 0;
  bool mine = true;
  reduce_scatter<1, L::kLanes, 1>(&sum_D, first, mine);
  reduce_scatter<1, L::kLanes, 1>(&sum_bias, first, mine);
  if (!block.has_channel() || block.lane != 0) return;
  const int64_t at = rows * p.params.dim + block.first + block.channel;
  if (p.out.D) p.out.D[at] = sum_D;
  if (p.out.delta_bias) p.out.delta_bias[at] = sum_bias;
}

}  // namespace
}  // namespace eaml::selective_scan
