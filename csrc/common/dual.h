// Dual numbers: a value and a tangent. A kernel run on duals computes its own directional derivative.
#pragma once

#include "common/simd.h"

namespace eaml {

template <class V>
struct Dual {
  V value, tangent;
  Dual() = default;
  EAML_INLINE Dual(V v, V t = V{}) : value(v), tangent(t) {}
  // Not defaulted: gcc copies a defaulted one as memory and keeps it out of registers.
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

// The vector type V of a scalar: V itself, a Dual<V>, or a Complex of either.
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

// The value of a number or a dual.
template <class V>
EAML_INLINE V value_of(V x) {
  return x;
}
template <class V>
EAML_INLINE V value_of(const Dual<V>& x) {
  return x.value;
}

// The number that a kernel outputs: the value, or in a run on duals the tangent.
template <class V>
EAML_INLINE V output(V x) {
  return x;
}
template <class V>
EAML_INLINE V output(const Dual<V>& x) {
  return x.tangent;
}

}  // namespace eaml
