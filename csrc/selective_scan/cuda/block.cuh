// The channels, states and chunks of one thread block, and the staging of its inputs in shared memory.
#pragma once

#include "selective_scan/cuda/tile.cuh"

namespace eaml::selective_scan {
namespace {

// The channels and the time segment of a block, its arrays in shared memory, and the position of a thread. kWhole:
// every thread has a channel and all its states.
template <class L, bool kWhole = false>
struct Block {
  using Z = typename L::Z;
  using S = typename L::S;
  using T = typename L::T;
  // The type of numbers of steps and chunks. Fast kernels take calls whose lengths fit an int.
  using Steps = std::conditional_t<kWhole, int, int64_t>;
  static constexpr int kStates = L::kStates;

  const ScanParams& params;
  const Arrays<T>& arrays;
  // A launch has fewer than 2^31 blocks, so these numbers fit an int.
  int index;              // of the channel block in (batch rows, groups, channel_blocks)
  int row, group, first;  // batch row, group, and the block's first channel; packed, `row` counts sequences
  int batch_row;          // of the inputs: `row`, or the row that holds the sequence
  int start = 0;          // the first step in that row
  Steps length;           // the steps from there on
  Steps first_saved;      // the number of the first state that the sequence saves, in (batch rows, saved chunks)
  int segment, segments;
  int channels;  // channels of the block
  int thread, channel, lane;
  int permutation = 0;  // xor of the numbers of a thread's states
  int staged = -1;      // the first step whose B and C are in shared memory; -1: none
  Tile<S, L::kTile> x, dt, y;
  Tile<Z, L::kMatrix> B, C;
  Tile<S, L::kVector> D, bias;

  EAML_MEMBER Block(const ScanParams& s, const Arrays<T>& a, int64_t segments_)
      : params(s), arrays(a), segments(static_cast<int>(segments_)) {
    const int groups = static_cast<int>(params.groups), per_group = static_cast<int>(params.dim) / groups;
    const int blocks = (per_group + L::kChannels - 1) / L::kChannels, number = static_cast<int>(cuda::block());
    segment = number % segments;
    const int block = number / segments % blocks, rest = number / segments / blocks;
    group = rest % groups, row = rest / groups;
    place_in_row();
    index = (batch_row * groups + group) * blocks + block;
    first = group * per_group + block * L::kChannels;
    const int left = per_group - block * L::kChannels;
    channels = left < L::kChannels ? left : L::kChannels;
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

  // Sets the row and the steps of the block's inputs.
  EAML_MEMBER void place_in_row() {
    batch_row = row, length = static_cast<Steps>(params.length);
    Steps saved = chunks() - 1;
    if (params.cu_seqlens != nullptr) {
      const int sequences = static_cast<int>(params.num_sequences), all_steps = static_cast<int>(params.length);
      const auto bound = [&](int least, int i) {
        const int step = params.cu_seqlens[i];
        return step < least ? least : step > all_steps ? all_steps : step;
      };
      batch_row = row / sequences;
      start = bound(0, row % sequences), length = bound(start, row % sequences + 1) - start;
      saved = all_steps / kSteps;
    }
    first_saved = batch_row * saved + start / kSteps;
  }

  // Shared memory after the arrays of the block.
  EAML_MEMBER T* unused_memory() const { return bias.data.data + L::kVector * L::kNumbers; }

  EAML_MEMBER Steps chunks() const { return (length + kSteps - 1) / kSteps; }
  EAML_MEMBER int64_t first_chunk(int64_t s) const { return chunks() * s / segments; }
  EAML_MEMBER int steps(Steps chunk) const {
    const Steps left = length - chunk * kSteps;
    return static_cast<int>(left < kSteps ? left : kSteps);
  }
  // The first step of a chunk in the batch row.
  EAML_MEMBER Steps time(Steps chunk) const { return start + chunk * kSteps; }
  // The number of the state before a chunk but the first, for kernels that have no register for first_saved.
  EAML_MEMBER Steps saved_before(Steps chunk) const {
    return batch_row * static_cast<Steps>(params.saved_chunks) + time(chunk) / kSteps - 1;
  }
  EAML_MEMBER bool has_channel() const { return kWhole || channel < channels; }
  EAML_MEMBER bool has_state(int k) const { return kWhole || (has_channel() && state(k) < params.dstate); }
  EAML_MEMBER int64_t state(int k) const { return lane * kStates + (k ^ permutation); }
  // Offset of a state in (*, dstate, num_components, dim); `rows` indexes saved states, or segments of rows.
  EAML_MEMBER int64_t saved_at(int64_t rows, int k) const {
    const int64_t states = kNumComponents<Z> * params.dim;
    return (rows * params.dstate + lane * kStates) * states + first + channel + (k ^ permutation) * states;
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
    const auto at = [&](const In<T>& in) { return batch_row * in.outer + (first + c) * in.channel + t * in.inner; };
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
                        params.reset[batch_row * params.reset_outer + (time(chunk) + t) * params.reset_inner]);
  }

  // Stages B or C of kMatrixSteps steps from step `first_step` of the chunk on; padding states and steps are zero.
  EAML_MEMBER void stage_matrix(Tile<Z, L::kMatrix> to, In<T> Inputs<T>::* member, int64_t chunk,
                                int first_step) const {
    const bool along_time = (arrays.values.*member).inner == kNumComponents<Z>;
    constexpr int kCount = L::kMatrixSteps * L::kPadded;
    EAML_UNROLL_BY((2))
    for (int i = thread; i < kCount; i += L::kThreads) {
      const int t = along_time ? i % L::kMatrixSteps : i / L::kPadded;
      const int n = along_time ? i / L::kMatrixSteps : i % L::kPadded;
      const auto at = [&](const In<T>& in) {
        return batch_row * in.outer + group * in.group + n * in.channel + (time(chunk) + first_step + t) * in.inner;
      };
      to.set(t * L::kMatrixRow + n,
             n < params.dstate && chunk * kSteps + first_step + t < length ? read_input<Z>(arrays, member, at) : Z{});
    }
  }

  // Stages B and C of the tile that starts at step t of the chunk, unless they are staged. t is the same for all
  // threads.
  EAML_MEMBER void need_matrices(int64_t chunk, int t, bool need_B, bool need_C) {
    const int first_step = t / L::kMatrixSteps * L::kMatrixSteps;
    if (first_step == staged) return;
    need_B = need_B && !params.B_invariant, need_C = need_C && !params.C_invariant;
    staged = first_step;
    if (!need_B && !need_C) return;
    cuda::sync_block();
    if (need_B) stage_matrix(B, &Inputs<T>::B, chunk, first_step);
    if (need_C) stage_matrix(C, &Inputs<T>::C, chunk, first_step);
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

}  // namespace
}  // namespace eaml::selective_scan
