// Branch-free exp and tanh that the compiler vectorises, and bfloat16 loads and stores. Included once per instruction
// set, so everything lives in that set's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qempo::cpu::QEMPO_ISA {

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class A>
inline A load(const A* p) {
  return *p;
}
template <class A>
inline A load(const bf16* p) {
  return bits_as<float>(static_cast<uint32_t>(p->bits) << 16);
}
inline void store(float* p, float x) { *p = x; }
inline void store(double* p, double x) { *p = x; }
inline void store(bf16* p, float x) {
  // Round to nearest even; a NaN keeps its top bits, where the rounding carry would turn some into infinity.
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : rounded);
}

// exp, relative error below 2e-7: n = round(x / ln 2) by adding 1.5 * 2^23, whose low bits are then n; x - n ln 2 in
// two steps; the Cephes polynomial. Below -87.3 (and -inf) it is 0; NaN stays NaN.
inline float exp_(float x) {
  const float y = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float t = y * 1.44269504088896341f + 12582912.f;
  const float n = t - 12582912.f;
  const float f = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.f;
  const float scale = bits_as<float>((bits_as<uint32_t>(t) + 127u) << 23);
  return x < -87.3f ? 0.f : p * scale;
}

// The same in double: Taylor to degree 13 on |f| <= ln 2 / 2, next term 4e-18.
inline double exp_(double x) {
  const double y = x < -708.0 ? -708.0 : (x > 709.0 ? 709.0 : x);
  const double t = y * 1.4426950408889634 + 6755399441055744.0;
  const double n = t - 6755399441055744.0;
  const double f = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.6059043836821613e-10;
  p = p * f + 2.0876756987868099e-09;
  p = p * f + 2.5052108385441719e-08;
  p = p * f + 2.7557319223985891e-07;
  p = p * f + 2.7557319223985893e-06;
  p = p * f + 2.4801587301587302e-05;
  p = p * f + 1.9841269841269841e-04;
  p = p * f + 1.3888888888888889e-03;
  p = p * f + 8.3333333333333332e-03;
  p = p * f + 4.1666666666666664e-02;
  p = p * f + 1.6666666666666666e-01;
  p = p * f + 0.5;
  p = p * (f * f) + f + 1.0;
  const double scale = bits_as<double>((bits_as<uint64_t>(t) + 1023u) << 52);
  return x < -708.0 ? 0.0 : p * scale;
}

// tanh, Cephes: a polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) would cancel.
inline float tanh_(float x) {
  const float a = x < 0.f ? -x : x, z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = x + x * z * p;
  const float large = 1.f - 2.f / (exp_(2.f * a) + 1.f);
  return a < 0.625f ? small : (x < 0.f ? -large : large);
}
inline double tanh_(double x) { return std::tanh(x); }

}  // namespace qempo::cpu::QEMPO_ISA
