// The products of int8 matmul, by instruction set, on operands that are read in steps of 4 bytes.
//
// A step is one operand's values of kStep neighbouring columns of the sum's dimension K: four bytes
// where the set has vpdpbusd or sdot, two int16 elsewhere, one float for weights alone.  One vector
// holds a step of kLanes rows, or kLanes steps of one row; either way `multiply_add` adds every
// lane's products to that lane's sum.
#pragma once
#include "common/cpu/exp.h"
#include "common/cpu/simd.h"

namespace kernels::ISA::int8_matmul {

// Integers: exact for all values, -128 included, to the 32 bits of the sums.
struct Integers {
  using Sum = int32_t;
  using Sums = vi;
  static constexpr int64_t kMostTerms = int64_t{1} << 40;  // of a sum before others are added
#if defined(__AVX512VNNI__)
  // vpdpbusd takes unsigned times signed: activations lie in memory as q + 128, and 128 times the
  // sum of the weights is taken off again.
  static constexpr int kStep = 4, kOffset = 128;
  // Rows that are multiplied without groups: of few in all, and of those left over beside groups.
  static constexpr int kMostSingles = 24, kMostSinglesLeft = 12;
  static constexpr int kPiece = 4096;  // of K at a time: a panel of x stays in L2
  using Value = uint8_t;
  using Weight = int8_t;
  SIMD_INLINE vi multiply_add(vi sum, vi x, vi w) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kStep = 4, kOffset = 0;
  static constexpr int kMostSingles = kLanes, kMostSinglesLeft = kLanes / 4;
  static constexpr int kPiece = 4096;
  using Value = int8_t;
  using Weight = int8_t;
  SIMD_INLINE vi multiply_add(vi sum, vi x, vi w) {  // sdot: signed times signed
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
  }
#else
  // vpmaddubsw, the instruction for bytes, would saturate; pmaddwd on int16 cannot.
  static constexpr int kStep = 2, kOffset = 0;
  static constexpr int kMostSingles = kLanes, kMostSinglesLeft = kLanes / 4;
  static constexpr int kPiece = 2048;
  using Value = int16_t;
  using Weight = int16_t;
  SIMD_INLINE vi multiply_add(vi sum, vi x, vi w) {
#if defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return sum + (x << 16 >> 16) * (w << 16 >> 16) + (x >> 16) * (w >> 16);
#endif
  }
#endif
};

struct Floats {
  using Sum = float;
  using Sums = vf;
  static constexpr int kStep = 1, kOffset = 0;
  static constexpr int kMostSingles = kLanes, kMostSinglesLeft = kLanes / 4;
  static constexpr int kPiece = 256;  // of sums that are short, errors of rounding stay small
  static constexpr int64_t kMostTerms = 256 * kLanes;
  using Value = float;
  using Weight = float;
  SIMD_INLINE vf multiply_add(vf sum, vf x, vf w) { return sum + x * w; }
};

template <class A>
constexpr int kValues = kLanes * A::kStep;  // in a vector

template <class Vector>
SIMD_INLINE Vector load_vector(const void* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class Vector>
SIMD_INLINE void store_vector(void* p, Vector x) {
  memcpy(p, &x, sizeof x);
}

// The step at p in every lane.
SIMD_INLINE vi broadcast_step(const void* p, vi) {
  int32_t step;
  memcpy(&step, p, sizeof step);
  return set1(step);
}
SIMD_INLINE vf broadcast_step(const void* p, vf) {
  float step;
  memcpy(&step, p, sizeof step);
  return set1(step);
}

// kValues neighbouring weights of one row.
template <class A>
SIMD_INLINE typename A::Sums load_weights(const int8_t* p) {
  if constexpr (sizeof(typename A::Weight) == sizeof(float)) {
    return load(p);
  } else if constexpr (sizeof(typename A::Weight) == 1) {
    return load_vector<vi>(p);
  } else {
#if defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return (vi)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#else
    int16_t wide[kValues<A>];
    for (int i = 0; i < kValues<A>; i++) wide[i] = p[i];
    return load_vector<vi>(wide);
#endif
  }
}

// The first n < kValues of them, the others 0.
template <class A>
SIMD_INLINE typename A::Sums load_some_weights(const int8_t* p, int64_t n) {
  int8_t some[kValues<A>] = {};
  memcpy(some, p, size_t(n));
  return load_weights<A>(some);
}

// One step of kLanes neighbouring columns, [column][kStep]: kStep rows of weights, `stride` apart.
template <class A>
SIMD_INLINE typename A::Sums interleave_weights(const int8_t* p, int64_t stride) {
  if constexpr (A::kStep == 1) {
    return load(p);
  } else {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes row[A::kStep];
    for (int i = 0; i < A::kStep; i++) memcpy(&row[i], p + i * stride, kLanes);
#if defined(__AVX512VNNI__)
    const auto even = __m128i(row[0]), odd = __m128i(row[1]);
    const auto third = __m128i(row[2]), fourth = __m128i(row[3]);
    const __m128i low = _mm_unpacklo_epi8(even, odd), high = _mm_unpackhi_epi8(even, odd);
    const __m128i low2 = _mm_unpacklo_epi8(third, fourth), high2 = _mm_unpackhi_epi8(third, fourth);
    const __m256i first =
        _mm256_set_m128i(_mm_unpackhi_epi16(low, low2), _mm_unpacklo_epi16(low, low2));
    const __m256i second =
        _mm256_set_m128i(_mm_unpackhi_epi16(high, high2), _mm_unpacklo_epi16(high, high2));
    return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#else
    typename A::Weight steps[kLanes][A::kStep];
    for (int i = 0; i < kLanes; i++) {
      for (int k = 0; k < A::kStep; k++) steps[i][k] = row[k][i];
    }
    return load_vector<vi>(steps);
#endif
  }
}

// The same of the first n columns and `rows` rows, the others 0.
template <class A>
SIMD_INLINE typename A::Sums interleave_some_weights(const int8_t* p, int64_t stride, int n,
                                                     int64_t rows) {
  int8_t some[A::kStep][kLanes] = {};
  for (int64_t i = 0; i < A::kStep && i < rows; i++) memcpy(some[i], p + i * stride, size_t(n));
  return interleave_weights<A>(some[0], kLanes);
}

}  // namespace kernels::ISA::int8_matmul
