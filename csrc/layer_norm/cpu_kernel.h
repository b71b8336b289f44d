// Layer norm of one row, or of one chunk of a long row, in vectors of the compiled instruction set.
// Math and shapes: kernels/layer_norm/README.md.  Threads, groups and chunks: cpu.cpp.
#pragma once
#include <cmath>

#include "common/cpu/simd.h"
#include "layer_norm/cpu.h"

namespace kernels::ISA::layer_norm {

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

// Converts n values of T to float.
template <class T>
SIMD_INLINE void to_float(const T* from, float* to, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes, int) { store(to + i, load(from + i, lanes), lanes); });
}

template <class T>
SIMD_INLINE float row_sum(const T* x, int64_t n) {
  Accumulator a;
  for_each_vector(n, [&](int64_t i, auto lanes, int u) { a.slot[u] += load(x + i, lanes); });
  return Accumulator::total(a);
}

// Widens a 16-bit row into `wide` on the way, so that the next sweeps need no conversion.
template <class T>
SIMD_INLINE float row_sum(const T* x, int64_t n, float* wide) {
  Accumulator a;
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
    const vf v = load(x + i, lanes);
    store(wide + i, v, lanes);
    a.slot[u] += v;
  });
  return Accumulator::total(a);
}

struct Deviations {  // of a row from a first estimate of its mean
  float sum;      // what the estimate's rounding left over
  float squares;  // sum of squares
};

template <class T>
SIMD_INLINE Deviations row_deviations(const T* x, int64_t n, float estimate) {
  Accumulator sum, squares;
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
    const vf d = zero_past(load(x + i, lanes) - estimate, lanes);  // past the row: 0 - estimate
    sum.slot[u] += d;
    squares.slot[u] += d * d;
  });
  return {Accumulator::total(sum), Accumulator::total(squares)};
}

// y = (x - mean) * rstd * weight + bias.  U is T, or float where the row was widened.
template <bool Stream, class U, class T>
SIMD_INLINE void row_output(const U* x, int64_t n, float mean, float rstd, const float* weight,
                            const float* bias, T* y) {
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
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

// dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
template <bool Stream, class T>
SIMD_INLINE void row_dx(const float* dxhat, const T* x, int64_t n, float mean, float rstd,
                        float mean_dxhat, float mean_dxhat_xhat, T* dx) {
  const float slope = rstd * mean_dxhat_xhat;
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf centred = load(dxhat + i, lanes) - mean_dxhat;
    write<Stream>(dx + i, (centred - (load(x + i, lanes) - mean) * slope) * rstd, lanes);
  });
}

}  // namespace kernels::ISA::layer_norm
