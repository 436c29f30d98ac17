// Parts of the fast kernels: sequences, B and C are read in vectors along whichever dimension is contiguous.
// The states are real and in single precision; S is float or Dual<float>.
#pragma once

#include "selective_scan/cuda/block.cuh"
#include "selective_scan/cuda/fast_kernels.h"

namespace eaml::selective_scan {
namespace {

// The numbers of a vector: 16 bytes, or 8 bytes of half precision in kernels that have few registers left.
template <class L, Half kHalf>
constexpr int kVectorWidth = kHalf == Half::kNone || L::kNumbers == 2 || L::kLanes > 4 ? 4 : 8;

template <Half kHalf, int kWidth>
struct PackedVector {
  static constexpr int kWords = kWidth / (kHalf == Half::kNone ? 1 : 2);
  std::uint32_t words[kWords];

  EAML_MEMBER void load(const char* from) { cuda::load_row(words, reinterpret_cast<const std::uint32_t*>(from)); }
  EAML_MEMBER void store(char* to) const { cuda::store_row(reinterpret_cast<std::uint32_t*>(to), words); }

  EAML_MEMBER void unpack(float (&to)[kWidth]) const {
    EAML_UNROLL
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kHalf == Half::kNone)
        to[i] = __builtin_bit_cast(float, words[i]);
      else
        to[2 * i] = cuda::widen_low<kHalf>(words[i]), to[2 * i + 1] = cuda::widen_high<kHalf>(words[i]);
    }
  }
  EAML_MEMBER void pack(const float (&from)[kWidth]) {
    EAML_UNROLL
    for (int i = 0; i < kWords; ++i) {
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
  static constexpr bool kTimeVectors = kAlongTime;
  static constexpr int kRowsApart = kAlongTime ? kThreads / (kSteps / kWidth) : 0;
  static constexpr int kStepsApart = kAlongTime ? 0 : kThreads / (kRows / kWidth);
  static_assert(kAlongTime ? kSteps % kWidth == 0 : kRows % kWidth == 0);
  int thread;

  // Whether vector i exists and is in a chunk of `steps` steps. Vectors along time are whole, because the length is a
  // multiple of their width.
  EAML_MEMBER bool has(int i, int steps) const { return (kWhole || thread + i * kThreads < kCount) && step(i) < steps; }
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

// The vector of a thread: values and, for duals, tangents.
template <class S, Half kHalf, int kWidth>
struct SequenceVector {
  PackedVector<kHalf, kWidth> parts[kIsDual<S> ? 2 : 1];

  EAML_MEMBER void unpack(S (&to)[kWidth]) const {
    float value[kWidth];
    parts[0].unpack(value);
    if constexpr (kIsDual<S>) {
      float tangent[kWidth];
      parts[1].unpack(tangent);
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) to[k] = {value[k], tangent[k]};
    } else {
      EAML_UNROLL
      for (int k = 0; k < kWidth; ++k) to[k] = value[k];
    }
  }
};

// i times a stride. The strides of fast kernels fit an int, so this is one instruction.
EAML_DEVICE int64_t times_stride(int i, int64_t stride) {
  return cuda::multiply_wide(i, static_cast<int>(stride));
}

template <Half kHalf>
constexpr int64_t kBytesOf = kHalf == Half::kNone ? 4 : 2;

// One array as a thread reads or writes it. Strides stay in constant memory, so they take no registers.
template <class Grid, Half kHalf, class Array>
struct VectorStream {
  const Array& array;
  const char* at;  // vector 0 of the current chunk, whose first step is `time`

  EAML_MEMBER VectorStream(const Grid& grid, const Array& x, int row, int first_channel, int time) : array(x) {
    const int64_t offset = times_stride(row, x.outer) + times_stride(first_channel + grid.row(0), x.channel) +
                           times_stride(time + grid.step(0), x.inner);
    at = reinterpret_cast<const char*>(x.data) + offset * kBytesOf<kHalf>;
  }
  EAML_MEMBER const char* vector(int i) const {
    return at + (times_stride(i * Grid::kRowsApart, array.channel) + times_stride(i * Grid::kStepsApart, array.inner)) *
                    kBytesOf<kHalf>;
  }
  template <int kWidth>
  EAML_MEMBER void store(int i, const float (&from)[kWidth]) const {
    PackedVector<kHalf, kWidth> packed;
    packed.pack(from);
    packed.store(const_cast<char*>(vector(i)));
  }
  EAML_MEMBER void advance() { at += times_stride(kSteps, array.inner) * kBytesOf<kHalf>; }
};

// A sequence of S. A tangent that is not given is zero.
template <class Grid, class S, Half kHalf>
struct SequenceReader {
  using Stream = VectorStream<Grid, kHalf, In<float>>;
  Stream value;

  EAML_MEMBER SequenceReader(const Grid& grid, const Arrays<float>& arrays, In<float> Inputs<float>::* member, int row,
                             int first_channel, int time)
      : value(grid, arrays.values.*member, row, first_channel, time) {}
  template <int kWidth>
  EAML_MEMBER void load(SequenceVector<S, kHalf, kWidth>& to, int i) const {
    to.parts[0].load(value.vector(i));
  }
  EAML_MEMBER void advance() { value.advance(); }
};
template <class Grid, Half kHalf>
struct SequenceReader<Grid, Dual<float>, kHalf> {
  using Stream = VectorStream<Grid, kHalf, In<float>>;
  Stream value, tangent;

  EAML_MEMBER SequenceReader(const Grid& grid, const Arrays<float>& arrays, In<float> Inputs<float>::* member, int row,
                             int first_channel, int time)
      : value(grid, arrays.values.*member, row, first_channel, time),
        tangent(grid, arrays.tangents.*member, row, first_channel, time) {}
  template <int kWidth>
  EAML_MEMBER void load(SequenceVector<Dual<float>, kHalf, kWidth>& to, int i) const {
    to.parts[0].load(value.vector(i));
    to.parts[1] = {};
    if (tangent.array.data != nullptr) to.parts[1].load(tangent.vector(i));
  }
  EAML_MEMBER void advance() { value.advance(), tangent.advance(); }
};

// An input that is constant in time, D or delta_bias, in shared memory for the block's channels.
template <class L>
struct ChannelVector {
  using S = typename L::S;
  Tile<S, L::kVector> tile;

  EAML_MEMBER void stage(const Block<L, true>& block, const Arrays<float>& arrays,
                         In<float> Inputs<float>::* member) const {
    if (block.thread >= L::kChannels) return;
    const auto at = [&](const In<float>& x) {
      return row_offset(x, block.row) + (block.first + block.thread) * x.channel;
    };
    tile.set(block.thread, read_input<S>(arrays, member, at));
  }
  // Reads the entries of the channels of vector i.
  template <class Grid, int kWidth>
  EAML_MEMBER void get(S (&to)[kWidth], const Grid& grid, int i) const {
    if constexpr (!Grid::kTimeVectors) return tile.get_row(to, grid.row(i));
    EAML_UNROLL
    for (int k = 0; k < kWidth; ++k) to[k] = tile.get(grid.row(i));
  }
};

// B or C of a chunk, which are in single precision also if sequences are not. Shared memory has kCopies of each row: in
// copy q, the kStates states of a thread are in the order of their numbers xor q kPermutation.
template <class L, int kCopies>
struct MatrixReader {
  using S = typename L::S;
  static constexpr int kWidth = 4;
  static constexpr int kCount = kSteps * L::kPadded / kWidth, kEach = (kCount + L::kThreads - 1) / L::kThreads;
  static constexpr int kRow = kCopies * L::kPadded + 4;  // padded against bank conflicts
  static constexpr int kTile = kSteps * kRow;
  static constexpr int kTimeGroups = kSteps / kWidth, kStateGroups = L::kPadded / kWidth;
  static constexpr int kPermutation = kCopies == 4 ? 1 : 2;
  static_assert(L::kThreads % kTimeGroups == 0 && L::kThreads % kStateGroups == 0 && L::kStates == 4);
  using Vectors = SequenceVector<S, Half::kNone, kWidth>[kEach];

  const Arrays<float>& arrays;
  In<float> Inputs<float>::* member;
  bool along_time;
  int thread, t, n;  // the first step and state of vector 0
  const char *at, *tangent_at;

  EAML_MEMBER MatrixReader(const Block<L, true>& block, const Arrays<float>& a, In<float> Inputs<float>::* m, int time)
      : arrays(a), member(m), along_time((a.values.*m).inner == 1), thread(block.thread) {
    t = along_time ? thread % kTimeGroups * kWidth : thread / kStateGroups;
    n = along_time ? thread / kTimeGroups : thread % kStateGroups * kWidth;
    const int row = cuda::recomputed(block.batch_row);
    const auto start = [&](const In<float>& x) {
      const int64_t offset = row * x.outer + block.group * x.group + n * x.channel + (time + t) * x.inner;
      return reinterpret_cast<const char*>(x.data) + offset * kBytesOf<Half::kNone>;
    };
    at = start(arrays.values.*member);
    if constexpr (kIsDual<S>) tangent_at = start(arrays.tangents.*member);
  }
  EAML_MEMBER int step(int i) const { return t + (along_time ? 0 : i * (L::kThreads / kStateGroups)); }
  // As VectorGrid::has.
  EAML_MEMBER bool has(int i, int steps) const {
    return (kCount % L::kThreads == 0 || thread + i * L::kThreads < kCount) && step(i) < steps;
  }
  // Loads the vectors of a chunk of `steps` steps.
  EAML_MEMBER void load(Vectors& to, int steps) const {
    const auto apart = [&](const In<float>& x) {
      return (along_time ? times_stride(L::kThreads / kTimeGroups, x.channel)
                         : times_stride(L::kThreads / kStateGroups, x.inner)) *
             kBytesOf<Half::kNone>;
    };
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (!has(i, steps)) continue;
      to[i].parts[0].load(at + i * apart(arrays.values.*member));
      if constexpr (kIsDual<S>) {
        const In<float>& tangent = arrays.tangents.*member;
        to[i].parts[1] = {};
        if (tangent.data != nullptr) to[i].parts[1].load(tangent_at + i * apart(tangent));
      }
    }
  }
  EAML_MEMBER void advance() {
    at += times_stride(kSteps, (arrays.values.*member).inner) * kBytesOf<Half::kNone>;
    if constexpr (kIsDual<S>)
      tangent_at += times_stride(kSteps, (arrays.tangents.*member).inner) * kBytesOf<Half::kNone>;
  }
  EAML_MEMBER static void set(const Tile<S, kTile>& tile, int step, int state, S x) {
    EAML_UNROLL
    for (int q = 0; q < kCopies; ++q) tile.set(step * kRow + q * L::kPadded + (state ^ q * kPermutation), x);
  }
  EAML_MEMBER void stage(const Tile<S, kTile>& tile, const Vectors& from, int steps) const {
    EAML_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (!has(i, steps)) continue;
      S x[kWidth];
      from[i].unpack(x);
      if (along_time) {
        const int state = n + i * (L::kThreads / kTimeGroups);
        EAML_UNROLL
        for (int k = 0; k < kWidth; ++k) set(tile, t + k, state, x[k]);
      } else {
        const int to = step(i) * kRow + n;
        EAML_UNROLL
        for (int k = 0; k < kWidth; k += 4) {
          EAML_UNROLL
          for (int q = 0; q < kCopies; ++q) {
            S row[4];
            EAML_UNROLL
            for (int j = 0; j < 4; ++j) row[j] = x[k + (j ^ q * kPermutation)];
            tile.set_row(row, to + q * L::kPadded + k);
          }
        }
      }
    }
  }
};

constexpr int64_t kMaxStride = INT32_MAX;

// Whether an array can be read in whole vectors of 16 bytes along the given dimension, with strides that fit an int.
// Packed sequences may start at any step, so their vectors along time may not.
template <class Array>
bool has_vectors(const ScanParams& s, const Array& x, Half half, bool along_time) {
  const int64_t width = half == Half::kNone ? 4 : 8;
  const int64_t contiguous = along_time ? x.inner : x.channel, other = along_time ? x.channel : x.inner;
  const auto fits = [&](int64_t stride) { return stride % width == 0 && stride <= kMaxStride; };
  return x.half == half && contiguous == 1 && fits(other) && (s.batch == s.num_sequences || fits(x.outer)) &&
         (!along_time || (s.cu_seqlens == nullptr && s.length % width == 0)) &&
         reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
}

// Whether the fast kernels can read the inputs of a call: whole blocks of channels, no padding states, vectors.
template <class L>
bool has_fast_inputs(const ScanParams& s, const Arrays<float>& arrays, bool backward) {
  if (s.B_invariant || s.C_invariant || s.dstate != L::kPadded || s.dim / s.groups % L::kChannels != 0) return false;
  if (s.length > kMaxStride - kSteps) return false;
  const Half half = arrays.values.u.half;
  const bool along_time = arrays.values.u.inner == 1, matrix_along_time = arrays.values.B.inner == 1;
  const auto fits = [&](In<float> Inputs<float>::* member, bool is_matrix) {
    const auto array_fits = [&](const In<float>& x) {
      if (!is_matrix) return has_vectors(s, x, half, along_time);
      return has_vectors(s, x, Half::kNone, matrix_along_time) && x.group % 4 == 0 && x.group <= kMaxStride;
    };
    const In<float>& tangent = arrays.tangents.*member;
    return array_fits(arrays.values.*member) &&
           (!kIsDual<typename L::Z> || tangent.data == nullptr || array_fits(tangent));
  };
  return fits(&Inputs<float>::u, false) && fits(&Inputs<float>::delta, false) &&
         (!s.gated || fits(&Inputs<float>::z, false)) && (!backward || fits(&Inputs<float>::grad_y, false)) &&
         fits(&Inputs<float>::B, true) && fits(&Inputs<float>::C, true);
}

// Calls f(type of the sequences, whether they are contiguous along time), both std::integral_constants.
template <class F>
auto with_fast_layout(Half half, bool along_time, F f) {
  const auto with_type = [&](auto type) { return along_time ? f(type, std::true_type()) : f(type, std::false_type()); };
  if (half == Half::kBfloat16) return with_type(std::integral_constant<Half, Half::kBfloat16>());
  if (half == Half::kFloat16) return with_type(std::integral_constant<Half, Half::kFloat16>());
  return with_type(std::integral_constant<Half, Half::kNone>());
}

// Calls f(Tiling) with the Tiling of a call that has fast kernels. Returns an empty FastKernel if there is none, or if
// the device has too little shared memory.
template <class P, class F>
FastKernel<P> with_fast_tiling(int64_t states, bool dual, F f) {
  FastKernel<P> fast;
  if (states == 16) fast = dual ? f(Tiling<Dual<float>, 4, 4>()) : f(Tiling<float, 4, 4>());
  if (states == 64) fast = dual ? f(Tiling<Dual<float>, 16, 4>()) : f(Tiling<float, 16, 4>());
  return fast.shared_bytes <= cuda::max_shared_bytes() ? fast : FastKernel<P>{};
}

}  // namespace
}  // namespace eaml::selective_scan
