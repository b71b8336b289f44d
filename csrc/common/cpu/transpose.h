// kLanes vectors of kLanes lanes in registers: transposed, and summed up.
#pragma once
#include <utility>

#include "common/cpu/simd.h"

namespace kernels::ISA {

using Lanes = std::make_integer_sequence<int, kLanes>;

// Swaps, in pairs of vectors kHalf apart, the lanes above the first kHalf of every 2 kHalf of one
// with those below of the other.
template <int kHalf, class Vector, int... lane>
SIMD_INLINE void swap_lanes(Vector& a, Vector& b, std::integer_sequence<int, lane...>) {
  const Vector x = a, y = b;
  a = __builtin_shufflevector(x, y, (lane & kHalf ? kLanes + lane - kHalf : lane)...);
  b = __builtin_shufflevector(x, y, (lane & kHalf ? kLanes + lane : lane + kHalf)...);
}

// Across the diagonal.
template <int kHalf = kLanes / 2, class Vector>
SIMD_INLINE void transpose(Vector (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (!(i & kHalf)) swap_lanes<kHalf>(x[i], x[i + kHalf], Lanes());
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(x);
}

// The sum of all lanes of x[i] in lane i; x is used up.
template <int kHalf = kLanes / 2, class Vector>
SIMD_INLINE Vector sums_of(Vector (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; i++) {
    swap_lanes<kHalf>(x[i], x[i + kHalf], Lanes());
    x[i] += x[i + kHalf];
  }
  if constexpr (kHalf > 1) return sums_of<kHalf / 2>(x);
  return x[0];
}

}  // namespace kernels::ISA
