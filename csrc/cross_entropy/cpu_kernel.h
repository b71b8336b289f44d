// Cross-entropy of one row, or of one chunk of a long row, in vectors of the compiled instruction
// set.  Math and shapes: kernels/cross_entropy/README.md.  Threads and chunks: cpu.cpp.
//
// Forward takes a chunk in blocks that stay in L1.  Exponentials are relative to a reference, the
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
constexpr float kSlack = 8.f;  // exp(8) * 2^20 classes is far from overflow

// ---- what is done to a logit first ----

struct Plain {
  static constexpr bool kIdentity = true;
  vf operator()(vf x) const { return x; }
  vf slope(vf) const { return set1(1.f); }
};

struct Transformed {
  static constexpr bool kIdentity = false;
  float scale, cap;  // cap 0: none
  vf operator()(vf x) const {
    x *= scale;
    return cap == 0.f ? x : tanh(x / cap) * cap;
  }
  vf slope(vf y) const {  // of the transform, from its result
    const vf share = y / cap;
    return cap == 0.f ? set1(scale) : (1.f - share * share) * scale;
  }
};

// ---- the weights k_c = q'_c w_c of a loss that counts every class ----

struct NoTerm {
  static constexpr bool kUsed = false, kPerRow = false;
};

struct Uniform {  // label smoothing of class indices: `share` of every class
  static constexpr bool kUsed = true, kPerRow = false;
  const float* weight;
  float share;
  template <class Lanes>
  vf operator()(int64_t i, Lanes lanes) const {
    return weight ? load(weight + i, lanes) * share : zero_past(set1(share), lanes);
  }
};

template <class Q>
struct Probabilities {
  static constexpr bool kUsed = true, kPerRow = true;
  const Q* q;  // the row's
  const float* weight;
  float keep, share;  // q' = keep * q + share
  template <class Lanes>
  vf operator()(int64_t i, Lanes lanes) const {
    const vf smoothed = zero_past(load(q + i, lanes) * keep + share, lanes);
    return weight ? smoothed * load(weight + i, lanes) : smoothed;
  }
};

template <class T>
SIMD_INLINE float load_one(const T* p) {
  return load(p, Tail{1})[0];
}

SIMD_INLINE float exp_one(float x) { return exp(set1(x))[0]; }

// ---- forward ----

// Sums over some classes c of a row; all zero, and `top` -inf, for no classes.
struct Partial {
  float top;                 // the reference, at most kSlack below the largest logit
  double sum;                // of exp(x_c - top)
  double weights, weighted;  // of k_c = q'_c w_c, and of k_c x_c
};

struct Largest {
  float value;  // NaN is larger than any
  int64_t at;   // its first class
};

// out[r] = the largest of row r's n logits; rows are `stride` apart.  Several rows at a time
// overlap their chains of dependent operations (the lanes' maximum, the lanes' sum, the logarithm).
template <int kRows, class T, class Transform>
SIMD_INLINE void rows_max(const T* x, int64_t stride, int64_t n, Transform transform, float* out) {
  vf top[kRows][kUnroll];
#pragma GCC unroll 4
  for (auto& row : top) row[0] = row[1] = set1(-INFINITY);
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const vf v = transform(load(x + r * stride + i, lanes));
      top[r][u] = max(top[r][u], fill_past(v, lanes, -INFINITY));
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = max_lane(max(top[r][0], top[r][1]));
}

// out[r] = the sum of exp(x'_c - reference[r]) over row r.
template <int kRows, class T, class Transform>
SIMD_INLINE void rows_sum(const T* x, int64_t stride, int64_t n, Transform transform,
                          const float* reference, float* out) {
  Accumulator sum[kRows];
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const vf v = transform(load(x + r * stride + i, lanes));
      sum[r].slot[u] += exp(fill_past(v, lanes, -INFINITY) - reference[r]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = Accumulator::total(sum[r]);
}

// A row of nothing but -inf is taken relative to 0: exp(-inf - 0) adds nothing.
SIMD_INLINE float reference_of(float top) { return top == -INFINITY ? 0.f : top; }

// The sums of kRows rows of at most kBlock classes; the same bits as row_partial's.
template <int kRows, class T, class Transform>
SIMD_INLINE void short_rows(const T* x, int64_t stride, int64_t n, Transform transform,
                            Partial* out) {
  float top[kRows], reference[kRows], sum[kRows];
  rows_max<kRows>(x, stride, n, transform, top);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) reference[r] = reference_of(top[r]);
  rows_sum<kRows>(x, stride, n, transform, reference, sum);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = {top[r], double(sum[r]), 0.0, 0.0};
}

// The same sum, with the largest logit on the way.
template <class T, class Transform>
SIMD_INLINE float sum_and_max(const T* x, int64_t n, Transform transform, float reference,
                              float* largest) {
  vf top[kUnroll];
  for (vf& v : top) v = set1(-INFINITY);
  Accumulator sum;
  for_each_vector(n, [&](int64_t i, auto lanes, int u) {
    // The hardware stops at each page of 4 KiB.
    if (sizeof(T) == sizeof(float) || u == 0) __builtin_prefetch(x + i + kBlock);
    const vf v = fill_past(transform(load(x + i, lanes)), lanes, -INFINITY);
    top[u] = max(top[u], v);
    sum.slot[u] += exp(v - reference);
  });
  *largest = max_lane(max(top[0], top[1]));
  return Accumulator::total(sum);
}

// Adds the block x [n] to `p`; `term` counts classes from the block's first.
template <class T, class Transform, class Term>
SIMD_INLINE void add_block(Partial& p, const T* x, int64_t n, int64_t first, Transform transform,
                           Term term) {
  float sum;
  if (p.top == -INFINITY) {  // the first, or nothing but -inf so far
    rows_max<1>(x, 0, n, transform, &p.top);
    const float reference = reference_of(p.top);
    rows_sum<1>(x, 0, n, transform, &reference, &sum);
  } else {
    float largest;
    sum = sum_and_max(x, n, transform, p.top, &largest);
    if (largest > p.top + kSlack) {
      p.sum *= double(exp_one(p.top - largest));
      p.top = largest;
      rows_sum<1>(x, 0, n, transform, &p.top, &sum);
    }
  }
  p.sum += double(sum);
  if constexpr (Term::kUsed) {  // from L1
    const float reference = reference_of(p.top);
    Accumulator weights, weighted;
    for_each_vector(n, [&](int64_t i, auto lanes, int u) {
      const vf k = term(first + i, lanes);
      weights.slot[u] += k;
      weighted.slot[u] += zero_past(k * (transform(load(x + i, lanes)) - reference), lanes);
    });
    const double k = double(Accumulator::total(weights));
    p.weights += k;
    p.weighted += double(Accumulator::total(weighted)) + k * double(reference);
  }
}

// Classes begin to begin + n of the row x.
template <class T, class Transform, class Term>
Partial row_partial(const T* x, int64_t begin, int64_t n, Transform transform, Term term) {
  Partial p{-INFINITY, 0.0, 0.0, 0.0};
  for (int64_t b = begin; b < begin + n; b += kBlock) {
    const int64_t rest = begin + n - b;
    add_block(p, x + b, rest < kBlock ? rest : kBlock, b, transform, term);
  }
  return p;
}

// `p` and the classes after it.
SIMD_INLINE void combine(Partial& p, const Partial& next) {
  const float top = next.top > p.top ? next.top : p.top;
  auto scaled = [&](const Partial& part) {  // a part of nothing but -inf adds 0, or NaN
    return part.top == top || part.top == -INFINITY ? part.sum
                                                    : part.sum * double(exp_one(part.top - top));
  };
  p = {top, scaled(p) + scaled(next), p.weights + next.weights, p.weighted + next.weighted};
}

// The largest of classes begin to begin + n, of -x where `sign` is -1: block by block, then the
// first such class within the block.
template <class T>
Largest row_largest(const T* x, int64_t begin, int64_t n, float sign) {
  Largest best{-INFINITY, begin};
  int64_t block = begin;
  for (int64_t b = begin; b < begin + n && best.value == best.value; b += kBlock) {
    const int64_t rest = begin + n - b, length = rest < kBlock ? rest : kBlock;
    vf top = set1(-INFINITY), nan{};
    for_each_vector(length, [&](int64_t i, auto lanes, int) {
      const vf v = fill_past(load(x + b + i, lanes) * sign, lanes, -INFINITY);
      top = max(top, v);
      nan = v == v ? nan : set1(1.f);
    });
    const float largest = sum(nan) > 0.f ? NAN : max_lane(top);
    if (!(largest <= best.value)) {
      best.value = largest;
      block = b;
    }
  }
  for (best.at = block;; best.at++) {
    const float v = load_one(x + best.at) * sign;
    if (v == best.value || v != v) return best;
  }
}

// ---- backward ----

// dx_c = (slope * exp(x'_c - lse) - k_c - on_c) * dx'/dx; on_c is 0 but for the target's class.
struct Gradient {
  float lse, rest;  // the two parts of lse
  float slope;
};

template <class Transform, class Term, class Lanes>
SIMD_INLINE vf gradient_at(vf x, const Gradient& g, Transform transform, Term term, int64_t i,
                           Lanes lanes) {
  const vf y = transform(x);
  vf d = exp((y - g.lse) - g.rest) * g.slope;
  if constexpr (Term::kUsed) d -= term(i, lanes);
  return d * transform.slope(y);
}

// The same for the target's class, in lane 0: a probability near 1 cancels against `on`.
template <class Transform, class Term>
SIMD_INLINE vf gradient_at_target(vf x, const Gradient& g, Transform transform, Term term,
                                  int64_t target, float on) {
  const vf y = transform(x);
  vf d = set1(g.slope - on);
  if constexpr (Term::kUsed) d -= term(target, Tail{1});
  d += exp_minus_1((y - g.lse) - g.rest) * g.slope;
  return d * transform.slope(y);
}

template <bool Stream, class T, class Transform, class Term>
void row_gradient(const T* x, T* dx, int64_t begin, int64_t n, Gradient g, Transform transform,
                  Term term) {
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf v = load(x + begin + i, lanes);
    write<Stream>(dx + begin + i, gradient_at(v, g, transform, term, begin + i, lanes), lanes);
  });
}

}  // namespace kernels::ISA::cross_entropy
