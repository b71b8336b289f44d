// Portable SIMD for the CPU kernels: GCC/Clang vector extensions plus a few intrinsics.
//
// Every kernel source is compiled once per instruction set, with -DISA=<name> and that set's -m
// flags.  Everything here lives in `kernels::ISA`: inline functions of one name in two object files
// are merged by the linker, and without the namespace the baseline build could end up calling the
// AVX-512 copy.  For the same reason kernel sources instantiate no standard library templates.
//
// Arithmetic is written with the operators of the vector type; a * b + c becomes one FMA where the
// set has it (-ffp-contract=fast).  Intrinsics stand only where g++ 12 generates poor code from the
// generic form: 16-bit conversions, masked tails, horizontal sums, non-temporal stores.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/cpu/dtype.h"

#define SIMD_INLINE static inline __attribute__((always_inline))

namespace kernels::ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vu16 __attribute__((vector_size(2 * kLanes)));

SIMD_INLINE vf set1(float a) { return a - vf{}; }  // a + 0 would cost an addition: -0 + 0 is +0
SIMD_INLINE vi set1(int a) { return a - vi{}; }

SIMD_INLINE vf widen(vu16 h, BFloat16) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

SIMD_INLINE vu16 low_halves(vu u) {  // of each 32-bit lane; all lanes are below 65536
#if defined(__AVX512F__)
  return (vu16)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (vu16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(u, vu16);
#endif
}

// Rounds to nearest even and keeps subnormals, as torch does; vcvtneps2bf16 would flush them.
SIMD_INLINE vu16 narrow(vf x, BFloat16) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet_nan = vu{} + 0x7fc0;
  return low_halves(x == x ? rounded : quiet_nan);
}

SIMD_INLINE vf widen(vu16 h, Float16) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (vf)vcvt_f32_f16((float16x4_t)h);
#else
  vu u = __builtin_convertvector(h, vu);
  vu magnitude = (u & 0x7fff) << 13;
  vf x = (vf)magnitude * 0x1p112f;  // moves the exponent's bias; exact for subnormals too
  vu bits = (u & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000u) : (vu)x;  // inf and NaN
  return (vf)(bits | ((u & 0x8000) << 16));
#endif
}

SIMD_INLINE vu16 narrow(vf x, Float16) {
#if defined(__AVX512F__)
  return (vu16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vu16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (vu16)vcvt_f16_f32((float32x4_t)x);
#else
  // Adding a power of two whose unit in the last place is fp16's makes the float adder do the
  // rounding (the idea of M. Dukhan's FP16 library).
  vu u = (vu)x, magnitude = u & 0x7fffffff;
  vf scaled = ((vf)magnitude * 0x1p112f) * 0x1p-110f;  // overflows to inf beyond fp16's range
  vu exponent = magnitude & 0x7f800000u;
  exponent = exponent < 0x38800000u ? (vu{} + 0x38800000u) : exponent;  // fp16's smallest normal
  vu sum = (vu)((vf)(exponent + 0x07800000u) + scaled);
  vu finite = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  vu half = magnitude > 0x7f800000u ? (vu{} + 0x7e00) : finite;
  return __builtin_convertvector(((u >> 16) & 0x8000) | half, vu16);
#endif
}

// Loads and stores: memory holds T, registers always hold float.

SIMD_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
SIMD_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

template <class T>
SIMD_INLINE vf load(const T* p) {
  vu16 h;
  memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
SIMD_INLINE void store(T* p, vf x) {
  vu16 h = narrow(x, T{});
  memcpy(p, &h, sizeof h);
}

SIMD_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  int8_t x __attribute__((vector_size(kLanes)));
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vf);
#endif
}

// The first n lanes, 0 < n < kLanes: the others read as 0 and are not written.
SIMD_INLINE vf load_tail(const float* p, int n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  vf x{};
  memcpy(&x, p, n * sizeof *p);
  return x;
#endif
}
SIMD_INLINE vf load_tail(const int8_t* p, int n) {
  int8_t some[kLanes] = {};
  memcpy(some, p, n);
  return load(some);
}
SIMD_INLINE void store_tail(float* p, vf x, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
  memcpy(p, &x, n * sizeof *p);
#endif
}
template <class T>
SIMD_INLINE vf load_tail(const T* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return widen((vu16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), T{});
#else
  vu16 h{};
  memcpy(&h, p, n * sizeof *p);
  return widen(h, T{});
#endif
}
template <class T>
SIMD_INLINE void store_tail(T* p, vf x, int n) {
  vu16 h = narrow(x, T{});
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
  memcpy(p, &h, n * sizeof *p);
#endif
}

SIMD_INLINE vf zero_past(vf x, int n) {  // keeps the first n lanes
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), (__m512)x);
#else
  vf kept{};
  memcpy(&kept, &x, n * sizeof(float));
  return kept;
#endif
}

SIMD_INLINE vf fill_past(vf x, int n, float fill) {  // the same, the others read as `fill`
#if defined(__AVX512F__)
  return (vf)_mm512_mask_mov_ps((__m512)set1(fill), (__mmask16)((1u << n) - 1), (__m512)x);
#else
  vf kept = set1(fill);
  memcpy(&kept, &x, n * sizeof(float));
  return kept;
#endif
}

// Non-temporal stores do not read the line they overwrite; p is aligned to what is written.
SIMD_INLINE void stream(float* p, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
template <class T>
SIMD_INLINE void stream(T* p, vf x) {
  vu16 h = narrow(x, T{});
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)h);
#else
  memcpy(p, &h, sizeof h);
#endif
}
SIMD_INLINE void stream_fence() {  // orders them before whatever other threads do next
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Sum of the lanes; halves are folded together, so the order is fixed.
SIMD_INLINE float sum(vf x) {
#if defined(__AVX512F__)
  __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  __m128 quarter =
      _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  vf quarter = x;
#endif
  typedef float Float4 __attribute__((vector_size(16)));
  Float4 q = (Float4)quarter;
  return (q[0] + q[2]) + (q[1] + q[3]);
}

SIMD_INLINE float max_lane(vf x) {  // of lanes that are not NaN
#if defined(__AVX512F__)
  __m256 half =
      _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  __m128 quarter =
      _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  vf quarter = x;
#endif
  typedef float Float4 __attribute__((vector_size(16)));
  Float4 q = (Float4)quarter;
  const float a = q[0] > q[2] ? q[0] : q[2], b = q[1] > q[3] ? q[1] : q[3];
  return a > b ? a : b;
}

// Walking a row: f(i, lane count, unrolled slot) for each vector.  The count is `Full` except for
// the tail, a type of its own so that tail code is compiled out of the main loop.

struct Full {};
struct Tail {
  int n;
};

constexpr int kUnroll = 2;  // two accumulators for each of two rows hide an addition's latency

template <class F>
SIMD_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    f(i, Full{}, 0);
    f(i + kLanes, Full{}, 1);
  }
  for (; i + kLanes <= n; i += kLanes) f(i, Full{}, 0);
  if (i < n) f(i, Tail{int(n - i)}, 0);
}

template <class T>
SIMD_INLINE vf load(const T* p, Full) {
  return load(p);
}
template <class T>
SIMD_INLINE vf load(const T* p, Tail t) {
  return load_tail(p, t.n);
}
template <class T>
SIMD_INLINE void store(T* p, vf x, Full) {
  store(p, x);
}
template <class T>
SIMD_INLINE void store(T* p, vf x, Tail t) {
  store_tail(p, x, t.n);
}
SIMD_INLINE vf zero_past(vf x, Full) { return x; }
SIMD_INLINE vf zero_past(vf x, Tail t) { return zero_past(x, t.n); }
SIMD_INLINE vf fill_past(vf x, Full, float) { return x; }
SIMD_INLINE vf fill_past(vf x, Tail t, float fill) { return fill_past(x, t.n, fill); }

// Writes past the cache where asked; a tail always goes through it.
template <bool Stream, class T>
SIMD_INLINE void write(T* p, vf x, Full) {
  if constexpr (Stream) {
    stream(p, x);
  } else {
    store(p, x);
  }
}
template <bool Stream, class T>
SIMD_INLINE void write(T* p, vf x, Tail t) {
  store(p, x, t);
}

struct Accumulator {  // one partial sum per unrolled slot
  vf slot[kUnroll] = {};
  SIMD_INLINE float total(const Accumulator& a) { return sum(a.slot[0] + a.slot[1]); }
};

}  // namespace kernels::ISA
