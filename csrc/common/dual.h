// Dual numbers: a value and a tangent. A kernel run on duals computes its own directional derivative.
#pragma once

#include "common/simd.h"

namespace eaml {

template <class V>
struct Dual {
  V value, tangent;
  Dual() = default;
  EAML_INLINE Dual(V v, V t = V{}) : value(v), tangent(t) {}
  // Not the default, which copies memory: gcc then keeps in memory what could be two registers.
  EAML_INLINE Dual(const Dual& other) : value(other.value), tangent(other.tangent) {}
  EAML_INLINE Dual& operator=(const Dual& other) {
    value = other.value, tangent = other.tangent;
    return *this;
  }
};

template <class V>
EAML_INLINE Dual<V> operator+(const Dual<V>& a, const Dual<V>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class V>
EAML_INLINE Dual<V> operator-(const Dual<V>& a, const Dual<V>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class V>
EAML_INLINE Dual<V> operator-(const Dual<V>& a) {
  return {-a.value, -a.tangent};
}
// b may hold one number for all lanes of a.
template <class V, class W>
EAML_INLINE Dual<V> operator*(const Dual<V>& a, const Dual<W>& b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}

// The vector inside a scalar of the kernels.
template <class S>
struct VectorOf {
  using type = S;
};
template <class V>
struct VectorOf<Dual<V>> {
  using type = V;
};
template <class S>
using vector_t = typename VectorOf<S>::type;

// What a kernel writes out: the value, or, run on duals, the tangent alone.
template <class V>
EAML_INLINE V output(V x) {
  return x;
}
template <class V>
EAML_INLINE V output(const Dual<V>& x) {
  return x.tangent;
}

}  // namespace eaml
