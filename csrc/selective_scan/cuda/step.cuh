// The kernel of a single step, whose states are inputs and outputs.
#pragma once

#include "selective_scan/cuda/tile.cuh"

namespace eaml::selective_scan {
namespace {

// One step of every channel. It sums over the states in the order of the scan, and computes the scan's bits.
constexpr int kStepThreads = 128;
template <class L>
EAML_KERNEL(kStepThreads)
step_kernel(EAML_CONSTANT ForwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using T = typename L::T;
  constexpr int kStates = L::kStates;
  const ScanParams& params = p.params;
  const Inputs<T>& in = p.arrays.values;
  const int64_t index = (cuda::block() * kStepThreads + cuda::thread()) / L::kLanes;
  const int lane = cuda::thread() % L::kLanes;
  const int64_t row = index / params.dim, channel = index % params.dim;
  const bool has_channel = row < params.batch;
  T sum = T(0), u = T(0);
  if (has_channel) {
    const auto sequence = [&](const In<T>& x) { return read(x, row * x.outer + channel * x.channel); };
    const auto vector = [&](const In<T>& x) { return read(x, row_offset(x, row) + channel * x.channel); };
    const int64_t group = channel / (params.dim / params.groups);
    // Reads a state's entry of an input: of B or C, or of an array of the channel's states.
    const auto read_state = [&](In<T> Inputs<T>::* member, bool is_matrix, int64_t n, Z padding) {
      const auto at = [&](const In<T>& x) {
        return is_matrix ? row * x.outer + group * x.group + n * x.channel
                         : row_offset(x, row) + channel * x.channel + n * x.inner;
      };
      return n < params.dstate ? read_input<Z>(p.arrays, member, at) : padding;
    };
    Z A[kStates], h[kStates], B[kStates], C[kStates], a[kStates];
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = lane * kStates + k;
      A[k] = read_state(&Inputs<T>::A, false, n, Z{T(-1)}), h[k] = read_state(&Inputs<T>::initial_state, false, n, Z{});
      B[k] = read_state(&Inputs<T>::B, true, n, Z{}), C[k] = read_state(&Inputs<T>::C, true, n, Z{});
    }
    Rate<Z> rate[kStates];
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) rate[k] = rate_of(A[k]);
    u = sequence(in.u);
    const T dt = step_size(sequence(in.delta) + vector(in.delta_bias), params.softplus).value;
    decay_of_thread(shares_decay(p.arrays), dt, A, rate, a);
    const Out<T>& out = p.out.last_state;
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) {
      const int64_t n = lane * kStates + k;
      h[k] = advance(a[k], h[k], dt * u, B[k]);
      sum = add_product(sum, h[k], C[k]);
      if (n < params.dstate) put(out.data + row * out.outer + channel * out.channel + n * out.inner, h[k]);
    }
    sum = conjugate_pair_sum<Z>(sum);
  }
  int first = 0;
  bool mine = true;
  reduce_scatter<1, L::kLanes, 1>(&sum, first, mine);
  if (!has_channel || lane != 0) return;
  T y = rounded_product(read(in.D, row_offset(in.D, row) + channel * in.D.channel), u) + sum;
  if (params.gated) {
    const T z = read(in.z, row * in.z.outer + channel * in.z.channel);
    y = y * (z * sigmoid(z));
  }
  write(p.out.y, row * p.out.y.outer + channel * p.out.y.channel, y);
}

}  // namespace
}  // namespace eaml::selective_scan
