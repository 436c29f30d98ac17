// Complex numbers of two scalars, which may be duals. Components<Z> makes one template work for real and complex Z.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/dual.h"

namespace eaml {

// A complex number of two S, which may be Duals.
template <class S>
struct Complex {
  S re, im;
};
template <class S>
struct VectorOf<Complex<S>> : VectorOf<S> {};

// The number of components of Z, a scalar or a Complex, and their type.
template <class Z>
struct Components {
  using Real = Z;
  static constexpr std::int64_t count = 1;
};
template <class S>
struct Components<Complex<S>> {
  using Real = S;
  static constexpr std::int64_t count = 2;
};
template <class Z>
using real_t = typename Components<Z>::Real;
template <class Z>
constexpr std::int64_t kNumComponents = Components<Z>::count;
template <class Z>
constexpr bool kIsDual = !std::is_same_v<real_t<Z>, vector_t<Z>>;

template <class S>
EAML_INLINE Complex<S> operator+(const Complex<S>& a, const Complex<S>& b) {
  return {a.re + b.re, a.im + b.im};
}
// b may hold one number for all lanes of a.
template <class S, class M>
EAML_INLINE Complex<S> operator*(const Complex<S>& a, const Complex<M>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class S, class M>
EAML_INLINE Complex<S> operator*(const S& a, const Complex<M>& b) {
  return {a * b.re, a * b.im};
}
template <class S>
EAML_INLINE Complex<S> operator*(const Complex<S>& a, const S& b) {
  return {a.re * b, a.im * b};
}
template <class S>
EAML_INLINE Complex<vector_t<S>> output(const Complex<S>& x) {
  return {output(x.re), output(x.im)};
}
template <class Z>
using output_t = decltype(output(std::declval<Z>()));

// a times the conjugate of b, the conjugate, and the real part; also defined for real numbers.
template <class S, class M>
EAML_INLINE S times_conjugate(const S& a, const M& b) {
  return a * b;
}
template <class S, class M>
EAML_INLINE Complex<S> times_conjugate(const S& a, const Complex<M>& b) {
  return {a * b.re, -(a * b.im)};
}
template <class S, class M>
EAML_INLINE Complex<S> times_conjugate(const Complex<S>& a, const Complex<M>& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
template <class S>
EAML_INLINE S conjugate(const S& x) {
  return x;
}
template <class S>
EAML_INLINE Complex<S> conjugate(const Complex<S>& x) {
  return {x.re, -x.im};
}
template <class S>
EAML_INLINE S real(const S& x) {
  return x;
}
template <class S>
EAML_INLINE S real(const Complex<S>& x) {
  return x.re;
}

}  // namespace eaml
