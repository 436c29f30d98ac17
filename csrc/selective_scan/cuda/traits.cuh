// The CUDA kernels as templates on a Tiling, which assigns channels and states to threads. A Tiling has the type Z of
// A, B, C and the states: a number T, a Dual<T>, or a Complex of either. Sequences have the type real_t<Z>, S: T or
// Dual<T>.
//
// A block computes some channels of one batch row, one step after the other. Each channel has a few adjacent threads of
// a warp, its lanes, and each lane keeps kStates of the channel's states in registers. The scan goes through time in
// chunks. The sequences of a chunk are staged in shared memory, read along whichever dimension is contiguous. B and C
// of some steps are staged for all channels of the block. Sums over states and over channels of a warp are computed for
// four steps at once. At each shuffle a thread gives away half of its sums and keeps the others, so a step costs less
// than one shuffle.
//
// Backward goes from the last chunk to the first. It recomputes the states of a chunk from the state saved at its
// start, and keeps the states at the start of each tile of four steps. Then it goes back tile by tile.
//
// With few channels and many steps, time is divided into segments, each a block of its own. The local kernels compute
// each segment's contribution to the state after it (backward: to the gradient before it). `carry_kernel` combines the
// contributions from segment to segment. Then the forward or backward kernel runs all segments at the same time.
#pragma once

#include <type_traits>

#include "common/cuda_compat.h"
#include "common/softplus.h"
#include "selective_scan/cuda/launch.h"
#include "selective_scan/recurrence.h"

namespace eaml::selective_scan {
namespace {

using cuda::Shared;
using std::int64_t;

constexpr int kSteps = kChunk;    // steps of a chunk
constexpr int kStepsPerTile = 4;  // steps whose sums are computed together

template <class Z>
constexpr int kWords = kNumComponents<Z> * sizeof(vector_t<Z>) / 4;  // 32-bit words of a Z without its tangent

template <class Z_, int kLanes_, int kStates_>
struct Tiling {
  using Z = Z_;
  using S = real_t<Z>;
  using T = vector_t<Z>;
  static constexpr int kLanes = kLanes_;                              // threads of a channel
  static constexpr int kStates = kStates_;                            // states of a thread
  static constexpr int kPadded = kLanes * kStates;                    // states of a channel
  static constexpr int kNumbers = kIsDual<Z> ? 2 : 1;                 // numbers T of an S
  static constexpr int kStateNumbers = kNumbers * kNumComponents<Z>;  // numbers T of a Z
  static constexpr int kReals = kStates * kNumComponents<Z>;  // real numbers of a thread's states, without tangents
  static constexpr int kMaxThreads = 512 / (kStates * kWords<Z>);  // limited by shared memory
  static constexpr int kThreads = kLanes * 32 < kMaxThreads ? kLanes * 32 : kMaxThreads;
  static constexpr int kWarps = kThreads / cuda::kWarp;
  static constexpr int kChannels = kThreads / kLanes;
  static constexpr int kRow =
      kChannels + 1;  // a row of a [step][channel] tile, padded so that columns lie in different banks
  static constexpr int kTile = kSteps * kRow;
  static constexpr int kVector = kChannels;  // one number per channel
  // Steps of B and C in shared memory: a chunk, or fewer if there are many states.
  static constexpr int kFittingSteps = 1024 / (kPadded * kWords<Z>);
  static constexpr int kMatrixSteps = kFittingSteps > kSteps          ? kSteps
                                      : kFittingSteps < kStepsPerTile ? kStepsPerTile
                                                                      : kFittingSteps;
  static constexpr int kMatrixRow = kPadded + 4;             // padded against bank conflicts
  static constexpr int kMatrix = kMatrixSteps * kMatrixRow;  // [step][state]
  static constexpr int kStepTiles = kSteps / kStepsPerTile;
  static constexpr int kStarts = kStepTiles * kStates * kThreads;    // [step tile][state][thread]
  static constexpr int kColumns = kLanes * kReals;                   // real numbers of a step's B or C
  static constexpr int kTermsOfWarp = kStepsPerTile * 2 * kColumns;  // [step][B or C][state][component] of one warp
  // Threads per multiprocessor: the largest numbers that leave each thread the registers it uses. They are tuned for
  // tilings with 16 bytes of states per thread.
  static constexpr bool kTunedOccupancy = kStates * kWords<Z> == 4;
  static constexpr bool kRealFloat = kWords<Z> == 1;  // real states in single precision
  static constexpr int kForwardThreads = kIsDual<Z> ? (kRealFloat ? 384 : 256) : (kRealFloat ? 640 : 512);
  static constexpr int kBackwardThreads = kRealFloat && !kIsDual<Z> ? 384 : 256;
  static constexpr int kForwardBlocks = kTunedOccupancy ? kForwardThreads / kThreads : 1;
  static constexpr int kBackwardBlocks = kTunedOccupancy ? kBackwardThreads / kThreads : 1;
  // Whether B and C that both vary in time have kernels of their own, without code for invariant ones.
  static constexpr bool kHasVaryingKernel = kTunedOccupancy && kRealFloat && !kIsDual<Z>;
  static_assert(kThreads % cuda::kWarp == 0 && kMatrixSteps % kStepsPerTile == 0);

  static constexpr std::size_t kForwardBytes =
      ((3 * kTile + 2 * kVector) * kNumbers + 2 * kMatrix * kStateNumbers) * sizeof(T);
  static constexpr std::size_t kBackwardBytes =
      kForwardBytes + (kStarts * kStateNumbers + kWarps * kTermsOfWarp) * sizeof(T);
  static_assert(kBackwardBytes <= 99 << 10, "more shared memory than a block has on the smaller GPUs");
};

}  // namespace
}  // namespace eaml::selective_scan
