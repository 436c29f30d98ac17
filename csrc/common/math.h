// Arithmetic of the kernels on a vector of lanes or on one number: no branches, no library calls.
// Dual<V> carries a value and a tangent: a kernel run on duals is its own directional derivative.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simd.h"
#if defined(__CUDACC__) || defined(EAML_CUDA_ON_CPU)
#include "common/cuda.h"
#endif

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

// A complex number of two S, which may be Duals.
template <class S>
struct Complex {
  S re, im;
};
template <class S>
struct VectorOf<Complex<S>> : VectorOf<S> {};

// Of Z, a number or a Complex: its parts, and what it is made of.
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
constexpr std::int64_t kComponents = Components<Z>::count;
template <class Z>
constexpr bool kIsDual = !std::is_same_v<real_t<Z>, vector_t<Z>>;

template <class S>
EAML_INLINE Complex<S> operator+(const Complex<S>& a, const Complex<S>& b) {
  return {a.re + b.re, a.im + b.im};
}
// Here too, what comes second may hold one number for all lanes.
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

// a times the conjugate of b, the conjugate, and the real part, of real numbers too.
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

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

#if defined(__CUDACC__) || defined(EAML_CUDA_ON_CPU)
// Threads of a GPU have one number each, and an instruction for this.
template <int K, class V>
EAML_INLINE void exp2_(const V (&t)[K], V (&out)[K]) {
  EAML_UNROLL
  for (int k = 0; k < K; ++k) out[k] = cuda::exp2(t[k]);
}
#else
// Polynomials and bit layouts of 2^t. `polynomial` serves |r| <= 1/2; AVX-512 looks 2^(j / table size) up, and `fine`
// or the square serves what remains (minimax, exactly 1 at 0).
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float round = 12582912.0f + 127.0f, top = 12582912.0f + 255.0f, bottom = -126.5f, scale = 1.0f;
  // 1.5 * 2^(mantissa - bits): adding it leaves the number of 1 / table size steps in the lowest bits.
  static constexpr float grid = 393216.0f;
  static constexpr int mantissa = 23, terms = 6, bits = 5;
  static constexpr float polynomial[terms] = {1.3264715e-3f, 9.671513e-3f,  5.5507340e-2f,
                                              2.4022242e-1f, 6.9314700e-1f, 1.0f};
  // 2^r = ((r + shift)^2 + offset) / (shift^2 + offset): one fused operation and a sum. The table has the quotient.
  static constexpr float shift = 1.442147970f, offset = 2.081305265f;
  alignas(kAlignment) static constexpr float table[1 << bits] = {
      0.240321293f, 0.245583639f, 0.250961214f, 0.256456554f, 0.262072235f, 0.267810851f, 0.273675174f, 0.279667854f,
      0.285791785f, 0.292049825f, 0.298444867f, 0.30497998f,  0.311658174f, 0.318482578f, 0.32545644f,  0.33258301f,
      0.339865625f, 0.347307712f, 0.354912758f, 0.362684339f, 0.370626092f, 0.378741771f, 0.387035131f, 0.395510077f,
      0.404170632f, 0.413020819f, 0.422064781f, 0.431306809f, 0.440751195f, 0.450402379f, 0.460264921f, 0.470343411f};
};
template <>
struct Exp2<double> {
  static constexpr double round = 6755399441055744.0 + 1023.0, top = 6755399441055744.0 + 2047.0, bottom = -1022.5;
  static constexpr double grid = 422212465065984.0;
  static constexpr double scale = kLn2;  // Taylor of exp on |x| <= ln2/2: the first dropped term is below 5e-18
  static constexpr int mantissa = 52, terms = 14, fine_terms = 6, bits = 4;
  static constexpr double polynomial[terms] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  static constexpr double fine[fine_terms] = {0.00015404211699335224095, 0.0013333820232815162885,
                                              0.0096181291020536239683,  0.05550410865195458609,
                                              0.24022650695910167029,    0.69314718055994688866};
  alignas(kAlignment) static constexpr double table[1 << bits] = {1.0,
                                                                  1.0442737824274138,
                                                                  1.0905077326652577,
                                                                  1.1387886347566916,
                                                                  1.189207115002721,
                                                                  1.241857812073484,
                                                                  1.2968395546510096,
                                                                  1.3542555469368927,
                                                                  1.4142135623730951,
                                                                  1.4768261459394993,
                                                                  1.5422108254079407,
                                                                  1.6104903319492543,
                                                                  1.681792830507429,
                                                                  1.7562521603732995,
                                                                  1.8340080864093424,
                                                                  1.9152065613971474};
};

#if defined(__x86_64__)
// t rounded to a multiple of 1 / table size, subtracted from t; 0 for infinities.
EAML_INLINE Vec<float, 16> remainder(Vec<float, 16> t) {
  Vec<float, 16> r;
  EAML_AVX512_ASM("vreduceps %2, %1, %0" : "=v"(r) : "v"(t), "i"(Exp2<float>::bits << 4));
  return r;
}
EAML_INLINE Vec<double, 8> remainder(Vec<double, 8> t) {
  Vec<double, 8> r;
  EAML_AVX512_ASM("vreducepd %2, %1, %0" : "=v"(r) : "v"(t), "i"(Exp2<double>::bits << 4));
  return r;
}
// low and high, one after the other, at the number in the lowest bits of each lane of index (see Exp2::grid).
EAML_INLINE Vec<float, 16> lookup(Vec<float, 16> low, Vec<float, 16> high, Vec<float, 16> index) {
  EAML_AVX512_ASM("vpermi2ps %2, %1, %0" : "+v"(index) : "v"(low), "vm"(high));
  return index;
}
EAML_INLINE Vec<double, 8> lookup(Vec<double, 8> low, Vec<double, 8> high, Vec<double, 8> index) {
  EAML_AVX512_ASM("vpermi2pd %2, %1, %0" : "+v"(index) : "v"(low), "vm"(high));
  return index;
}
// x 2^floor(t)
EAML_INLINE Vec<float, 16> scale_by_power(Vec<float, 16> x, Vec<float, 16> t) {
  Vec<float, 16> scaled;
  EAML_AVX512_ASM("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(x), "v"(t));
  return scaled;
}
EAML_INLINE Vec<double, 8> scale_by_power(Vec<double, 8> x, Vec<double, 8> t) {
  Vec<double, 8> scaled;
  EAML_AVX512_ASM("vscalefpd %2, %1, %0" : "=v"(scaled) : "v"(x), "v"(t));
  return scaled;
}
template <class V>
constexpr bool kTableExp2 = sizeof(V) == 64;
#else
template <class V>
constexpr bool kTableExp2 = false;
#endif

// 2^t within 2.5 ulp (2.2 on AVX-512), exactly 1 at 0, NaN for NaN. Below 2^-126 it is 0, or on AVX-512 a denormal
// number; above 2^127.5 it may be infinite, of either sign, or NaN. K numbers go side by side: as one chain after the
// other they would fill the processor's queues with waiting work.
template <int K, class V>
EAML_INLINE void exp2_(const V (&t)[K], V (&out)[K]) {
  using T = element_t<V>;
  using E = Exp2<T>;
  if constexpr (kTableExp2<V>) {
    const V low = load<V>(E::table), high = load<V>(E::table + Lanes<V>::count);
    V r[K], p[K], base[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) r[k] = remainder(t[k]);
    if constexpr (sizeof(T) == 4) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = r[k] + E::shift;
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * p[k] + E::offset;
    } else {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = splat<V>(E::fine[0]);
      EAML_UNROLL
      for (int i = 1; i < E::fine_terms; ++i) {
        EAML_UNROLL
        for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + E::fine[i];
      }
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + T(1);
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) base[k] = lookup(low, high, t[k] + E::grid);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = scale_by_power(p[k] * base[k], t[k] - r[k]);
  } else {
    // Adding `round` leaves the rounded, biased exponent in the low mantissa bits; a shift makes it 2^n.
    using Bits = bits_t<V>;
    V shifted[K], r[K], p[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) shifted[k] = t[k] + E::round;
    EAML_UNROLL
    for (int k = 0; k < K; ++k) r[k] = (t[k] - (shifted[k] - E::round)) * E::scale, p[k] = splat<V>(E::polynomial[0]);
    EAML_UNROLL
    for (int i = 1; i < E::terms; ++i) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * r[k] + E::polynomial[i];
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) {
      const Bits top = __builtin_bit_cast(Bits, splat<V>(E::top)), n = __builtin_bit_cast(Bits, shifted[k]);
      const Bits exponent = n < top ? n : top;
      out[k] = t[k] < splat<V>(E::bottom) ? V{} : p[k] * __builtin_bit_cast(V, exponent << E::mantissa);
    }
  }
}
#endif

template <class V>
EAML_INLINE V exp_(V x) {
  const V in[1] = {x * element_t<V>(kLog2e)};
  V out[1];
  exp2_(in, out);
  return out[0];
}

// Minimax polynomials of sin(pi r) / r and of cos(pi r) in r^2, for |r| <= 1/2, by Remez's algorithm; the last
// coefficient of the second is exactly 1. Adding `round`, 1.5 * 2^mantissa, leaves an integer in the lowest bits.
template <class T>
struct Turn;
template <>
struct Turn<float> {
  static constexpr float round = 12582912.0f;
  static constexpr int sign = 31, sine_terms = 5, cosine_terms = 6;
  float sine[sine_terms] = {0.0795397833f, -0.599313557f, 2.55025482f, -5.16772032f, 3.14159274f};
  float cosine[cosine_terms] = {-0.0239760354f, 0.234688058f, -1.33516192f, 4.05870533f, -4.93480206f, 1.0f};
  static constexpr float per_radian = 0.318309873f, per_radian_rest = 1.28412765e-8f;  // their sum is 1 / pi
};
template <>
struct Turn<double> {
  static constexpr double round = 6755399441055744.0;
  static constexpr int sign = 63, sine_terms = 9, cosine_terms = 9;
  double sine[sine_terms] = {7.6895922057447072e-7,  -2.1902691848915669e-5, 0.000466299496496898,
                             -0.0073704304398583588, 0.082145886565543808,   -0.59926452931847496,
                             2.550164039877286,      -5.1677127800499694,    3.1415926535897931};
  double cosine[cosine_terms] = {4.1469625105962147e-6, -0.00010456428091577896, 0.0019295554954383318,
                                 -0.025806888607130492, 0.2353306301189913,      -1.3352627688431442,
                                 4.0587121264165038,    -4.9348022005446772,     1.0};
  static constexpr double per_radian = 0.3183098861837907, per_radian_rest = -1.9678676675182486e-17;
};

// An angle in half turns, as the sum of two numbers.
template <class V>
struct HalfTurns {
  V high, low;
};
template <class T>
EAML_INLINE HalfTurns<T> half_turns(T radians) {
  const T high = radians * Turn<T>::per_radian;
  return {high, std::fma(radians, Turn<T>::per_radian, -high) + radians * Turn<T>::per_radian_rest};
}

// modulus * e^(i x angle), each part within two roundings of the modulus where multiply-adds are fused; elsewhere the
// rounding of x * angle comes on top. Beyond 2^18 half turns (2^47 in double precision) the angle is any, but one; of
// an infinite one it is NaN.
template <int K, class V>
EAML_INLINE void polar(const V (&modulus)[K], V x, const HalfTurns<V> (&angle)[K], Complex<V> (&out)[K]) {
  using E = Turn<element_t<V>>;
  constexpr E turn{};  // a GPU has no static arrays
  using Bits = bits_t<V>;
  V shifted[K], r[K], square[K], sine[K], cosine[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) shifted[k] = x * angle[k].high + E::round;
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    r[k] = x * angle[k].high - (shifted[k] - E::round) + x * angle[k].low;  // the first product is not rounded
    const V least = splat<V>(-0.51f), most = splat<V>(0.51f);
    r[k] = r[k] < least ? least : r[k];
    r[k] = r[k] > most ? most : r[k];
    square[k] = r[k] * r[k], sine[k] = splat<V>(turn.sine[0]), cosine[k] = splat<V>(turn.cosine[0]);
  }
  EAML_UNROLL
  for (int i = 1; i < E::sine_terms; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) sine[k] = sine[k] * square[k] + turn.sine[i];
  }
  EAML_UNROLL
  for (int i = 1; i < E::cosine_terms; ++i) {
    EAML_UNROLL
    for (int k = 0; k < K; ++k) cosine[k] = cosine[k] * square[k] + turn.cosine[i];
  }
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {  // an odd number of half turns changes the sign
    const Bits odd = __builtin_bit_cast(Bits, shifted[k]) << E::sign;
    const V scale = __builtin_bit_cast(V, __builtin_bit_cast(Bits, modulus[k]) ^ odd);
    out[k] = {scale * cosine[k], scale * (sine[k] * r[k])};
  }
}

// log(1 + v) for v in [0, 1], with relative accuracy also where v is tiny.
template <int K, class V>
EAML_INLINE void log1p_unit(const V (&v)[K], V (&out)[K]) {
  V p[K];
  if constexpr (sizeof(element_t<V>) == 4) {
    // log(1 + v) / v, minimax: a division would cost more than this polynomial.
    constexpr float polynomial[] = {-3.24398419e-3f, 1.98512822e-2f,  -5.69592081e-2f, 1.06036231e-1f,  -1.53055742e-1f,
                                    1.96759343e-1f,  -2.49541327e-1f, 3.33299637e-1f,  -4.99999017e-1f, 1.0f};
    EAML_UNROLL
    for (int k = 0; k < K; ++k) p[k] = splat<V>(polynomial[0]);
    EAML_UNROLL
    for (int i = 1; i < 10; ++i) {
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * v[k] + polynomial[i];
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = p[k] * v[k];
  } else {
    V s[K], q[K];
    EAML_UNROLL
    for (int k = 0; k < K; ++k) s[k] = v[k] / (2.0 + v[k]), q[k] = s[k] * s[k], p[k] = splat<V>(2.0 / 37);
    EAML_UNROLL
    for (int i = 1; i < 19; ++i) {  // as 2 artanh(s)
      EAML_UNROLL
      for (int k = 0; k < K; ++k) p[k] = p[k] * q[k] + 2.0 / (37 - 2 * i);
    }
    EAML_UNROLL
    for (int k = 0; k < K; ++k) out[k] = p[k] * s[k];
  }
}

template <class V>
EAML_INLINE V sigmoid(V x) {
  using T = element_t<V>;
  return T(1) / (T(1) + exp_(-x));
}

template <class S>
struct Softplus {
  S value, slope;
};

// Softplus and its derivative share one exponential; what is not used costs nothing.
template <int K, class V>
EAML_INLINE void softplus(const V (&x)[K], Softplus<V> (&out)[K]) {
  using T = element_t<V>;
  V t[K], e[K], log[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) t[k] = (x[k] < V{} ? x[k] : -x[k]) * T(kLog2e);
  exp2_(t, e);
  log1p_unit(e, log);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    const V part = T(1) / (T(1) + e[k]);
    out[k].value = (x[k] > V{} ? x[k] : V{}) + log[k];  // of NaN, log is NaN
    out[k].slope = x[k] > V{} ? part : e[k] * part;
  }
}

template <class V>
EAML_INLINE Dual<V> sigmoid(Dual<V> x) {
  const V s = sigmoid(x.value);
  return {s, s * (element_t<V>(1) - s) * x.tangent};
}
template <int K, class V>
EAML_INLINE void softplus(const Dual<V> (&x)[K], Softplus<Dual<V>> (&out)[K]) {
  V values[K];
  Softplus<V> s[K];
  EAML_UNROLL
  for (int k = 0; k < K; ++k) values[k] = x[k].value;
  softplus(values, s);
  EAML_UNROLL
  for (int k = 0; k < K; ++k) {
    out[k].value = {s[k].value, s[k].slope * x[k].tangent};
    out[k].slope = {s[k].slope, s[k].slope * (element_t<V>(1) - s[k].slope) * x[k].tangent};
  }
}

}  // namespace eaml
