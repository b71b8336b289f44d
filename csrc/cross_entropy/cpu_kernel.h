// Cross-entropy of rows of logits as they are, without any option that touches every class, in
// vectors of the compiled instruction set.  Math and shapes: kernels/cross_entropy/README.md.
// Threads and chunks: cpu.cpp.  Label smoothing, probabilities, softcap, scale: cpu_options.h.
//
// Forward takes a row in blocks that stay in L1.  Exponentials are relative to a reference, the
// maximum of the first block; only a block that exceeds it by more than kSlack is done again with
// a new one.  So nearly every logit is loaded, converted and exponentiated once, while the maximum
// rides along.
#pragma once
#include <cmath>

#include "common/cpu/exp.h"
#include "common/cpu/simd.h"
#include "cross_entropy/cpu.h"

namespace kernels::ISA::cross_entropy {

constexpr int64_t kBlock = 1024;
constexpr float kSlack = 8.f;     // exp(8) * 2^20 classes is far from overflow
constexpr int kRowsInFlight = 4;  // short rows that are done together

// Two vectors' worth of elements, for work on each of them that does not care which is where: of
// BFloat16 `even` has those of even numbers, as that takes one instruction a vector and no shuffle.
struct Pair {
  vf even, odd;
};

template <class T>
SIMD_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
SIMD_INLINE Pair load_pair(const BFloat16* p) {
  vu u;
  memcpy(&u, p, sizeof u);
  return {(vf)(u << 16), (vf)(u & 0xffff0000u)};
}

template <bool Stream, class T>
SIMD_INLINE void write_pair(T* p, Pair x) {
  write<Stream>(p, x.even, Full{});
  write<Stream>(p + kLanes, x.odd, Full{});
}
template <bool Stream>
SIMD_INLINE void write_pair(BFloat16* p, Pair x) {  // rounds as narrow() does
  const vu nan = vu{} + 0x7fc00000u, even = (vu)x.even, odd = (vu)x.odd;
  const vu low = x.even == x.even ? even + 0x7fff + ((even >> 16) & 1) : nan;
  const vu high = x.odd == x.odd ? odd + 0x7fff + ((odd >> 16) & 1) : nan;
  const vf both = (vf)((low >> 16) | (high & 0xffff0000u));
  write<Stream>(reinterpret_cast<float*>(p), both, Full{});
}

// f(vector, its lanes, slot) over x [n], in pairs while there are any.
template <class T, class F>
SIMD_INLINE void for_each_loaded(const T* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair v = load_pair(x + i);
    f(v.even, Full{}, 0);
    f(v.odd, Full{}, 1);
  }
  for (; i + kLanes <= n; i += kLanes) f(load(x + i), Full{}, 0);
  if (i < n) f(load(x + i, Tail{int(n - i)}), Tail{int(n - i)}, 0);
}

SIMD_INLINE float exp_one(float x) { return exp(set1(x))[0]; }

// ---- forward ----

// Sums over some classes c of a row; all zero, and `top` -inf, for no classes.
struct Partial {
  float top = -INFINITY;             // the reference, at most kSlack below the largest logit
  double sum = 0;                    // of exp(x_c - top)
  double weights = 0, weighted = 0;  // of k_c = q'_c w_c, and of k_c x_c
};

// `p` and the classes after it.
SIMD_INLINE void combine(Partial& p, const Partial& next) {
  const float top = next.top > p.top ? next.top : p.top;
  auto scaled = [&](const Partial& part) {  // a part of nothing but -inf adds 0, or NaN
    return part.top == top || part.top == -INFINITY ? part.sum
                                                    : part.sum * double(exp_one(part.top - top));
  };
  p = {top, scaled(p) + scaled(next), p.weights + next.weights, p.weighted + next.weighted};
}

// A row of nothing but -inf is taken relative to 0: exp(-inf - 0) adds nothing.
SIMD_INLINE float reference_of(float top) { return top == -INFINITY ? 0.f : top; }

template <class T>
SIMD_INLINE float block_max(const T* x, int64_t n) {
  vf top[kUnroll];
  for (vf& v : top) v = set1(-INFINITY);
  for_each_loaded(
      x, n, [&](vf v, auto lanes, int u) { top[u] = max(top[u], fill_past(v, lanes, -INFINITY)); });
  return max_lane(max(top[0], top[1]));
}

// The sum of exp(x_c - reference), with the largest logit on the way.
template <class T>
SIMD_INLINE float sum_and_max(const T* x, int64_t n, float reference, float* largest) {
  vf top[kUnroll];
  for (vf& v : top) v = set1(-INFINITY);
  Accumulator sum;
  const char* ahead = reinterpret_cast<const char*>(x + kBlock);
  for_each_loaded(x, n, [&](vf x_c, auto lanes, int u) {
    if (sizeof(T) == sizeof(float) || u == 0) {  // the hardware stops at each page of 4 KiB
      __builtin_prefetch(ahead);
      ahead += 64;
    }
    const vf v = fill_past(x_c, lanes, -INFINITY);
    top[u] = max(top[u], v);
    sum.slot[u] += exp_share(v - reference);
  });
  *largest = max_lane(max(top[0], top[1]));
  return Accumulator::total(sum);
}

// Adds the block x [n] to `p`.
template <class T>
void add_block(Partial& p, const T* x, int64_t n) {
  if (p.top == -INFINITY) p.top = block_max(x, n);  // the first, or nothing but -inf so far
  for (;;) {
    float largest;
    const float sum = sum_and_max(x, n, reference_of(p.top), &largest);
    if (!(largest > p.top + kSlack)) {
      p.sum += double(sum);
      return;
    }
    p.sum *= double(exp_one(p.top - largest));
    p.top = largest;
  }
}

// The sums of x [n].
template <class T>
Partial row_partial(const void* row, int64_t n) {
  const T* x = static_cast<const T*>(row);
  Partial p;
  for (int64_t b = 0; b < n; b += kBlock) add_block(p, x + b, n - b < kBlock ? n - b : kBlock);
  return p;
}

// f(row, vector, its lanes, slot) over kRowsInFlight rows, `stride` apart, of x [n].
template <class T, class F>
SIMD_INLINE void for_each_loaded_of_rows(const T* x, int64_t stride, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowsInFlight; r++) {
      const Pair v = load_pair(x + r * stride + i);
      f(r, v.even, Full{}, 0);
      f(r, v.odd, Full{}, 1);
    }
  }
  for (; i < n; i += kLanes) {
    const Tail lanes{int(n - i < kLanes ? n - i : kLanes)};
#pragma GCC unroll 4
    for (int r = 0; r < kRowsInFlight; r++) f(r, load(x + r * stride + i, lanes), lanes, 0);
  }
}

// The maximum and the sum of exp(x_c - maximum) of each of kRowsInFlight rows of at most kBlock
// classes, `stride` elements apart: their chains of dependent operations overlap.
template <class T>
void short_rows(const void* rows, int64_t stride, int64_t n, float* maxima, float* sums) {
  const T* x = static_cast<const T*>(rows);
  vf top[kRowsInFlight][kUnroll];
#pragma GCC unroll 4
  for (auto& row : top) row[0] = row[1] = set1(-INFINITY);
  for_each_loaded_of_rows(x, stride, n, [&](int r, vf v, auto lanes, int u) {
    top[r][u] = max(top[r][u], fill_past(v, lanes, -INFINITY));
  });
  float reference[kRowsInFlight];
#pragma GCC unroll 4
  for (int r = 0; r < kRowsInFlight; r++) {
    maxima[r] = max_lane(max(top[r][0], top[r][1]));
    reference[r] = reference_of(maxima[r]);
  }
  Accumulator sum[kRowsInFlight];
  for_each_loaded_of_rows(x, stride, n, [&](int r, vf v, auto lanes, int u) {
    sum[r].slot[u] += exp_share(fill_past(v, lanes, -INFINITY) - reference[r]);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRowsInFlight; r++) sums[r] = Accumulator::total(sum[r]);
}

// ---- backward ----

// dx_c = slope * exp(x_c - lse) - scale * k_c, less `on` at the target's class: what is the same
// for all classes of a row.
struct Row {
  float lse, rest;  // the two parts of lse
  float slope;
  float scale;     // dlosses
  float others;    // slope, less what the target's class has besides
  int64_t target;  // -1 where there is none
  bool zero;       // ignored, and no gradient of lse
};

// Gradients of `count` rows, described by `r`, of n classes; the strides are those of the rows.
template <bool Stream, class T>
void row_gradients(const void* rows, int64_t stride, void* gradients, int64_t gradient_stride,
                   int64_t n, const Row* r, int64_t count) {
  const T* x = static_cast<const T*>(rows);
  T* dx = static_cast<T*>(gradients);
  for (const Row* end = r + count; r < end; r++, x += stride, dx += gradient_stride) {
    const float lse = r->lse, rest = r->rest, slope = r->slope;
    auto gradient = [&](vf v) { return exp_share((v - lse) - rest) * slope; };
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair v = load_pair(x + i);
      write_pair<Stream>(dx + i, {gradient(v.even), gradient(v.odd)});
    }
    for (; i < n; i += kLanes) {
      const Tail lanes{int(n - i < kLanes ? n - i : kLanes)};
      store(dx + i, gradient(load(x + i, lanes)), lanes);
    }
  }
  if constexpr (Stream) stream_fence();  // before anything is written over
}

// The same at the target's class, where a probability near 1 cancels against the rest, and a small
// one, of a target that counts for little, would drown in `others`; k is scale * k_c.  Every
// argument may be of a row a lane.
SIMD_INLINE vf gradient_at_target(vf x, vf lse, vf rest, vf slope, vf others, vf k) {
  const vf log_probability = (x - lse) - rest;
  const vf near = exp_minus_1(log_probability) * slope + (others - k);
  const vf far = (exp(log_probability) * slope - k) - (slope - others);
  return log_probability < -1.f ? far : near;
}
SIMD_INLINE float gradient_at_target(float x, const Row& r, float k) {
  return gradient_at_target(set1(x), set1(r.lse), set1(r.rest), set1(r.slope), set1(r.others),
                            set1(k))[0];
}

// ---- a row of any dtype ----

SIMD_INLINE float to_float(float x) { return x; }
template <class T>
SIMD_INLINE float to_float(T x) {
  return widen(vu16{} + x.bits, T{})[0];
}

// out[r] = element at[r] of row r, 0 where at[r] is negative.
template <class T>
void elements(const void* rows, int64_t stride, const int64_t* at, int count, float* out) {
  const T* x = static_cast<const T*>(rows);
  for (int r = 0; r < count; r++) out[r] = at[r] < 0 ? 0.f : to_float(x[r * stride + at[r]]);
}

template <class T>
void row_to_float(const void* row, int64_t n, float* out) {
  const T* x = static_cast<const T*>(row);
  for_each_vector(n,
                  [&](int64_t i, auto lanes, int) { store(out + i, load(x + i, lanes), lanes); });
}

template <class T>
void row_from_float(const float* x, int64_t n, void* row) {
  T* out = static_cast<T*>(row);
  for_each_vector(n,
                  [&](int64_t i, auto lanes, int) { store(out + i, load(x + i, lanes), lanes); });
}

// All that is compiled for each dtype; everything else calls it, a row or a block at a time.
struct RowKernels {
  int64_t element_size;
  Partial (*partial)(const void* row, int64_t n);
  void (*short_rows)(const void* rows, int64_t stride, int64_t n, float* maxima, float* sums);
  decltype(&row_gradients<false, float>) gradients, streamed_gradients;
  void (*elements)(const void* rows, int64_t stride, const int64_t* at, int count, float* out);
  void (*to_float)(const void* row, int64_t n, float* out);
  void (*from_float)(const float* x, int64_t n, void* row);
};

template <class T>
constexpr RowKernels kRowKernels = {
    sizeof(T),   row_partial<T>,  short_rows<T>,    row_gradients<false, T>, row_gradients<true, T>,
    elements<T>, row_to_float<T>, row_from_float<T>};

inline float element(const RowKernels& kernels, const void* row, int64_t at) {
  float x;
  kernels.elements(row, 0, &at, 1, &x);
  return x;
}

inline const RowKernels& row_kernels(DType dtype) {
  const RowKernels* kernels = nullptr;
  dispatch_float(dtype, [&](auto t) { kernels = &kRowKernels<decltype(t)>; });
  return *kernels;
}

}  // namespace kernels::ISA::cross_entropy
