// Rows of activations as the values that are multiplied: int8 by a scale, or floats.
// The rule of quantisation: kernels/int8_matmul/README.md.
#pragma once
#include <cmath>

#include "int8_matmul/cpu_arithmetic.h"

namespace kernels::ISA::int8_matmul {

struct Scaling {
  float inverse;  // what values are multiplied by before they are rounded
  float scale;    // what one step of the rounded values stands for
};

constexpr uint32_t kInfinity = 0x7f800000;  // the bits of NaN without the sign are larger still

// Where any value is NaN or infinite the scale is NaN, and so is all that is computed of the row.
inline Scaling scaling_of(uint32_t largest_bits) {
  float largest;
  memcpy(&largest, &largest_bits, sizeof largest);
  if (largest_bits >= kInfinity) return {0.f, NAN};
  if (largest < 0x1p-120f) return {0.f, 1.f};
  return {127.f / largest, largest / 127.f};
}

SIMD_INLINE vi larger(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// The largest magnitude of n values, as the bits of a float.
template <class T>
uint32_t largest_bits(const T* x, int64_t n) {
  vi top[kUnroll] = {};
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
    top[u] = larger(top[u], (vi)load(x + i, lanes) & 0x7fffffff);
  });
  const vi both = larger(top[0], top[1]);
  int32_t largest = 0;
  for (int i = 0; i < kLanes; i++) largest = both[i] > largest ? both[i] : largest;
  return uint32_t(largest);
}

// The nearest integers to x, ties to even.
SIMD_INLINE vi rounded(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
  return (vi)vcvtnq_s32_f32((float32x4_t)x);
#else
  vi y;
  for (int i = 0; i < kLanes; i++) y[i] = int32_t(__builtin_rintf(x[i]));
  return y;
#endif
}

// Within +-127; the product is rounded to a float first, as every backend does.
SIMD_INLINE vi quantized(vf x, vf inverse) {
  return rounded(min(max(x * inverse, set1(-127.f)), set1(127.f)));
}

// The low bytes of all lanes; each is within the range of the type.
SIMD_INLINE void store_integers(int8_t* p, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32((__m128i)x, (__m128i)x);
  const __m128i bytes = _mm_packs_epi16(words, words);
  memcpy(p, &bytes, 4);
#else
  for (int i = 0; i < kLanes; i++) p[i] = int8_t(x[i]);
#endif
}
SIMD_INLINE void store_integers(uint8_t* p, vi x) {
  store_integers(reinterpret_cast<int8_t*>(p), x);
}
SIMD_INLINE void store_integers(int16_t* p, vi x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storeu_si128((__m128i*)p, words);
#elif defined(__SSE2__) && !defined(__AVX512F__)
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32((__m128i)x, (__m128i)x));
#else
  for (int i = 0; i < kLanes; i++) p[i] = int16_t(x[i]);
#endif
}

// n values of a row as integers, `offset` added to each.
template <class T, class Integer>
SIMD_INLINE void quantize(const T* x, int64_t n, float inverse, int offset, Integer* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store_integers(out + i, quantized(load(x + i), set1(inverse)) + offset);
  }
  if (i < n) {
    Integer some[kLanes];
    store_integers(some, quantized(load_tail(x + i, int(n - i)), set1(inverse)) + offset);
    memcpy(out + i, some, size_t(n - i) * sizeof *out);
  }
}

// n <= kValues values of a row as arithmetic A multiplies them; the rest of kValues is 0.
template <class A, class T>
SIMD_INLINE void convert(const T* x, int64_t n, float inverse, typename A::Value* out) {
  using Value = typename A::Value;
  if (n < kValues<A>) memset(out, 0, kValues<A> * sizeof(Value));
  if constexpr (sizeof(T) == 1) {
    for (int64_t i = 0; i < n; i++) out[i] = Value(x[i] + A::kOffset);
  } else if constexpr (sizeof(Value) == sizeof(float)) {
    n < kValues<A> ? store_tail(out, load_tail(x, int(n)), int(n)) : store(out, load(x));
  } else {
    quantize(x, n, inverse, A::kOffset, out);
  }
}

}  // namespace kernels::ISA::int8_matmul
