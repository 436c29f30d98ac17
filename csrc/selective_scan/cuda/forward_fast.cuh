// The forward kernel for rows that allow 16-byte accesses: real states in single precision, B and C that vary in time,
// whole blocks of channels. It computes the bits of forward_kernel.
//
// A thread loads vectors of 16 bytes along whichever dimension is contiguous, and prefetches those of the next chunk
// into registers. It stores the elements of y that it loaded of u, so u and z stay in registers. The last chunk of a
// row may be shorter and is read element by element.
#pragma once

#include "selective_scan/cuda/forward.cuh"

namespace eaml::selective_scan {
namespace {

// Vectors of 16 bytes and their numbers.
template <Half kHalf>
struct Vector16 {
  static constexpr int kWidth = kHalf == Half::kNone ? 4 : 8;
  std::uint32_t words[4];

  EAML_MEMBER void load(const void* from) { cuda::load_row(words, static_cast<const std::uint32_t*>(from)); }
  EAML_MEMBER void store(void* to) const { cuda::store_row(static_cast<std::uint32_t*>(to), words); }

  EAML_MEMBER void unpack(float (&to)[kWidth]) const {
    EAML_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kHalf == Half::kNone)
        to[i] = __builtin_bit_cast(float, words[i]);
      else
        to[2 * i] = cuda::widen_low<kHalf>(words[i]), to[2 * i + 1] = cuda::widen_high<kHalf>(words[i]);
    }
  }
  EAML_MEMBER void pack(const float (&from)[kWidth]) {
    EAML_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kHalf == Half::kNone)
        words[i] = __builtin_bit_cast(std::uint32_t, from[i]);
      else
        words[i] = cuda::narrow_pair<kHalf>(from[2 * i], from[2 * i + 1]);
    }
  }
};

// How the threads of a block share the elements of a chunk: kCount vectors, those of a thread kThreads apart. `kRows`
// rows (channels, or states) of kSteps steps are contiguous along time, or along the rows.
template <int kThreads, int kRows, int kWidth, bool kAlongTime>
struct VectorGrid {
  static constexpr int kCount = kSteps * kRows / kWidth;
  static constexpr int kEach = (kCount + kThreads - 1) / kThreads;
  static constexpr bool kWhole = kCount % kThreads == 0;
  // Distance of two vectors of a thread.
  static constexpr int kRowsApart = kAlongTime ? kThreads / (kSteps / kWidth) : 0;
  static constexpr int kStepsApart = kAlongTime ? 0 : kThreads / (kRows / kWidth);
  static_assert(kAlongTime ? kSteps % kWidth == 0 : kRows % kWidth == 0);
  int thread;

  EAML_MEMBER bool has(int i) const { return kWhole || thread + i * kThreads < kCount; }
  EAML_MEMBER int step(int i) const {
    const int v = thread + i * kThreads;
    return kAlongTime ? v % (kSteps / kWidth) * kWidth : v / (kRows / kWidth);
  }
  EAML_MEMBER int row(int i) const {
    const int v = thread + i * kThreads;
    return kAlongTime ? v / (kSteps / kWidth) : v % (kRows / kWidth) * kWidth;
  }
  // The step and the row of element k of vector i.
  EAML_MEMBER int step(int i, int k) const { return step(i) + (kAlongTime ? k : 0); }
  EAML_MEMBER int row(int i, int k) const { return row(i) + (kAlongTime ? 0 : k); }
};

// One sequence as a thread reads it. Strides stay in constant memory, so they take no registers.
template <class Grid, Half kHalf, class Array>
struct VectorStream {
  static constexpr int64_t kBytes = kHalf == Half::kNone ? 4 : 2;
  const Array& array;
  const char* at;  // vector 0 of the current chunk

  EAML_MEMBER VectorStream(const Grid& grid, const Array& x, int64_t row, int64_t first_channel, int64_t first_chunk)
      : array(x) {
    const int64_t offset =
        row * x.outer + (first_channel + grid.row(0)) * x.channel + (first_chunk * kSteps + grid.step(0)) * x.inner;
    at = reinterpret_cast<const char*>(x.data) + offset * kBytes;
  }
  EAML_MEMBER const char* vector(int i) const {
    return at + i * (Grid::kRowsApart * array.channel + Grid::kStepsApart * array.inner) * kBytes;
  }
  EAML_MEMBER void advance() { at += kSteps * array.inner * kBytes; }
};

template <class L>
struct FastLayout {
  static constexpr int kTile = kSteps * L::kRow, kMatrix = kSteps * L::kMatrixRow;
  static constexpr std::size_t kBytes = (3 * kTile + 2 * kMatrix) * sizeof(float);
};

// Blocks on a multiprocessor: four leave 128 registers to a thread, which is too few for some kernels in single
// precision.
template <class L, Half kHalf, bool kAlongTime, bool kGated>
constexpr int kFastBlocks = kHalf == Half::kNone && (L::kLanes > 4 || (kGated && !kAlongTime)) ? 3 : 4;

// kHalf: the type of the sequences. kAlongTime: u, delta, z and y are contiguous along time, else along the channels.
template <class L, Half kHalf, bool kAlongTime, bool kGated>
EAML_KERNEL(L::kThreads, (kFastBlocks<L, kHalf, kAlongTime, kGated>))
fast_forward_kernel(EAML_CONSTANT ForwardParams<float> p) {
  using Vector = Vector16<kHalf>;
  using Grid = VectorGrid<L::kThreads, L::kChannels, Vector::kWidth, kAlongTime>;
  constexpr int kStates = L::kStates, kWidth = Vector::kWidth, kEach = Grid::kEach;
  constexpr int kMatrixCount = kSteps * L::kPadded / kWidth,
                kMatrixEach = (kMatrixCount + L::kThreads - 1) / L::kThreads;
  constexpr int kPerChannel = kAlongTime ? kEach : kWidth;  // values of D and delta_bias that a thread needs
  const Block<L> block(p.params, p.arrays, p.segments.count);
  const Inputs<float>& in = p.arrays.values;
  const Grid grid{block.thread};
  float* const memory = reinterpret_cast<float*>(cuda::shared_memory());
  const Shared<float> steps{memory};  // (dt, dt u) of [step][channel]
  const Shared<float> B{memory + 2 * FastLayout<L>::kTile}, C{B.data + FastLayout<L>::kMatrix};
  const Shared<float> sums{C.data + FastLayout<L>::kMatrix};  // [step][channel]

  float A[kStates], h[kStates];
  Rate<float> rate[kStates];
  block.read_rates(A, rate);
  const int64_t segment = block.row * block.segments + block.segment;
  if (block.segments == 1)
    block.read_states(h, &Inputs<float>::initial_state);
  else
    block.read_saved(h, p.segments.states, p.segments.state_tangents, segment);
  float D[kPerChannel], bias[kPerChannel];
  EAML_UNROLL
  for (int k = 0; k < kPerChannel; ++k) {
    D[k] = bias[k] = 0;
    if (!grid.has(kAlongTime ? k : 0)) continue;  // a small chunk has fewer vectors than the block has threads
    const int64_t channel = block.first + (kAlongTime ? grid.row(k) : grid.row(0, k));
    const auto at = [&](const In<float>& x) { return row_offset(x, block.row) + channel * x.channel; };
    D[k] = read(in.D, at(in.D)), bias[k] = read(in.delta_bias, at(in.delta_bias));
  }
  const auto per_channel = [&](const float (&values)[kPerChannel], int i, int k) { return values[kAlongTime ? i : k]; };

  const int64_t chunks = block.chunks(), begin = block.first_chunk(block.segment);
  const int64_t end = block.first_chunk(block.segment + 1);
  const int64_t full = end * kSteps <= p.params.length ? end : end - 1;  // chunks before it have kSteps steps
  using Input = VectorStream<Grid, kHalf, In<float>>;
  Input u(grid, in.u, block.row, block.first, begin), delta(grid, in.delta, block.row, block.first, begin);
  Input z(grid, kGated ? in.z : in.u, block.row, block.first, begin);
  VectorStream<Grid, kHalf, Out<float>> y(grid, p.out.y, block.row, block.first, begin);

  // B and C have a layout of their own. Number k of a vector goes `spacing` numbers behind that before it.
  const bool matrix_along_time = in.B.inner == 1;
  const int spacing = matrix_along_time ? L::kMatrixRow : 1;
  int matrix_to[kMatrixEach];
  const char *B_from[kMatrixEach], *C_from[kMatrixEach];
  constexpr int64_t kBytes = kHalf == Half::kNone ? 4 : 2;
  EAML_UNROLL
  for (int i = 0; i < kMatrixEach; ++i) {
    const int v = block.thread + i * L::kThreads;
    const int t = matrix_along_time ? v % (kSteps / kWidth) * kWidth : v / (L::kPadded / kWidth);
    const int n = matrix_along_time ? v / (kSteps / kWidth) : v % (L::kPadded / kWidth) * kWidth;
    matrix_to[i] = t * L::kMatrixRow + n;
    const auto from = [&](const In<float>& x) {
      const int64_t offset =
          block.row * x.outer + block.group * x.group + n * x.channel + (begin * kSteps + t) * x.inner;
      return reinterpret_cast<const char*>(x.data) + offset * kBytes;
    };
    B_from[i] = from(in.B), C_from[i] = from(in.C);
  }
  const int64_t B_chunk = kSteps * in.B.inner * kBytes, C_chunk = kSteps * in.C.inner * kBytes;
  const auto has_matrix = [&](int i) {
    return kMatrixCount % L::kThreads == 0 || block.thread + i * L::kThreads < kMatrixCount;
  };

  Vector next_u[kEach], next_delta[kEach], next_B[kMatrixEach], next_C[kMatrixEach];
  const auto prefetch = [&] {
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (!grid.has(i)) continue;
      next_u[i].load(u.vector(i)), next_delta[i].load(delta.vector(i));
    }
    EAML_UNROLL
    for (int i = 0; i < kMatrixEach; ++i) {
      if (!has_matrix(i)) continue;
      next_B[i].load(B_from[i]), next_C[i].load(C_from[i]);
      B_from[i] += B_chunk, C_from[i] += C_chunk;
    }
    u.advance(), delta.advance();
  };
  const auto set_step = [&](int t, int c, float u_t, float delta_t, bool by_softplus) {
    const float dt = step_size(delta_t, by_softplus).value;
    const float pair[2] = {dt, dt * u_t};
    steps.set_row(pair, 2 * (t * L::kRow + c));
  };
  // y of an element, from its sum over the states.
  const auto gated = [&](int t, int c, float D_c, float u_t, float z_t) {
    const float out = cuda::multiply(D_c, u_t) + sums.get(t * L::kRow + c);
    return kGated ? out * (z_t * sigmoid(z_t)) : out;
  };
  // The steps of the chunk in shared memory: all kSteps without a reset, or `count` of them.
  const auto recur = [&](auto whole, std::uint32_t resets, int count) {
    for (int start = 0; start < kSteps; start += kStepsPerTile) {
      float sum[kStepsPerTile];
      EAML_UNROLL
      for (int i = 0; i < kStepsPerTile; ++i) {
        const int t = start + i;
        sum[i] = 0;
        if constexpr (!whole.value) {
          if (t >= count) continue;
          if (resets >> t & 1) {
            EAML_UNROLL
            for (int k = 0; k < kStates; ++k) h[k] = 0;
          }
        }
        float step[2], b[kStates], c[kStates], a[kStates];
        steps.get_row(step, 2 * (t * L::kRow + block.channel));
        B.get_row(b, t * L::kMatrixRow + block.lane * kStates);
        C.get_row(c, t * L::kMatrixRow + block.lane * kStates);
        decay(step[0], A, rate, a);
        EAML_UNROLL
        for (int k = 0; k < kStates; ++k) {
          h[k] = advance(a[k], h[k], step[1], b[k]);
          sum[i] = sum[i] + h[k] * c[k];
        }
      }
      int first = 0;
      bool mine = true;
      reduce_scatter<1, L::kLanes, kStepsPerTile>(sum, first, mine);
      if (mine) {
        EAML_UNROLL
        for (int k = 0; k < kSumsLeft<1, L::kLanes, kStepsPerTile>; ++k)
          sums.set((start + first + k) * L::kRow + block.channel, sum[k]);
      }
    }
  };
  // The states at the start of a chunk, which the backward pass reads.
  const bool saves = p.out.checkpoints != nullptr;
  float* saved = p.out.checkpoints + block.saved_at(block.row * (chunks - 1) + begin - 1, 0);
  const auto save_state = [&](int64_t chunk) {
    if (saves && chunk > 0) {
      EAML_UNROLL
      for (int k = 0; k < kStates; ++k) saved[k * p.params.dim] = h[k];
    }
    saved += p.params.dstate * p.params.dim;
  };

  if (begin < full) prefetch();
  for (int64_t chunk = begin; chunk < full; ++chunk) {
    save_state(chunk);
    Vector this_u[kEach], this_z[kEach];
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      this_u[i] = next_u[i];
      if (!grid.has(i)) continue;
      float u_t[kWidth], delta_t[kWidth];
      next_u[i].unpack(u_t), next_delta[i].unpack(delta_t);
      const auto stage = [&](bool by_softplus) {
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k)
          set_step(grid.step(i, k), grid.row(i, k), u_t[k], delta_t[k] + per_channel(bias, i, k), by_softplus);
      };
      p.params.softplus ? stage(true) : stage(false);
    }
    EAML_UNROLL
    for (int i = 0; i < kMatrixEach; ++i) {
      if (!has_matrix(i)) continue;
      float b[kWidth], c[kWidth];
      next_B[i].unpack(b), next_C[i].unpack(c);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) B.set(matrix_to[i] + k * spacing, b[k]), C.set(matrix_to[i] + k * spacing, c[k]);
    }
    const std::uint32_t resets = block.resets(chunk, kSteps);
    cuda::sync_block();
    if (chunk + 1 < full) prefetch();
    if constexpr (kGated) {  // z is needed after the recurrence only
      EAML_UNROLL
      for (int i = 0; i < kEach; ++i)
        if (grid.has(i)) this_z[i].load(z.vector(i));
      z.advance();
    }
    if (resets == 0)
      recur(std::true_type(), 0, kSteps);
    else
      recur(std::false_type(), resets, kSteps);
    cuda::sync_block();
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (!grid.has(i)) continue;
      float u_t[kWidth], z_t[kWidth] = {}, out[kWidth];
      this_u[i].unpack(u_t);
      if constexpr (kGated) this_z[i].unpack(z_t);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k)
        out[k] = gated(grid.step(i, k), grid.row(i, k), per_channel(D, i, k), u_t[k], z_t[k]);
      Vector packed;
      packed.pack(out);
      packed.store(const_cast<char*>(y.vector(i)));
    }
    y.advance();
  }

  if (full < end) {  // the last chunk of the row, element by element
    const int count = block.steps(full);
    save_state(full);
    constexpr bool kIsHalf = kHalf != Half::kNone;
    cuda::sync_block();
    for (int i = block.thread; i < count * L::kChannels; i += L::kThreads) {
      const int t = i / L::kChannels, c = i % L::kChannels;
      const int64_t time = full * kSteps + t;
      const auto at = [&](const In<float>& x) { return row_offset(x, block.row) + (block.first + c) * x.channel; };
      set_step(t, c, block.template read_sequence<kIsHalf>(&Inputs<float>::u, c, time),
               block.template read_sequence<kIsHalf>(&Inputs<float>::delta, c, time) +
                   read(in.delta_bias, at(in.delta_bias)),
               p.params.softplus);
    }
    for (int i = block.thread; i < count * L::kPadded; i += L::kThreads) {
      const int t = i / L::kPadded, n = i % L::kPadded;
      const auto from = [&](const In<float>& x) {
        const int64_t offset =
            block.row * x.outer + block.group * x.group + n * x.channel + (full * kSteps + t) * x.inner;
        return read<kIsHalf>(x, offset);
      };
      B.set(t * L::kMatrixRow + n, from(in.B)), C.set(t * L::kMatrixRow + n, from(in.C));
    }
    const std::uint32_t resets = block.resets(full, count);
    cuda::sync_block();
    recur(std::false_type(), resets, count);
    cuda::sync_block();
    for (int i = block.thread; i < count * L::kChannels; i += L::kThreads) {
      const int t = i / L::kChannels, c = i % L::kChannels;
      const int64_t time = full * kSteps + t;
      const auto at = [&](const In<float>& x) { return row_offset(x, block.row) + (block.first + c) * x.channel; };
      const float u_t = block.template read_sequence<kIsHalf>(&Inputs<float>::u, c, time);
      const float z_t = kGated ? block.template read_sequence<kIsHalf>(&Inputs<float>::z, c, time) : 0.0f;
      const Out<float>& to = p.out.y;
      write<kIsHalf>(to, block.row * to.outer + (block.first + c) * to.channel + time * to.inner,
                     gated(t, c, read(in.D, at(in.D)), u_t, z_t));
    }
  }

  if (p.out.last_state.data && block.segment == block.segments - 1) write_last_state(block, p.out.last_state, h);
}

// Whether a sequence of a chunk can be read in vectors of 16 bytes along the given dimension.
template <class Array>
bool has_vectors(const Array& x, Half half, bool along_time) {
  const int64_t width = half == Half::kNone ? 4 : 8;
  const int64_t contiguous = along_time ? x.inner : x.channel, other = along_time ? x.channel : x.inner;
  return x.half == half && contiguous == 1 && other % width == 0 && x.outer % width == 0 &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
}
inline bool has_matrix_vectors(const In<float>& x, Half half, bool along_time) {
  return has_vectors(x, half, along_time) && x.group % (half == Half::kNone ? 4 : 8) == 0;
}

// The fast kernel that computes a call, or null if none does.
template <class L>
auto fast_forward(const ForwardParams<float>& p) -> void (*)(ForwardParams<float>) {
  const ScanParams& s = p.params;
  const Inputs<float>& in = p.arrays.values;
  if (p.out.y.data == nullptr || s.B_invariant || s.C_invariant || s.dstate != L::kPadded) return nullptr;
  if (s.dim / s.groups % L::kChannels != 0) return nullptr;
  const Half half = in.u.half;
  const bool along_time = in.u.inner == 1, matrix_along_time = in.B.inner == 1;
  const bool fits = has_vectors(in.u, half, along_time) && has_vectors(in.delta, half, along_time) &&
                    (!s.gated || has_vectors(in.z, half, along_time)) && has_vectors(p.out.y, half, along_time) &&
                    has_matrix_vectors(in.B, half, matrix_along_time) &&
                    has_matrix_vectors(in.C, half, matrix_along_time);
  if (!fits) return nullptr;
  const auto with_layout = [&](auto type) -> void (*)(ForwardParams<float>) {
    constexpr Half kHalf = decltype(type)::value;
    if (along_time)
      return s.gated ? fast_forward_kernel<L, kHalf, true, true> : fast_forward_kernel<L, kHalf, true, false>;
    if constexpr (L::kChannels % Vector16<kHalf>::kWidth == 0)
      return s.gated ? fast_forward_kernel<L, kHalf, false, true> : fast_forward_kernel<L, kHalf, false, false>;
    return nullptr;
  };
  switch (half) {
    case Half::kNone:
      return with_layout(std::integral_constant<Half, Half::kNone>());
    case Half::kBfloat16:
      return with_layout(std::integral_constant<Half, Half::kBfloat16>());
    case Half::kFloat16:
      return with_layout(std::integral_constant<Half, Half::kFloat16>());
  }
  return nullptr;
}

}  // namespace
}  // namespace eaml::selective_scan
