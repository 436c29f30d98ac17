// Arrays in shared memory, reads and writes of inputs and outputs, and sums over the threads of a warp.
#pragma once

#include "selective_scan/cuda/traits.cuh"

namespace eaml::selective_scan {
namespace {

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

// a b, with values rounded before they are added to anything: kernels that store the product and kernels that keep it
// in a register compute the same bits.
template <class T>
EAML_DEVICE T rounded_product(T a, T b) {
  return cuda::multiply(a, b);
}
template <class T>
EAML_DEVICE Dual<T> rounded_product(const Dual<T>& a, const Dual<T>& b) {
  return {cuda::multiply(a.value, b.value), a.value * b.tangent + a.tangent * b.value};
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

// Whether A is the same for all states of a channel: A has no stride over the states.
template <class T>
EAML_DEVICE bool shares_decay(const Arrays<T>& arrays) {
  return arrays.values.A.inner == 0;
}
// a = exp(dt A) for the states of a thread; one exponential if they share it.
template <int K, class Z, class S>
EAML_DEVICE void decay_of_thread(bool shared, S dt, const Z (&A)[K], const Rate<Z> (&rate)[K], Z (&a)[K]) {
  if constexpr (kNumComponents<Z> == 1 && K > 1) {
    if (shared) {
      const vector_t<Z> t[1] = {value_of(dt) * rate[0].log2};
      vector_t<Z> value[1];
      exp2_(t, value);
      return share_decay(value[0], dt, A, a);
    }
  }
  decay(dt, A, rate, a);
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

// Sums a quantity over the lanes of a channel for each step of a tile. Afterwards out[0 .. kSumsLeft) has the sums from
// step `first` on. If there are more lanes than sums, the result is true on one lane per sum.
template <class L, class S>
EAML_DEVICE bool sum_over_lanes(const S (&sums)[kStepsPerTile], S (&out)[kStepsPerTile], int& first) {
  using T = vector_t<S>;
  T value[kStepsPerTile], tangent[kStepsPerTile];
  bool mine = true;
  EAML_UNROLL
  for (int i = 0; i < kStepsPerTile; ++i) {
    if constexpr (kIsDual<S>)
      value[i] = sums[i].value, tangent[i] = sums[i].tangent;
    else
      value[i] = sums[i];
  }
  first = 0;
  reduce_scatter<1, L::kLanes, kStepsPerTile>(value, first, mine);
  if constexpr (kIsDual<S>) {
    first = 0, mine = true;
    reduce_scatter<1, L::kLanes, kStepsPerTile>(tangent, first, mine);
  }
  EAML_UNROLL
  for (int k = 0; k < kStepsPerTile; ++k) {
    if constexpr (kIsDual<S>)
      out[k] = {value[k], tangent[k]};
    else
      out[k] = value[k];
  }
  return mine;
}

// Stores the sums of a tile's steps in a column of `tile`, or adds them to it.
template <class L, class S, int kSize>
EAML_DEVICE void put_sums(const S (&sums)[kStepsPerTile], Tile<S, kSize> tile, int at, bool add) {
  S mine[kStepsPerTile];
  int first;
  if (!sum_over_lanes<L>(sums, mine, first)) return;
  EAML_UNROLL
  for (int k = 0; k < kSumsLeft<1, L::kLanes, kStepsPerTile>; ++k) {
    const int i = at + (first + k) * L::kRow;
    tile.set(i, add ? tile.get(i) + mine[k] : mine[k]);
  }
}

}  // namespace
}  // namespace eaml::selective_scan
