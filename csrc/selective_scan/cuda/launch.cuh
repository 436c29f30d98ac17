// Launchers, on the host: the choice of a tiling and of a kernel.
#pragma once

#include "selective_scan/cuda/backward.cuh"
#include "selective_scan/cuda/fast_kernels.h"
#include "selective_scan/cuda/forward.cuh"
#include "selective_scan/cuda/reduce.cuh"
#include "selective_scan/cuda/step.cuh"
#include "selective_scan/cuda/time_segments.cuh"

namespace eaml::selective_scan {
namespace {

// Calls f(Tiling) with the smallest Tiling that holds the states. A thread's states take 16 bytes. They take more
// only if the threads of a warp could not hold the states of a channel otherwise.
template <class Z, int kLanes, class F>
const char* with_tiling_from(int64_t states, F f) {
  constexpr int kStates = 4 / kWords<Z>;
  if (states <= kLanes * kStates) return f(Tiling<Z, kLanes, kStates>());
  if constexpr (kLanes < cuda::kWarp)
    return with_tiling_from<Z, 2 * kLanes>(states, f);
  else
    return f(Tiling<Z, kLanes, kMaxStateSize / cuda::kWarp / kNumComponents<Z>>());
}
template <class Z, class F>
const char* with_tiling(int64_t states, F f) {
  if constexpr (kWords<Z> == 1) {
    if (states <= 4) return f(Tiling<Z, 1, 4>());
  }
  return with_tiling_from<Z, 4 * kWords<Z>>(states, f);
}

// The number of time segments of a row. It does not depend on the batch, so the bits of a row do not either. Segments
// cost another pass over the inputs of the recurrence. They pay if the channels of a row occupy a small part of a large
// GPU, which holds about 2000 warps of these kernels on 528 schedulers. Rows with 64 warps or more have no segments,
// nor have packed sequences, whose lengths are in GPU memory alone.
inline int64_t num_time_segments(const ScanParams& s, int64_t warps_of_row) {
  constexpr int64_t kMaxDividedWarps = 64, kWantedWarps = 2048, kMinChunks = 8;
  if (s.split_invariant || s.cu_seqlens || warps_of_row >= kMaxDividedWarps || warps_of_row == 0) return 1;
  const int64_t chunks = (s.length + kChunk - 1) / kChunk;
  const int64_t wanted = kWantedWarps / warps_of_row, most = chunks / kMinChunks;
  const int64_t segments = wanted < most ? wanted : most;
  return segments < 2 ? 1 : segments;
}

template <class Z>
BlockCounts block_counts_of(const ScanParams& s) {
  BlockCounts c{};
  with_tiling<Z>(s.dstate, [&](auto tiling) {
    using L = decltype(tiling);
    c.channel_blocks = (s.dim / s.groups + L::kChannels - 1) / L::kChannels;
    c.time_segments = num_time_segments(s, s.groups * c.channel_blocks * L::kWarps);
    return nullptr;
  });
  return c;
}

template <class Z, bool kBackward, class P>
const char* launch_carry(const P& p, void* stream) {
  const int64_t states = p.params.batch * p.params.dstate * p.params.dim;
  return cuda::launch(carry_kernel<Z, kBackward>, (states + 255) / 256, 256, 0, stream, p.params, p.arrays, p.segments);
}

// The fast kernel of a call; empty if the states are not real floats.
template <class Z, class P>
FastKernel<P> find_fast_kernel(const P& p) {
  if constexpr (std::is_same_v<Z, float> || std::is_same_v<Z, Dual<float>>)
    return fast_kernel(p, kIsDual<Z>);
  else
    return {};
}

template <class Z>
const char* launch_forward(const ForwardParams<vector_t<Z>>& p, void* stream) {
  return with_tiling<Z>(p.params.dstate, [&](auto tiling) {
    using L = decltype(tiling);
    const int64_t blocks =
        p.params.batch * p.params.groups * block_counts_of<Z>(p.params).channel_blocks * p.segments.count;
    const bool invariant = p.params.B_invariant || p.params.C_invariant;
    const auto kernel = invariant ? forward_kernel<L, true> : forward_kernel<L, !L::kHasVaryingKernel>;
    if (p.segments.count > 1) {
      ForwardParams<vector_t<Z>> local = p;
      local.out = {}, local.segments.local = true;
      const char* error = cuda::launch(kernel, blocks, L::kThreads, L::kForwardBytes, stream, local);
      if (error == nullptr) error = launch_carry<Z, false>(p, stream);
      if (error != nullptr) return error;
    }
    if (const auto fast = find_fast_kernel<Z>(p); fast.kernel != nullptr)
      return cuda::launch(fast.kernel, blocks, L::kThreads, fast.shared_bytes, stream, p);
    return cuda::launch(kernel, blocks, L::kThreads, L::kForwardBytes, stream, p);
  });
}

template <class Z>
const char* launch_backward(const BackwardParams<vector_t<Z>>& p, void* stream) {
  return with_tiling<Z>(p.params.dstate, [&](auto tiling) {
    using L = decltype(tiling);
    const int64_t blocks =
        p.params.batch * p.params.groups * block_counts_of<Z>(p.params).channel_blocks * p.segments.count;
    if (p.segments.count > 1) {
      const char* error = cuda::launch(local_backward_kernel<L>, blocks, L::kThreads, L::kForwardBytes, stream, p);
      if (error == nullptr) error = launch_carry<Z, true>(p, stream);
      if (error != nullptr) return error;
    }
    if (const auto fast = find_fast_kernel<Z>(p); fast.kernel != nullptr)
      return cuda::launch(fast.kernel, blocks, L::kThreads, fast.shared_bytes, stream, p);
    const bool invariant = p.params.B_invariant || p.params.C_invariant;
    const auto kernel = invariant ? backward_kernel<L, true> : backward_kernel<L, !L::kHasVaryingKernel>;
    return cuda::launch(kernel, blocks, L::kThreads, L::kBackwardBytes, stream, p);
  });
}

template <class Z>
const char* launch_step(const ForwardParams<vector_t<Z>>& p, void* stream) {
  return with_tiling<Z>(p.params.dstate, [&](auto tiling) {
    using L = decltype(tiling);
    const int64_t threads = p.params.batch * p.params.dim * L::kLanes;
    return cuda::launch(step_kernel<L>, (threads + kStepThreads - 1) / kStepThreads, kStepThreads, 0, stream, p);
  });
}

template <class T>
const char* launch_sum(const SumParams<T>& p, void* stream) {
  const int64_t blocks = p.outer * ((p.inner + kSumColumns - 1) / kSumColumns);
  return cuda::launch(sum_kernel<T>, blocks, kSumColumns * kSumRows, kSumColumns * kSumRows * sizeof(T), stream, p);
}

template <class S>
using Real = S;

}  // namespace

// Defines the launchers for numbers of T; STATE<T> is the type of the states.
#define EAML_DEFINE(T, STATE)                                                                        \
  template <>                                                                                        \
  BlockCounts block_counts<T>(const ScanParams& params) {                                            \
    return block_counts_of<STATE<T>>(params);                                                        \
  }                                                                                                  \
  const char* forward(const ForwardParams<T>& p, bool dual, void* stream) {                          \
    return dual ? launch_forward<STATE<Dual<T>>>(p, stream) : launch_forward<STATE<T>>(p, stream);   \
  }                                                                                                  \
  const char* backward(const BackwardParams<T>& p, bool dual, void* stream) {                        \
    return dual ? launch_backward<STATE<Dual<T>>>(p, stream) : launch_backward<STATE<T>>(p, stream); \
  }                                                                                                  \
  const char* step(const ForwardParams<T>& p, void* stream) {                                        \
    return launch_step<STATE<T>>(p, stream);                                                         \
  }

}  // namespace eaml::selective_scan
