// exp, log and tanh of a vector in registers.
#pragma once
#include "common/cpu/simd.h"

namespace kernels::ISA {

// max(a, b) is b where either is NaN: max(constant, x) lets a NaN in x through.  Intrinsics, for of
// a > b ? a : b with a constant g++ 12 makes two instructions.
SIMD_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
SIMD_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, exp(r) a polynomial of degree
// 6 (minimax, relative error 3.1e-9).  Error at most 0.9 units in the last place, 1.2 without FMA.
// NaN stays NaN and exp(-inf) is 0.  Beyond the normal range AVX-512 gives subnormals and inf, the
// others 0 and about the largest float.
SIMD_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
  x = max(set1(-104.f), x);  // scaled by its power of two it is 0; -inf itself would make r NaN
#else
  constexpr float kLargest = 88.72283f, kSmallest = -87.33654f;
  const auto underflow = x < kSmallest;
  x = min(set1(kLargest), max(set1(kSmallest), x));
#endif
  const vf round = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * 1.44269504f + round;
  const vf n = shifted - round;
  vf r = n * -0.693359375f + x;  // ln 2 in two parts, the first so short that n times it is exact
  r = n * 2.12194440e-4f + r;
  vf p = set1(1.3814584e-3f);
  p = p * r + 8.3687240e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf y = (vf)((vu)p + ((vu)shifted << 23));  // the low bits of `shifted` hold n
  return underflow ? vf{} : y;
#endif
}

// exp for sums and shares of a maximum, where a term far below 1 counts little: ln 2 as one
// constant, which saves an instruction where FMA makes the product exact.  Error at most 0.9 units
// in the last place, and one more for each 60 that x is below 0.
SIMD_INLINE vf exp_share(vf x) {
#if defined(__AVX512F__)
  x = max(set1(-104.f), x);
  const vf round = set1(12582912.f);
  const vf shifted = x * 1.44269504f + round;
  const vf n = shifted - round;
  const vf r = n * -0.693147182f + x;
  vf p = set1(1.3814584e-3f);
  p = p * r + 8.3687240e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exp(x);
#endif
}

// exp(x) - 1, without the cancellation near 0: there the polynomial is x + x^2 * (...).
SIMD_INLINE vf exp_minus_1(vf x) {
  vf p = set1(1.3814584e-3f);
  p = p * x + 8.3687240e-3f;
  p = p * x + 4.1668389e-2f;
  p = p * x + 1.6666521e-1f;
  p = p * x + 4.9999994e-1f;
  const vf near = p * x * x + x;
  const vf size = (vf)((vu)x & 0x7fffffff);
  return size < 0.3465f ? near : exp(x) - 1.f;
}

// log(x) = e * ln 2 + log(1 + f) with x = 2^e * (1 + f) and |f| <= 1/3; log(1 + f) = f - f^2 / 2 +
// f^3 * p, p a polynomial of degree 7 (minimax, relative error of the whole 4.6e-9).  For positive
// normal numbers; NaN stays NaN.
SIMD_INLINE vf log(vf x) {
  const vi e = ((vi)x - 0x3f2aaaab) >> 23;  // 0x3f2aaaab is 2/3
  const vf f = (vf)((vi)x - (e << 23)) - 1.f;
  vf p = set1(-1.28916830e-1f);
  p = p * f + 1.39844388e-1f;
  p = p * f - 1.21842615e-1f;
  p = p * f + 1.40058681e-1f;
  p = p * f - 1.66804880e-1f;
  p = p * f + 2.00104058e-1f;
  p = p * f - 2.49997973e-1f;
  p = p * f + 3.33332152e-1f;
  p = p * f - 0.5f;
  const vf y = __builtin_convertvector(e, vf) * 0.693147182f + (f * f * p + f);
  return x == x ? y : x;
}

// tanh after Cephes' tanhf (Moshier): an odd polynomial near 0, 1 - 2 / (exp(2 |x|) + 1) elsewhere.
SIMD_INLINE vf tanh(vf x) {
  const vf s = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const vf near = p * s * x + x;
  const vf size = (vf)((vu)x & 0x7fffffff);
  const vf far = 1.f - 2.f / (exp(size + size) + 1.f);
  const vf signed_far = (vf)((vu)far | ((vu)x & 0x80000000u));
  return size < 0.625f ? near : signed_far;
}

}  // namespace kernels::ISA
