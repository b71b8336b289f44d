// The one matrix product of attention, forward and backward:
//
//     C[r][n] (+)= sum_k A[r][k] B[k][n]      n runs along the vector, A is broadcast
//
// A and B are arrays of 32-bit steps: one float, or a pair of bfloat16 neighbours along k, which is
// what vdpbf16ps multiplies.  Broadcasting a step is the same instruction for both, so all loops
// are shared and only `Dot::multiply_add` differs.
#pragma once
#include "attention/cpu_fetch.h"
#include "common/cpu/simd.h"

namespace kernels::ISA::attention {

struct FloatDot {
  static constexpr int kPack = 1;  // values of k in a step
  __attribute__((always_inline)) static vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
  static constexpr int kPack = 2;
  __attribute__((always_inline)) static vf multiply_add(vf sum, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

enum class Write { kSet, kAdd, kScaledAdd };  // C = AB, C += AB, C = C * scale[n] + AB

// Strides are in steps (A, B) and floats (C).  B's columns lie side by side.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  const float* scale;          // [n], for kScaledAdd
  Fetcher* fetcher = nullptr;  // fetches what it holds meanwhile
};

// As many vectors of C at a time, and as many rows, as leave all sums in registers: of 32 (AVX-512)
// 24 hold sums, of 16 (AVX2, SSE) 12.
constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;
constexpr int rows_at_once(int vectors) {
  const int sums = kLanes == 16 ? 24 : 12;
  return vectors == 1 ? sums * 2 / 3 : sums / vectors;  // 16 or 8 rows: those of a strip
}

// kRows x kVectors sums stay in registers for the whole of k.  What was in C is added last, so that
// long sums are made of short ones, which rounds less.
template <class Dot, int kRows, int kVectors, Write write>
void tile(const Product& p, int64_t steps) {
  const float *a = p.a, *b = p.b;
  float* const to = p.c;
  const float* const scale = p.scale;
  const int64_t a_row = p.a_row, a_step = p.a_step, b_step = p.b_step, c_row = p.c_row;
  vf sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[r][v] = vf{};
  }
  auto step = [&]() __attribute__((always_inline)) {
    vf row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const vf x = set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[r][v] = Dot::multiply_add(sum[r][v], x, row[v]);
    }
    a += a_step;
    b += b_step;
  };
  int64_t k = 0;
  if constexpr (kVectors == kVectorsAtOnce) {
    if (p.fetcher && !p.fetcher->empty()) {
      Fetcher::Lines lines = p.fetcher->take(steps / kStepsPerLine);
      for (int n = 0; n < lines.count; n++) {
        __builtin_prefetch(lines.first, 0, 2);
        lines.first += lines.stride;
#pragma GCC unroll 1
        for (int i = 0; i < kStepsPerLine; i++) step();
      }
      k = lines.count * kStepsPerLine;
    }
  }
  for (; k < steps; k++) step();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      float* c = to + r * c_row + v * kLanes;
      if constexpr (write == Write::kSet) store(c, sum[r][v]);
      if constexpr (write == Write::kAdd) store(c, load(c) + sum[r][v]);
      if constexpr (write == Write::kScaledAdd) {
        store(c, load(c) * load(scale + v * kLanes) + sum[r][v]);
      }
    }
  }
}

// As many times kRows rows as there are.
template <class Dot, int kRows, int kVectors, Write write>
SIMD_INLINE void groups_of_rows(Product& p, int& rows, int64_t steps) {
  for (; rows >= kRows; rows -= kRows) {
    tile<Dot, kRows, kVectors, write>(p, steps);
    p.a += kRows * p.a_row;
    p.c += kRows * p.c_row;
  }
}

template <class Dot, int kVectors, Write write>
void rows_of(Product p, int rows, int64_t steps) {
  constexpr int kMost = rows_at_once(kVectors);
  groups_of_rows<Dot, kMost, kVectors, write>(p, rows, steps);
  if constexpr (kMost > 4) groups_of_rows<Dot, 4, kVectors, write>(p, rows, steps);
  groups_of_rows<Dot, 1, kVectors, write>(p, rows, steps);
}

// C is [rows, vectors * kLanes].
template <class Dot, Write write>
void matmul(Product p, int rows, int vectors, int64_t steps) {
  for (; vectors >= kVectorsAtOnce; vectors -= kVectorsAtOnce) {
    rows_of<Dot, kVectorsAtOnce, write>(p, rows, steps);
    p.b += kVectorsAtOnce * kLanes;
    p.c += kVectorsAtOnce * kLanes;
    if constexpr (write == Write::kScaledAdd) p.scale += kVectorsAtOnce * kLanes;
  }
  if constexpr (kVectorsAtOnce == 4) {
    if (vectors == 3) return rows_of<Dot, 3, write>(p, rows, steps);
    if (vectors == 2) return rows_of<Dot, 2, write>(p, rows, steps);
  }
  if (vectors == 1) rows_of<Dot, 1, write>(p, rows, steps);
}

}  // namespace kernels::ISA::attention
