// Rows of floats as fixed-point numbers of four bytes: weights alone times few rows, by vpdpbusd.
//
// A row is scaled by a power of two so that its largest value lies within +-2^30, rounded to
// integers, and 2^31 is added; the bytes of these numbers are four rows of unsigned values, whose
// products with the weights are summed exactly.  Four bytes of a float's product then take four
// multiplications of 64 weights each, where float arithmetic takes twelve instructions to widen,
// convert and multiply them.
//
// Values within 1/128 of the largest stay as they are; smaller ones are off by up to 2^-31 of the
// largest, an error that floats' sums have as well, for what they are added to is rounded to 2^-24.
// A row fits if at least half of its values but zeros are above 2^-10 of the largest; others, and
// those with a NaN or an infinity, are left to float arithmetic.
#pragma once
#include "int8_matmul/cpu_quantize.h"

namespace kernels::ISA::int8_matmul {

constexpr int64_t kMostFixedPointTerms = 65536;  // 255 * 128 times that fits in an int32

struct FixedPoint {
  bool fits;
  float multiplier;  // a power of two
  float unit;        // its inverse
};

template <class T>
[[gnu::noinline]] FixedPoint fixed_point_of(const T* x, int64_t n) {
  const uint32_t largest = largest_bits(x, n), exponent = largest >> 23;
  constexpr uint32_t kLeast = 40, kMost = 240;  // so that both powers are normal numbers
  if (exponent < kLeast || exponent > kMost) return {false, 0.f, 0.f};
  // The largest is below 2^(exponent - 126).
  const uint32_t multiplier = (283 - exponent) << 23, unit = (exponent - 29) << 23;
  const vi least = set1(int(largest - (10u << 23)));  // as bits
  vi large{}, other{};
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vi magnitude = (vi)load(x + i, lanes) & 0x7fffffff;
    large -= magnitude >= least;
    other -= (magnitude < least) & (magnitude != 0);
  });
  int64_t balance = 0;
  for (int i = 0; i < kLanes; i++) balance += large[i] - other[i];
  FixedPoint f{balance >= 0, 0.f, 0.f};
  memcpy(&f.multiplier, &multiplier, sizeof multiplier);
  memcpy(&f.unit, &unit, sizeof unit);
  return f;
}

// The bytes of n numbers, the lowest first, as rows `length` apart.
template <class T>
[[gnu::noinline]] void split_into_bytes(const T* x, int64_t n, float multiplier, uint8_t* out,
                                        int64_t length) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? int(n - i) : kLanes;
    const vf values = count < kLanes ? load_tail(x + i, count) : load(x + i);
    vu number = (vu)rounded(values * multiplier) ^ 0x80000000u;
    for (int byte = 0; byte < 4; byte++) {
      uint8_t some[kLanes];
      store_integers(some, (vi)number);
      memcpy(out + byte * length + i, some, size_t(count));
      number >>= 8;
    }
  }
}

// The products of n columns with a row: sums [4][stride] of its bytes, and of the weights.
inline void combine_bytes(const int32_t* sums, int64_t stride, const int32_t* of_weights, int n,
                          float unit, float* products) {
  for (int i = 0; i < n; i++) {
    const int64_t total = int64_t{sums[i]} + (int64_t{sums[stride + i]} << 8) +
                          (int64_t{sums[2 * stride + i]} << 16) +
                          (int64_t{sums[3 * stride + i]} << 24) - (int64_t{of_weights[i]} << 31);
    products[i] = float(double(total) * double(unit));
  }
}

}  // namespace kernels::ISA::int8_matmul
