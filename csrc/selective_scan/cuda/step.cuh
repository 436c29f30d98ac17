// The kernel of a single step, whose states are inputs and outputs.
#pragma once

#include "selective_scan/cuda/tile.cuh"

namespace eaml::selective_scan {
namespace {

// One step of every channel; the states of a channel are divided among `lanes` adjacent threads.
constexpr int kStepThreads = 128;
template <class Z>
EAML_KERNEL(kStepThreads)
step_kernel(EAML_CONSTANT ForwardParams<vector_t<Z>> p, int lanes) {
  using T = vector_t<Z>;
  const ScanParams& params = p.params;
  const Inputs<T>& in = p.arrays.values;
  const int64_t index = (cuda::block() * kStepThreads + cuda::thread()) / lanes;
  const int lane = cuda::thread() % lanes;
  const int64_t row = index / params.dim, channel = index % params.dim;
  const bool mine = row < params.batch;
  T y = T(0), u = T(0);
  if (mine) {
    const auto sequence = [&](const In<T>& x) { return read(x, row * x.outer + channel * x.channel); };
    const auto vector = [&](const In<T>& x) { return read(x, row_offset(x, row) + channel * x.channel); };
    const int64_t group = channel / (params.dim / params.groups);
    u = sequence(in.u);
    const T dt = step_size(sequence(in.delta) + vector(in.delta_bias), params.softplus).value;
    for (int64_t n = lane; n < params.dstate; n += lanes) {
      const auto matrix = [&](In<T> Inputs<T>::* member) {
        const auto at = [&](const In<T>& x) { return row * x.outer + group * x.group + n * x.channel; };
        return read_input<Z>(p.arrays, member, at);
      };
      const auto state = [&](In<T> Inputs<T>::* member) {
        const auto at = [&](const In<T>& x) { return row_offset(x, row) + channel * x.channel + n * x.inner; };
        return read_input<Z>(p.arrays, member, at);
      };
      const Z A[1] = {state(&Inputs<T>::A)};
      const Rate<Z> rate[1] = {rate_of(A[0])};
      Z a[1];
      decay(dt, A, rate, a);
      const Z h = advance(a[0], state(&Inputs<T>::initial_state), dt * u, matrix(&Inputs<T>::B));
      const Out<T>& out = p.out.last_state;
      put(out.data + row * out.outer + channel * out.channel + n * out.inner, h);
      y += real(h * matrix(&Inputs<T>::C));
    }
    y = conjugate_pair_sum<Z>(y);
    if (lane == 0) y += vector(in.D) * u;
  }
  for (int mask = 1; mask < lanes; mask *= 2) y += cuda::shuffle_xor(y, mask);
  if (!mine || lane != 0) return;
  if (params.gated) {
    const T z = read(in.z, row * in.z.outer + channel * in.z.channel);
    y *= z * sigmoid(z);
  }
  write(p.out.y, row * p.out.y.outer + channel * p.out.y.channel, y);
}

}  // namespace
}  // namespace eaml::selective_scan
