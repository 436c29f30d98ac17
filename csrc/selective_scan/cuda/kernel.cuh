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

// An array in shared memory. Tangents of duals are stored kSize numbers after the values.
template <class S, int kSize>
struct Tile {
  Shared<S> data;
  EAML_MEMBER S get(int i) const { return data.get(i); }
  EAML_MEMBER void set(int i, S x) const { data.set(i, x); }
  template <int K>
  EAML_MEMBER void get_row(S (&to)[K], int i) const {
    data.get_row(to, i);
  }
  template <int K>
  EAML_MEMBER void set_row(const S (&from)[K], int i) const {
    data.set_row(from, i);
  }
};
template <class V, int kSize>
struct Tile<Dual<V>, kSize> {
  Shared<V> data;
  EAML_MEMBER Dual<V> get(int i) const { return {data.get(i), data.get(kSize + i)}; }
  EAML_MEMBER void set(int i, Dual<V> x) const { data.set(i, x.value), data.set(kSize + i, x.tangent); }
  template <int K>
  EAML_MEMBER void get_row(Dual<V> (&to)[K], int i) const {
    V value[K], tangent[K];
    data.get_row(value, i), data.get_row(tangent, kSize + i);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) to[k] = {value[k], tangent[k]};
  }
  template <int K>
  EAML_MEMBER void set_row(const Dual<V> (&from)[K], int i) const {
    V value[K], tangent[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) value[k] = from[k].value, tangent[k] = from[k].tangent;
    data.set_row(value, i), data.set_row(tangent, kSize + i);
  }
};
// The components of a complex number are adjacent.
template <class S, int kSize>
struct Tile<Complex<S>, kSize> : Tile<S, 2 * kSize> {
  using Components = Tile<S, 2 * kSize>;
  EAML_MEMBER Complex<S> get(int i) const {
    S x[2];
    Components::get_row(x, 2 * i);
    return {x[0], x[1]};
  }
  EAML_MEMBER void set(int i, const Complex<S>& x) const {
    const S row[2] = {x.re, x.im};
    Components::set_row(row, 2 * i);
  }
  template <int K>
  EAML_MEMBER void get_row(Complex<S> (&to)[K], int i) const {
    S x[2 * K];
    Components::get_row(x, 2 * i);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) to[k] = {x[2 * k], x[2 * k + 1]};
  }
};

// kHalf: whether the array has reduced precision.
template <bool kHalf = false, class T>
EAML_DEVICE T read(const In<T>& in, int64_t offset) {
  if (in.data == nullptr) return T(0);
  if constexpr (kHalf) {
    const std::uint16_t* const from = reinterpret_cast<const std::uint16_t*>(in.data) + offset;
    return in.half == Half::kBfloat16 ? load_half<Half::kBfloat16, T>(from) : load_half<Half::kFloat16, T>(from);
  } else {
    return cuda::load(in.data + offset);
  }
}
template <bool kHalf = false, class T>
EAML_DEVICE void write(const Out<T>& out, int64_t offset, T x) {
  if constexpr (kHalf) {
    std::uint16_t* const to = reinterpret_cast<std::uint16_t*>(out.data) + offset;
    out.half == Half::kBfloat16 ? store_half<Half::kBfloat16>(to, x) : store_half<Half::kFloat16>(to, x);
  } else {
    out.data[offset] = x;
  }
}

// Stores a number, or the adjacent components of a complex number.
template <class T>
EAML_DEVICE void put(T* to, T x) {
  *to = x;
}
template <class T>
EAML_DEVICE void put(T* to, const Complex<T>& x) {
  to[0] = x.re, to[1] = x.im;
}

// Reads an input as a Z: the value and, for duals, the tangent. at(in) returns the offset in an array with in's
// strides.
template <class Z, bool kHalf = false, class F>
EAML_DEVICE Z read_input(const Arrays<vector_t<Z>>& arrays, In<vector_t<Z>> Inputs<vector_t<Z>>::* member, F at) {
  const auto& value = arrays.values.*member;
  if constexpr (kNumComponents<Z> == 2) {
    const auto next = [&](const auto& in) { return at(in) + 1; };
    return {read_input<real_t<Z>>(arrays, member, at), read_input<real_t<Z>>(arrays, member, next)};
  } else if constexpr (kIsDual<Z>) {
    const auto& tangent = arrays.tangents.*member;
    return {read<kHalf>(value, at(value)), read<kHalf>(tangent, at(tangent))};
  } else {
    return read<kHalf>(value, at(value));
  }
}

// Reads a Z of saved states. Duals have two arrays; the components of a complex number are `step` numbers apart.
template <class Z, class T>
EAML_DEVICE Z get_saved(const T* value, const T* tangent, int64_t i, int64_t step) {
  if constexpr (kNumComponents<Z> == 2)
    return {get_saved<real_t<Z>>(value, tangent, i, step), get_saved<real_t<Z>>(value, tangent, i + step, step)};
  else if constexpr (kIsDual<Z>)
    return {value[i], tangent[i]};
  else
    return value[i];
}
template <class Z, class T>
EAML_DEVICE void set_saved(T* value, T* tangent, int64_t i, int64_t step, const Z& x) {
  if constexpr (kNumComponents<Z> == 2)
    set_saved(value, tangent, i, step, x.re), set_saved(value, tangent, i + step, step, x.im);
  else if constexpr (kIsDual<Z>)
    value[i] = x.value, tangent[i] = x.tangent;
  else
    value[i] = x;
}

template <class T>
EAML_DEVICE int64_t row_offset(const In<T>& in, int64_t row) {
  return (in.rows_per_outer == 1 ? row : row / in.rows_per_outer) * in.outer;
}

// dt and d dt / d delta, where `shifted` is delta + delta_bias.
template <class S>
EAML_DEVICE Softplus<S> step_size(S shifted, bool by_softplus) {
  Softplus<S> out[1] = {{shifted, S(vector_t<S>(1))}};
  if (by_softplus) {
    const S in[1] = {shifted};
    softplus(in, out);
  }
  return out[0];
}

template <class V>
EAML_DEVICE Rate<V> rate_of(V A) {
  return {A * V(kLog2e)};
}
template <class V>
EAML_DEVICE Rate<Dual<V>> rate_of(const Dual<V>& A) {
  return {A.value * V(kLog2e)};
}
template <class S>
EAML_DEVICE Rate<Complex<S>> rate_of(const Complex<S>& A) {
  const auto value = [](const S& x) {
    if constexpr (kIsDual<S>)
      return x.value;
    else
      return x;
  };
  return {value(A.re) * vector_t<S>(kLog2e), half_turns(value(A.im))};
}

// Sums v[k] over the threads of a warp that differ in the bits from kFrom up to kTo, both powers of two, and
// distributes the K sums over these threads. Afterwards v[0 .. max(1, K kFrom / kTo)) holds the sums from index `first`
// on. If there are more threads than sums, `mine` is true on one thread per sum.
template <int kFrom, int kTo, int K, class T>
EAML_DEVICE void reduce_scatter(T* v, int& first, bool& mine) {
  if constexpr (kFrom < kTo) {
    const bool upper = cuda::thread() & kFrom;
    if constexpr (K > 1) {
      EAML_UNROLL
      for (int k = 0; k < K / 2; ++k) {
        const T given = upper ? v[k] : v[k + K / 2], kept = upper ? v[k + K / 2] : v[k];
        v[k] = kept + cuda::shuffle_xor(given, kFrom);
      }
      first += upper ? K / 2 : 0;
    } else {
      v[0] = v[0] + cuda::shuffle_xor(v[0], kFrom);
      mine = mine && !upper;
    }
    reduce_scatter<2 * kFrom, kTo, (K > 1 ? K / 2 : 1)>(v, first, mine);
  }
}
// Sums per thread after reduce_scatter.
template <int kFrom, int kTo, int K>
constexpr int kSumsLeft = K * kFrom / kTo > 1 ? K * kFrom / kTo : 1;

// Sums a quantity over the lanes of a channel for each step of a tile, and stores the sums in a column of `tile`,
// or adds them to it.
template <class L, class S, int kSize>
EAML_DEVICE void put_sums(const S (&sums)[kStepsPerTile], Tile<S, kSize> tile, int at, bool add) {
  using T = vector_t<S>;
  constexpr int kLeft = kSumsLeft<1, L::kLanes, kStepsPerTile>;
  T value[kStepsPerTile], tangent[kStepsPerTile];
  int first = 0;
  bool mine = true;
  EAML_UNROLL
  for (int i = 0; i < kStepsPerTile; ++i) {
    if constexpr (kIsDual<S>)
      value[i] = sums[i].value, tangent[i] = sums[i].tangent;
    else
      value[i] = sums[i];
  }
  reduce_scatter<1, L::kLanes, kStepsPerTile>(value, first, mine);
  if constexpr (kIsDual<S>) {
    first = 0, mine = true;
    reduce_scatter<1, L::kLanes, kStepsPerTile>(tangent, first, mine);
  }
  if (!mine) return;
  EAML_UNROLL
  for (int k = 0; k < kLeft; ++k) {
    const int i = at + (first + k) * L::kRow;
    S sum;
    if constexpr (kIsDual<S>)
      sum = {value[k], tangent[k]};
    else
      sum = value[k];
    tile.set(i, add ? tile.get(i) + sum : sum);
  }
}

// The channels and the time segment of a block, its arrays in shared memory, and the position of a thread.
template <class L>
struct Block {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  static constexpr int kStates = L::kStates;

  const ScanParams& params;
  const Arrays<T>& arrays;
  int64_t index;              // of the channel block in (batch, groups, channel_blocks)
  int64_t row, group, first;  // batch row, group, and the block's first channel
  int64_t segment, segments;
  int channels;  // channels of the block
  int thread, channel, lane;
  int staged = -1;  // the first step whose B and C are in shared memory; -1: none
  Tile<S, L::kTile> x, dt, y;
  Tile<Z, L::kMatrix> B, C;
  Tile<S, L::kVector> D, bias;

  EAML_MEMBER Block(const ScanParams& s, const Arrays<T>& a, int64_t segments_)
      : params(s), arrays(a), segments(segments_) {
    const int64_t per_group = params.dim / params.groups, blocks = (per_group + L::kChannels - 1) / L::kChannels;
    segment = cuda::block() % segments, index = cuda::block() / segments;
    const int64_t block = index % blocks, rest = index / blocks;
    group = rest % params.groups, row = rest / params.groups;
    first = group * per_group + block * L::kChannels;
    const int64_t left = per_group - block * L::kChannels;
    channels = static_cast<int>(left < L::kChannels ? left : L::kChannels);
    thread = cuda::thread(), channel = thread / L::kLanes, lane = thread % L::kLanes;
    T* memory = reinterpret_cast<T*>(cuda::shared_memory());
    B.data.data = memory, memory += L::kMatrix * L::kStateNumbers;
    C.data.data = memory, memory += L::kMatrix * L::kStateNumbers;
    x.data.data = memory, memory += L::kTile * L::kNumbers;
    dt.data.data = memory, memory += L::kTile * L::kNumbers;
    y.data.data = memory, memory += L::kTile * L::kNumbers;
    D.data.data = memory, memory += L::kVector * L::kNumbers;
    bias.data.data = memory;
  }

  // Shared memory after the arrays of the block.
  EAML_MEMBER T* unused_memory() const { return bias.data.data + L::kVector * L::kNumbers; }

  EAML_MEMBER int64_t chunks() const { return (params.length + kSteps - 1) / kSteps; }
  EAML_MEMBER int64_t first_chunk(int64_t s) const { return chunks() * s / segments; }
  EAML_MEMBER int steps(int64_t chunk) const {
    const int64_t left = params.length - chunk * kSteps;
    return static_cast<int>(left < kSteps ? left : kSteps);
  }
  EAML_MEMBER bool has_channel() const { return channel < channels; }
  EAML_MEMBER bool has_state(int k) const { return has_channel() && lane * kStates + k < params.dstate; }
  EAML_MEMBER int64_t state(int k) const { return lane * kStates + k; }
  // Offset of a state in (*, dstate, num_components, dim); `rows` indexes batch rows, or segments of them.
  EAML_MEMBER int64_t saved_at(int64_t rows, int k) const {
    return (rows * params.dstate + state(k)) * kNumComponents<Z> * params.dim + first + channel;
  }
  // Offset of a state in (*, dim, dstate, num_components); `rows` indexes batch rows, or segments of them.
  EAML_MEMBER int64_t partial_at(int64_t rows, int k) const {
    return ((rows * params.dim + first + channel) * params.dstate + state(k)) * kNumComponents<Z>;
  }

  // Reads the thread's states of a (rows, dim, dstate) input; padding states get the value `padding`.
  EAML_MEMBER void read_states(Z (&to)[kStates], In<T> Inputs<T>::* member, Z padding = {}) const {
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) {
      const auto at = [&](const In<T>& in) {
        return row_offset(in, row) + (first + channel) * in.channel + state(k) * in.inner;
      };
      to[k] = has_state(k) ? read_input<Z>(arrays, member, at) : padding;
    }
  }
  EAML_MEMBER void read_saved(Z (&to)[kStates], const T* value, const T* tangent, int64_t rows) const {
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k)
      to[k] = has_state(k) ? get_saved<Z>(value, tangent, saved_at(rows, k), params.dim) : Z{};
  }
  EAML_MEMBER void write_saved(T* value, T* tangent, int64_t rows, const Z (&from)[kStates]) const {
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k)
      if (has_state(k)) set_saved(value, tangent, saved_at(rows, k), params.dim, from[k]);
  }
  // Stages D and delta_bias of the block's channels. Readers need a barrier first.
  EAML_MEMBER void stage_vectors() const {
    if (thread >= channels) return;
    const auto at = [&](const In<T>& in) { return row_offset(in, row) + (first + thread) * in.channel; };
    D.set(thread, read_input<S>(arrays, &Inputs<T>::D, at));
    bias.set(thread, read_input<S>(arrays, &Inputs<T>::delta_bias, at));
  }
  template <bool kHalf>
  EAML_MEMBER S read_sequence(In<T> Inputs<T>::* member, int c, int64_t t) const {
    const auto at = [&](const In<T>& in) { return row * in.outer + (first + c) * in.channel + t * in.inner; };
    return read_input<S, kHalf>(arrays, member, at);
  }
  template <bool kHalf>
  EAML_MEMBER Softplus<S> read_step(int c, int64_t t) const {
    return step_size(read_sequence<kHalf>(&Inputs<T>::delta, c, t) + bias.get(c), params.softplus);
  }

  // Padding states get A = -1: with A = 0 an infinite step size would make them exp(inf 0) = NaN.
  EAML_MEMBER void read_rates(Z (&A)[kStates], Rate<Z> (&rate)[kStates]) const {
    read_states(A, &Inputs<T>::A, Z{T(-1)});
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) rate[k] = rate_of(A[k]);
  }

  // Calls f(step, channel, whether sequences have reduced precision) for each step and channel of a chunk, each on one
  // thread. Adjacent threads take adjacent numbers of u.
  template <class F>
  EAML_MEMBER void each_element(int steps, F f) const {
    if constexpr (sizeof(T) == 4) {
      if (arrays.values.u.half != Half::kNone) return each_element(steps, f, std::true_type());
    }
    each_element(steps, f, std::false_type());
  }
  template <class F, class IsHalf>
  EAML_MEMBER void each_element(int steps, F f, IsHalf half) const {
    const bool along_time = arrays.values.u.inner == 1 && arrays.values.u.channel != 1;
    constexpr int kCount = kSteps * L::kChannels;
    EAML_UNROLL_BY((IsHalf::value ? 1 : 2))
    for (int i = thread; i < kCount; i += L::kThreads) {
      const int t = along_time ? i % kSteps : i / L::kChannels, c = along_time ? i / kSteps : i % L::kChannels;
      if (t < steps && c < channels) f(t, c, half);
    }
  }

  // Bit t: whether the state is zeroed before step t of the chunk.
  EAML_MEMBER std::uint32_t resets(int64_t chunk, int steps) const {
    if (params.reset == nullptr) return 0;
    const int t = thread % cuda::kWarp;
    return cuda::ballot(t < steps &&
                        params.reset[row * params.reset_outer + (chunk * kSteps + t) * params.reset_inner]);
  }

  // Stages B or C of kMatrixSteps steps from step `start` of the chunk on; padding states and steps are zero.
  EAML_MEMBER void stage_matrix(Tile<Z, L::kMatrix> to, In<T> Inputs<T>::* member, int64_t chunk, int start) const {
    const bool along_time = (arrays.values.*member).inner == kNumComponents<Z>;
    constexpr int kCount = L::kMatrixSteps * L::kPadded;
    EAML_UNROLL_BY((2))
    for (int i = thread; i < kCount; i += L::kThreads) {
      const int t = along_time ? i % L::kMatrixSteps : i / L::kPadded;
      const int n = along_time ? i / L::kMatrixSteps : i % L::kPadded;
      const int64_t step = chunk * kSteps + start + t;
      const auto at = [&](const In<T>& in) {
        return row * in.outer + group * in.group + n * in.channel + step * in.inner;
      };
      to.set(t * L::kMatrixRow + n,
             n < params.dstate && step < params.length ? read_input<Z>(arrays, member, at) : Z{});
    }
  }

  // Stages B and C of the tile that starts at step t of the chunk, unless they are staged. t is the same for all
  // threads.
  EAML_MEMBER void need_matrices(int64_t chunk, int t, bool need_B, bool need_C) {
    const int start = t / L::kMatrixSteps * L::kMatrixSteps;
    if (start == staged) return;
    need_B = need_B && !params.B_invariant, need_C = need_C && !params.C_invariant;
    staged = start;
    if (!need_B && !need_C) return;
    cuda::sync_block();
    if (need_B) stage_matrix(B, &Inputs<T>::B, chunk, start);
    if (need_C) stage_matrix(C, &Inputs<T>::C, chunk, start);
    cuda::sync_block();
  }
  EAML_MEMBER int matrix_at(int t) const { return t % L::kMatrixSteps * L::kMatrixRow + lane * kStates; }
  EAML_MEMBER int tile_at(int t) const { return t * L::kRow + channel; }
};

// B or C of a thread's states: read at each step, or kept in registers if invariant in time.
template <class L, bool kInvariant>
struct Operand {
  using Z = typename L::Z;
  using T = typename L::T;
  Z x[L::kStates];
  bool fixed = false;  // invariant in time

  EAML_MEMBER void start(const Block<L>& block, In<T> Inputs<T>::* member, bool invariant) {
    if constexpr (kInvariant) {
      fixed = invariant;
      if (fixed) block.read_states(x, member);
    }
  }
  EAML_MEMBER void step(const Tile<Z, L::kMatrix>& tile, int at) {
    if (!fixed) tile.get_row(x, at);
  }
};

// Stores the sum of a segment's step sizes, and whether the segment has a reset.
template <class L>
EAML_DEVICE void write_steps(const Block<L>& block, const TimeSegments<typename L::T>& to, typename L::S total,
                             bool has_reset) {
  if (!block.has_channel() || block.lane != 0) return;
  const int64_t at = (block.row * block.segments + block.segment) * block.params.dim + block.first + block.channel;
  set_saved(to.steps, to.step_tangents, at, 0, total);
  to.has_reset[at] = has_reset;
}

template <class L, bool kInvariant>
EAML_KERNEL(L::kThreads, L::kForwardBlocks)
forward_kernel(EAML_CONSTANT ForwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  constexpr int kStates = L::kStates;
  Block<L> block(p.params, p.arrays, p.segments.count);
  const bool outputs = p.out.y.data != nullptr, local = p.segments.local;
  const int64_t chunks = block.chunks(), end = block.first_chunk(block.segment + 1);

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
      block.write_saved(p.out.checkpoints, p.out.checkpoint_tangents, block.row * (chunks - 1) + chunk - 1, h);
    const std::uint32_t resets = block.resets(chunk, steps);
    has_reset = has_reset || resets != 0;
    block.staged = -1;
    cuda::sync_block();  // the previous chunk's tiles are no longer read
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = chunk * kSteps + t;
      const S u = block.template read_sequence<half>(&Inputs<T>::u, c, time);
      const S dt = block.template read_step<half>(c, time).value;
      const int i = t * L::kRow + c;
      block.dt.set(i, dt), block.x.set(i, dt * u);
      if (outputs) block.y.set(i, block.D.get(c) * u);
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
        decay(dt, A, rate, a);
        B.step(block.B, row);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) h[k] = advance(a[k], h[k], x, B.x[k]);
        if (outputs) {
          C.step(block.C, row);
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) sums[i] = sums[i] + real(h[k] * C.x[k]);
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
      const int64_t time = chunk * kSteps + t;
      const S y = block.y.get(t * L::kRow + c);
      T term = output(y);
      if (p.params.gated) {
        const S z = block.template read_sequence<half>(&Inputs<T>::z, c, time);
        term = output(y * (z * sigmoid(z)));
      }
      write<half>(out, block.row * out.outer + (block.first + c) * out.channel + time * out.inner, term);
    });
  }

  if (local) {
    block.write_saved(p.segments.states, p.segments.state_tangents, segment, h);
    write_steps(block, p.segments, total, has_reset);
  } else if (p.out.last_state.data && block.segment == block.segments - 1) {
    const Out<T>& out = p.out.last_state;
    EAML_UNROLL
    for (int k = 0; k < kStates; ++k) {
      if (!block.has_state(k)) continue;
      const int64_t channel = block.first + block.channel;
      put(out.data + block.row * out.outer + channel * out.channel + block.state(k) * out.inner, output(h[k]));
    }
  }
}

template <class L, bool kInvariant>
EAML_KERNEL(L::kThreads, L::kBackwardBlocks)
backward_kernel(EAML_CONSTANT BackwardParams<typename L::T> p) {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  constexpr int kStates = L::kStates, kReals = L::kReals;
  constexpr int kTerms = 2 * kReals, kLeft = kSumsLeft<L::kLanes, cuda::kWarp, kTerms>;
  Block<L> block(p.params, p.arrays, p.segments.count);
  const int64_t chunks = block.chunks(), begin = block.first_chunk(block.segment);
  Tile<Z, L::kStarts> starts;
  starts.data.data = block.unused_memory();
  const Shared<T> terms{block.unused_memory() + L::kStarts * L::kStateNumbers};
  const bool gated = p.params.gated;
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
      block.read_saved(h, p.out.checkpoints, p.out.checkpoint_tangents, block.row * (chunks - 1) + chunk - 1);
    else
      block.read_states(h, &Inputs<T>::initial_state);
    cuda::sync_block();  // the previous chunk's tiles are no longer read
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = chunk * kSteps + t;
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
        decay(block.dt.get(at), A, rate, a);
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
        decay(block.dt.get(at), A, rate, a[i]);
        B.step(block.B, row);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) {
          decayed_h[i][k] = decayed(a[i][k], h[k]);
          h[k] = decayed_h[i][k] + x * B.x[k];
        }
        if (gated) {
          C.step(block.C, row);
          EAML_UNROLL
          for (int k = 0; k < kStates; ++k) sums_y[i] = sums_y[i] + real(h[k] * C.x[k]);
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
        const int64_t time = block.index * p.params.length + chunk * kSteps + t;
        (which ? p.out.C : p.out.B)[time * columns + column] = total;
      }
      cuda::sync_block();
    }

    cuda::sync_block();
    block.each_element(steps, [&](int t, int c, auto half) {
      const int64_t time = chunk * kSteps + t, channel = block.first + c;
      const int i = t * L::kRow + c;
      const S u = block.template read_sequence<half>(&Inputs<T>::u, c, time), D = block.D.get(c);
      const Softplus<S> dt = block.template read_step<half>(c, time);
      const S grad_x = block.x.get(i), grad_dt = block.dt.get(i);
      S grad_y = block.template read_sequence<half>(&Inputs<T>::grad_y, c, time);
      const auto send = [&](const Out<T>& out, T x) {
        write<half>(out, block.row * out.outer + channel * out.channel + time * out.inner, x);
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
      const int64_t time = chunk * kSteps + t;
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
      decay(dt, A, rate, a);
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

// The second stage of the reductions. A block computes kSumColumns sums, each on kSumRows threads, in a fixed order.
constexpr int kSumColumns = 32, kSumRows = 8;
template <class T>
EAML_KERNEL(kSumColumns* kSumRows)
sum_kernel(EAML_CONSTANT SumParams<T> p) {
  const int64_t per_outer = (p.inner + kSumColumns - 1) / kSumColumns;
  const int64_t outer = cuda::block() / per_outer;
  const int column = cuda::thread() % kSumColumns, row = cuda::thread() / kSumColumns;
  const int64_t k = cuda::block() % per_outer * kSumColumns + column;
  const Shared<T> partial{reinterpret_cast<T*>(cuda::shared_memory())};
  T total = T(0);
  if (k < p.inner)
    for (int64_t j = row; j < p.middle; j += kSumRows) total += p.from[(outer * p.middle + j) * p.inner + k];
  partial.set(row * kSumColumns + column, total);
  cuda::sync_block();
  if (row > 0 || k >= p.inner) return;
  for (int r = 1; r < kSumRows; ++r) total += partial.get(r * kSumColumns + column);
  const int64_t entry = k / p.num_components, columns = p.rows == 0 ? 1 : p.inner / p.num_components / p.rows;
  const int64_t at =
      p.rows == 0 ? k : (entry % p.rows * columns + entry / p.rows) * p.num_components + k % p.num_components;
  p.to[outer * p.inner + at] = total;
}

// ---- launchers, on the host ----

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

template <class Z>
BlockCounts block_counts_of(const ScanParams& s) {
  BlockCounts c{};
  with_tiling<Z>(s.dstate, [&](auto tiling) {
    using L = decltype(tiling);
    c.channel_blocks = (s.dim / s.groups + L::kChannels - 1) / L::kChannels;
    return nullptr;
  });
  // Time is divided only if there are too few blocks to fill a large GPU several times. Segments are long enough to be
  // worth the additional launches. Both numbers are estimates.
  constexpr int64_t kEnoughBlocks = 512, kMinChunks = 8;
  const int64_t blocks = s.batch * s.groups * c.channel_blocks, chunks = (s.length + kChunk - 1) / kChunk;
  const int64_t wanted = blocks > 0 ? kEnoughBlocks / blocks : 1, most = chunks / kMinChunks;
  c.time_segments = wanted < most ? wanted : most;
  if (c.time_segments < 2) c.time_segments = 1;
  return c;
}

template <class Z, bool kBackward, class P>
const char* launch_carry(const P& p, void* stream) {
  const int64_t states = p.params.batch * p.params.dstate * p.params.dim;
  return cuda::launch(carry_kernel<Z, kBackward>, (states + 255) / 256, 256, 0, stream, p.params, p.arrays, p.segments);
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
    const bool invariant = p.params.B_invariant || p.params.C_invariant;
    const auto kernel = invariant ? backward_kernel<L, true> : backward_kernel<L, !L::kHasVaryingKernel>;
    return cuda::launch(kernel, blocks, L::kThreads, L::kBackwardBytes, stream, p);
  });
}

template <class Z>
const char* launch_step(const ForwardParams<vector_t<Z>>& p, void* stream) {
  int lanes = 1;
  while (lanes < cuda::kWarp && lanes < p.params.dstate) lanes *= 2;
  const int64_t threads = p.params.batch * p.params.dim * lanes;
  return cuda::launch(step_kernel<Z>, (threads + kStepThreads - 1) / kStepThreads, kStepThreads, 0, stream, p, lanes);
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
