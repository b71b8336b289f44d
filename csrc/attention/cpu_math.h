// exp, tanh and random bits for attention, in vectors of the compiled instruction set.
#pragma once
#include <cmath>

#include "common/cpu/exp.h"
#include "common/cpu/simd.h"

namespace kernels::ISA::attention {

SIMD_INLINE vi lane_numbers() {
  vi lane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane;
}

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
SIMD_INLINE Doubles to_doubles(vf x) { return __builtin_convertvector(x, Doubles); }

// a * b rounded, whatever is done to it next.  FMA would keep what a row's maximum, a rounded
// product, has lost, 2^-24 of it: beyond 2^31 more than exp takes.
SIMD_INLINE vf rounded_product(vf a, vf b) {
  vf product = a * b;
#if defined(__FMA__)
  asm("" : "+v"(product));
#endif
  return product;
}

// e^x for x <= 0 or little above: 0 below -87.3, where results would be subnormal; NaN for NaN.
// Relative error 2e-7, for a fifth fewer operations than exp takes.  Without FMA it would be more.
//
// e^x = 2^(n + f) with the integer n nearest to x log2(e): adding 1.5 * 2^23 leaves n in the low
// mantissa bits.  The polynomial is the minimax of 2^f on [-1/2, 1/2] among those that are 1 at 0,
// so that e^0 is.
SIMD_INLINE vf exp_nonpositive(vf x) {
#if !defined(__FMA__)
  return exp(x);
#else
  const vf magic = set1(12582912.f), log2e = set1(1.44269504088896341f), smallest = set1(-87.3f);
  const vf t = x * log2e + magic, n = t - magic;
  const vf f = x * log2e - n;
  vf p = set1(1.326472731e-3f);
  p = p * f + set1(9.671512991e-3f);
  p = p * f + set1(5.550733581e-2f);
  p = p * f + set1(2.402224243e-1f);
  p = p * f + set1(6.931470037e-1f);
  p = p * f + set1(1.f);
#if defined(__AVX512F__)
  // Masked lanes are spared the 200 cycles that a result too small costs; NaN is not less.
  const __mmask16 large = _mm512_cmp_ps_mask((__m512)x, (__m512)smallest, _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(large, (__m512)p, (__m512)n);
#else
  const vf y = (vf)((vi)p + ((vi)t << 23));  // n into the exponent
  const vf finite = x < smallest ? vf{} : y;
  return x == x ? finite : x;
#endif
#endif
}

// The high and low halves of the 64-bit products of each lane with m.
struct WideProduct {
  vu high, low;
};
SIMD_INLINE WideProduct multiply_wide(vu a, uint32_t m) {
#if defined(__AVX512F__)
  const __m512i b = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32((__m512i)a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), b);
  return {(vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd),
          (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
#elif defined(__AVX2__)
  const __m256i b = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32((__m256i)a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), b);
  return {(vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  WideProduct p;
  for (int i = 0; i < kLanes; i++) {
    const uint64_t product = uint64_t(a[i]) * m;
    p.high[i] = uint32_t(product >> 32);
    p.low[i] = uint32_t(product);
  }
  return p;
#endif
}

struct Random {
  vu word[4];
};

// Philox4x32-10: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
SIMD_INLINE Random philox(uint64_t seed, vu c0, uint32_t c1, uint32_t c2) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  vu x0 = c0, x1 = vu{} + c1, x2 = vu{} + c2, x3{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const WideProduct first = multiply_wide(x0, 0xd2511f53u),
                      second = multiply_wide(x2, 0xcd9e8d57u);
    x0 = second.high ^ x1 ^ k0;
    x1 = second.low;
    x2 = first.high ^ x3 ^ k1;
    x3 = first.low;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace kernels::ISA::attention
