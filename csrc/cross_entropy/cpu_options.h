// Cross-entropy with what touches every class: label smoothing, probabilities, softcap, scale; and
// the arg-max.  Math and shapes: kernels/cross_entropy/README.md.
//
// A row is done in blocks of floats that stay in L1, one short loop for each thing asked for: a
// combination of options costs a pass over L1 more, and no code of its own.
#pragma once
#include "cross_entropy/cpu_kernel.h"

namespace kernels::ISA::cross_entropy {

using kernels::cross_entropy::BackwardArgs;
using kernels::cross_entropy::Call;
using kernels::cross_entropy::ForwardArgs;

struct Block {
  alignas(64) float at[kBlock];
};

inline bool has_options(const Call& a) {
  return a.probabilities || a.label_smoothing != 0.f || a.softcap != 0.f || a.logit_scale != 1.f;
}

inline const char* row_of(const Call& a, const RowKernels& kernels, int64_t row) {
  return static_cast<const char*>(a.input) + row * a.row_stride * kernels.element_size;
}

// n elements of a row from `begin` on, as floats: where they lie, or in `buffer`.
inline const float* floats(const RowKernels& kernels, const char* row, int64_t begin, int64_t n,
                           Block& buffer) {
  const char* x = row + begin * kernels.element_size;
  if (kernels.element_size == sizeof(float)) return reinterpret_cast<const float*>(x);
  kernels.to_float(x, n, buffer.at);
  return buffer.at;
}

// out = x', what softcap and scale make of x [n].
inline void transform(const Call& a, const float* x, int64_t n, float* out) {
  const float scale = a.logit_scale, cap = a.softcap;
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf scaled = load(x + i, lanes) * scale;
    store(out + i, cap == 0.f ? scaled : tanh(scaled / cap) * cap, lanes);
  });
}

inline float transformed(const Call& a, float x) {
  float y;
  transform(a, &x, 1, &y);
  return y;
}

// x'_c of n classes from `begin` on.
inline const float* logits(const Call& a, const RowKernels& kernels, const char* row, int64_t begin,
                           int64_t n, Block& buffer) {
  const float* x = floats(kernels, row, begin, n, buffer);
  if (a.softcap == 0.f && a.logit_scale == 1.f) return x;
  transform(a, x, n, buffer.at);
  return buffer.at;
}

// scale * k_c of some classes, k_c = q'_c w_c.
struct ClassWeights {
  const float* each;  // null: all of them are `all`
  float all;
};

inline ClassWeights class_weights(const Call& a, int64_t row, int64_t begin, int64_t n, float scale,
                                  Block& buffer) {
  const float keep = (1.f - a.label_smoothing) * scale;
  const float share = a.label_smoothing / float(a.cols) * scale;
  if (!a.probabilities && (!a.weight || share == 0.f)) return {nullptr, share};
  float* k = buffer.at;
  if (a.probabilities) {
    const RowKernels& kernels = row_kernels(a.probabilities_dtype);
    const char* q = static_cast<const char*>(a.probabilities);
    kernels.to_float(q + (row * a.cols + begin) * kernels.element_size, n, k);
  }
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf smoothed = a.probabilities ? load(k + i, lanes) * keep + share : set1(share);
    store(k + i, a.weight ? smoothed * load(a.weight + begin + i, lanes) : smoothed, lanes);
  });
  return {k, 0.f};
}

// ---- forward ----

constexpr int64_t kTerms = 256;  // floats added up before a double takes over

// The sums of k_c, and of k_c x'_c, over a block.
struct Weighted {
  double weights, weighted;
};

// x may be null: then only the weights are summed.
inline Weighted sum_weighted(const float* x, float reference, ClassWeights k, int64_t n) {
  double weights = 0, weighted = 0;  // of k_c and of k_c (x_c - reference)
  for (int64_t b = 0; b < n; b += kTerms) {
    Accumulator k_sum, product_sum;
    for_each_vector(n - b < kTerms ? n - b : kTerms, [&](int64_t i, auto lanes, int u) {
      const vf k_c = k.each ? load(k.each + b + i, lanes) : set1(1.f);
      if (k.each) k_sum.slot[u] += k_c;
      if (x) product_sum.slot[u] += zero_past(k_c * (load(x + b + i, lanes) - reference), lanes);
    });
    weights += double(Accumulator::total(k_sum));
    weighted += double(Accumulator::total(product_sum));
  }
  if (!k.each) {  // all are equal, and their sum would be off by what each addition rounds
    weights = double(k.all) * double(n);
    weighted *= double(k.all);
  }
  return {weights, weighted + weights * double(reference)};
}

// The sums of n classes of a row from `begin` on.
inline Partial partial_with_options(const Call& a, const RowKernels& kernels, int64_t row,
                                    int64_t begin, int64_t n) {
  Block x_buffer, k_buffer;
  Partial p;
  for (int64_t b = begin; b < begin + n; b += kBlock) {
    const int64_t rest = begin + n - b, length = rest < kBlock ? rest : kBlock;
    const float* x = logits(a, kernels, row_of(a, kernels, row), b, length, x_buffer);
    add_block(p, x, length);
    const ClassWeights k = class_weights(a, row, b, length, 1.f, k_buffer);
    if (!k.each && k.all == 0.f) continue;  // 0 times an infinite logit would be NaN
    const Weighted sums = sum_weighted(x, reference_of(p.top), k, length);
    p.weights += sums.weights;
    p.weighted += sums.weighted;
  }
  return p;
}

struct Largest {
  float value;  // NaN is larger than any
  int64_t at;   // its first class
};

inline void combine(Largest& best, const Largest& next) {
  if (best.value == best.value && !(next.value <= best.value)) best = next;
}

// The largest of n classes from `begin` on, of -x where `sign` is -1: block by block, then the
// first such class within the block.
inline Largest row_largest(const RowKernels& kernels, const char* row, int64_t begin, int64_t n,
                           float sign) {
  Largest best{-INFINITY, begin};
  Block buffer;
  for (int64_t b = begin; b < begin + n; b += kBlock) {
    const int64_t rest = begin + n - b, length = rest < kBlock ? rest : kBlock;
    const float* x = floats(kernels, row, b, length, buffer);
    vf top = set1(-INFINITY), nan{};
    for_each_vector(length, [&](int64_t i, auto lanes, int) {
      const vf v = fill_past(load(x + i, lanes) * sign, lanes, -INFINITY);
      top = max(top, v);
      nan = v == v ? nan : set1(1.f);
    });
    combine(best, {sum(nan) > 0.f ? NAN : max_lane(top), b});
  }
  for (;; best.at++) {
    const float v = element(kernels, row, best.at) * sign;
    if (v == best.value || v != v) return best;
  }
}

// ---- backward ----

// The sum of k_c over a row.
inline double sum_of_weights(const Call& a, int64_t row) {
  Block buffer;
  double total = 0;
  for (int64_t b = 0; b < a.cols; b += kBlock) {
    const int64_t n = a.cols - b < kBlock ? a.cols - b : kBlock;
    total += sum_weighted(nullptr, 0.f, class_weights(a, row, b, n, 1.f, buffer), n).weights;
  }
  return total;
}

// d times dx'/dx, from x'.
inline void chain(const Call& a, const float* x, int64_t n, float* d) {
  const float scale = a.logit_scale, cap = a.softcap;
  if (cap == 0.f && scale == 1.f) return;
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf share = cap == 0.f ? vf{} : load(x + i, lanes) / cap;
    store(d + i, load(d + i, lanes) * ((1.f - share * share) * scale), lanes);
  });
}

// The gradient of a block x [n], x' of classes from `begin` on; d may be x where x' is x.
inline void block_gradient(const Call& a, const float* x, int64_t n, int64_t begin, const Row& r,
                           ClassWeights k, float* d) {
  const bool has_target = r.target >= begin && r.target < begin + n;
  const int64_t target = r.target - begin;
  float at_target = 0.f;
  if (has_target) {  // before d, which may be x, is written
    at_target = gradient_at_target(x[target], r, k.each ? k.each[target] : k.all);
  }
  for_each_vector(n, [&](int64_t i, auto lanes, int) {
    const vf k_c = k.each ? load(k.each + i, lanes) : set1(k.all);
    store(d + i, exp((load(x + i, lanes) - r.lse) - r.rest) * r.slope - k_c, lanes);
  });
  if (has_target) d[target] = at_target;
  chain(a, x, n, d);
}

// Classes from `begin` on of a row of dinput, which starts at `dx`.
inline void gradient_with_options(const BackwardArgs& args, const RowKernels& kernels, char* dx,
                                  int64_t row, int64_t begin, int64_t n, const Row& r) {
  const Call& a = args.call;
  Block x_buffer, k_buffer, d_buffer;
  for (int64_t b = begin; b < begin + n; b += kBlock) {
    const int64_t rest = begin + n - b, length = rest < kBlock ? rest : kBlock;
    const float* x = logits(a, kernels, row_of(a, kernels, row), b, length, x_buffer);
    const ClassWeights k = class_weights(a, row, b, length, r.scale, k_buffer);
    block_gradient(a, x, length, b, r, k, d_buffer.at);
    kernels.from_float(d_buffer.at, length, dx + b * kernels.element_size);
  }
}

}  // namespace kernels::ISA::cross_entropy
