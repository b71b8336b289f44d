// Layer norm of one row, or of one chunk of a long row, in vectors of the compiled instruction set.
// Math and shapes: kernels/layer_norm/README.md.  Threads, groups and chunks: cpu.cpp.
#pragma once
#include <cmath>

#include "common/cpu/simd.h"
#include "layer_norm/cpu.h"

namespace kernels::ISA::layer_norm {

// Converts n values of T to float.
template <class T>
SIMD_INLINE void to_float(const T* from, float* to, int64_t n) {
  for_each_vector(n,
                  [&](int64_t i, auto lanes, int) { store(to + i, load(from + i, lanes), lanes); });
}

// Statistics go over kRows rows at a time where there are as many: the long chains of dependent
// operations between the sweeps (adding up lanes, dividing, the square root) then overlap.

// total[r] = sum of row r; x is [kRows, n].  With `wide` [kRows, n] the rows are widened into it on
// the way, so that the next sweeps need no conversion.
template <int kRows, bool Widen, class T>
SIMD_INLINE void row_sums(const T* x, int64_t n, float* wide, float* total) {
  Accumulator a[kRows];
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const vf v = load(x + r * n + i, lanes);
      if constexpr (Widen) store(wide + r * n + i, v, lanes);
      a[r].slot[u] += v;
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) total[r] = Accumulator::total(a[r]);
}

struct Deviations {  // of a row from a first estimate of its mean
  float sum;         // what the estimate's rounding left over
  float squares;     // sum of squares
};

template <int kRows, class T>
SIMD_INLINE void row_deviations(const T* x, int64_t n, const float* estimate, Deviations* out) {
  Accumulator sum[kRows], squares[kRows];
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      // Past the row a lane would hold 0 - estimate.
      const vf d = zero_past(load(x + r * n + i, lanes) - estimate[r], lanes);
      sum[r].slot[u] += d;
      squares[r].slot[u] += d * d;
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) {
    out[r] = {Accumulator::total(sum[r]), Accumulator::total(squares[r])};
  }
}

// y = (x - mean) * rstd * weight + bias.  U is T, or float where the row was widened.  `next` is
// what will be read after this row.
template <bool Stream, class U, class T>
SIMD_INLINE void row_output(const U* x, int64_t n, float mean, float rstd, const float* weight,
                            const float* bias, T* y, const T* next) {
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    __builtin_prefetch(next + i);  // rows are too short for the hardware to run ahead
    const vf xhat = (load(x + i, lanes) - mean) * rstd;
    write<Stream>(y + i, xhat * load(weight + i, lanes) + load(bias + i, lanes), lanes);
  });
}

struct RowSums {
  float dxhat;       // sum of dxhat = dy * weight
  float dxhat_xhat;  // sum of dxhat * xhat
};

// One sweep over dy and x: the two sums that dx needs, and this row's share of dweight and dbias.
// `dxhat` [n] is kept for row_dx: recomputed there it could be contracted into an FMA, and then
// differ from what was summed, which a row of one column or of equal values would show.
template <bool WithSums, bool WithParameters, class T>
SIMD_INLINE RowSums row_gradient_sums(const T* dy, const T* x, int64_t n, float mean, float rstd,
                                      const float* weight, float* dxhat, float* dweight,
                                      float* dbias) {
  vf sum_dxhat{}, sum_dxhat_xhat{};
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf d = load(dy + i, lanes);  // 0 past the row, and so are all products
    const vf xhat = (load(x + i, lanes) - mean) * rstd;
    if constexpr (WithParameters) {
      store(dweight + i, load(dweight + i, lanes) + d * xhat, lanes);
      store(dbias + i, load(dbias + i, lanes) + d, lanes);
    }
    if constexpr (WithSums) {
      const vf g = d * load(weight + i, lanes);
      store(dxhat + i, g, lanes);
      sum_dxhat += g;
      sum_dxhat_xhat += g * xhat;
    }
  });
  return WithSums ? RowSums{sum(sum_dxhat), sum(sum_dxhat_xhat)} : RowSums{};
}

// dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)).  next_dy and next_x will be read
// after this row.
template <bool Stream, class T>
SIMD_INLINE void row_dx(const float* dxhat, const T* x, int64_t n, float mean, float rstd,
                        float mean_dxhat, float mean_dxhat_xhat, T* dx, const T* next_dy,
                        const T* next_x) {
  const float slope = rstd * mean_dxhat_xhat;
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    __builtin_prefetch(next_dy + i);
    __builtin_prefetch(next_x + i);
    const vf centred = load(dxhat + i, lanes) - mean_dxhat;
    write<Stream>(dx + i, (centred - (load(x + i, lanes) - mean) * slope) * rstd, lanes);
  });
}

}  // namespace kernels::ISA::layer_norm
