// A row of logits on CUDA: how threads walk over it 128 bits at a time wherever it starts, and what
// they keep of it. Maths and shapes: kernels/cross_entropy/README.md.
//
// The loss of a row is sum_c k_c (lse - x'_c) + z_loss lse^2, where k_c is the class's share: of
// the target `on` w_c, and of every class w_c (on q_c + off) with probabilities, w_c off with
// smoothing.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"

namespace kernels::cross_entropy {

constexpr int kSectorBytes = 32;  // what memory is moved in
constexpr int kNoClass = -1;      // no target that counts, or no column
constexpr int kSweepItems = 16;   // elements of a thread that are on their way at a time

struct Label {
  int column;  // kNoClass where it is ignored or wrong, and with probabilities
  bool ignored, wrong;
};

struct Problem {
  const void* input;          // [rows, classes]
  const int64_t* target;      // [rows], or null
  const void* probabilities;  // [rows, classes], or null
  const float* weight;        // [classes], or null
  int64_t rows, row_stride;   // elements from one row of input to the next
  int64_t ignore_index;       // unused with probabilities
  int classes;
  bool wide_probabilities;  // they are fp32; else in the dtype of input
  bool shared;              // every class has a share: smoothing, or probabilities
  float on, off;            // 1 - smoothing, smoothing / classes
  float z_loss, softcap, logit_scale;

  __device__ __forceinline__ float logit(float x) const {
    x *= logit_scale;
    return softcap == 0.f ? x : softcap * tanhf(x / softcap);
  }
  __device__ __forceinline__ float weight_of(int column) const {
    return weight == nullptr ? 1.f : weight[column];
  }
  __device__ __forceinline__ Label label_of(int64_t row) const {
    if (target == nullptr) return {kNoClass, false, false};
    const int64_t found = target[row];
    const bool ignored = found == ignore_index, there = found >= 0 && found < classes;
    return {!ignored && there ? static_cast<int>(found) : kNoClass, ignored, !ignored && !there};
  }
};

// e^x of x <= 0 in one multiplication and one instruction; below 2^-126 it is 0.
__device__ __forceinline__ float exp_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504088896341f));
  return power;
}

// out = kCount neighbours as fp32, in 128-bit steps where they lie on such a boundary.
template <int kCount, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&out)[kCount]) {
  constexpr int kWidest = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kStep = kCount < kWidest ? kCount : kWidest;
  if constexpr (kStep > 1) {
    if (reinterpret_cast<uintptr_t>(from) % (kStep * sizeof(T)) == 0) {
#pragma unroll
      for (int first = 0; first < kCount; first += kStep) {
        const auto part = Vec<T, kStep>::load(from + first);
#pragma unroll
        for (int i = 0; i < kStep; ++i) out[first + i] = to_float(part.at[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(from[i]);
}

// The shares of kCount neighbouring classes, the target's own left out. T: the dtype of input.
template <typename T, int kCount>
__device__ __forceinline__ void load_shares(const Problem& p, int64_t row, int column,
                                            float (&share)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) share[i] = p.off;
  if (p.probabilities != nullptr) {
    const int64_t at = row * p.classes + column;
    float q[kCount];
    if (p.wide_probabilities) {
      load_floats(static_cast<const float*>(p.probabilities) + at, q);
    } else {
      load_floats(static_cast<const T*>(p.probabilities) + at, q);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) share[i] = fmaf(p.on, q[i], p.off);
  }
  if (p.weight != nullptr) {
    float w[kCount];
    load_floats(p.weight + column, w);
#pragma unroll
    for (int i = 0; i < kCount; ++i) share[i] *= w[i];
  }
}

// One store to shared or to global memory, even where the compiler would take the vector apart: it
// does so with those that are loaded in batches, and where a branch beside stores single elements.
template <typename T, int kCount>
__device__ __forceinline__ void store_shared(const Vec<T, kCount>& part, T* to) {
  if constexpr (sizeof(part) == kVectorBytes) {
    uint4 word = reinterpret_cast<const uint4&>(part);
    asm("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
    *reinterpret_cast<uint4*>(to) = word;
  } else {
    part.store(to);
  }
}
template <typename T, int kCount>
__device__ __forceinline__ void store_global(const Vec<T, kCount>& part, T* to) {
  if constexpr (sizeof(part) == kVectorBytes) {
    __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(part));
  } else {
    part.store(to);
  }
}

// [begin, end) of a row: single elements up to its first sector of memory, whole vectors, the rest.
// Vectors from a boundary of 16 bytes on would do, but a warp's would touch 17 sectors in place
// of 16.
template <typename T>
struct Pieces {
  static constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kSector = kSectorBytes / static_cast<int>(sizeof(T));
  int begin, end, head, vectors;

  __device__ __forceinline__ Pieces(const T* row, int begin, int end) : begin(begin), end(end) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(row + begin);
    const int past = static_cast<int>(address / sizeof(T) % kSector);
    head = min((kSector - past) % kSector, end - begin);
    vectors = (end - begin - head) / kVec;
  }
  __device__ __forceinline__ int vector(int v) const { return begin + head + v * kVec; }
  // The single element that is up to this thread, if it is below `end`.
  __device__ __forceinline__ int single(int thread) const {
    return thread < head ? begin + thread : vector(vectors) + thread - head;
  }
};

// Calls f(Vec of neighbours, column of the first) for [begin, end) of `row`, spread over `threads`
// threads, at least 32; several loads of a thread are on their way at a time.
template <typename T, typename F>
__device__ __forceinline__ void sweep(const T* row, int begin, int end, int thread, int threads,
                                      F&& f) {
  constexpr int kVec = Pieces<T>::kVec, kBatch = kSweepItems / kVec;
  const Pieces<T> pieces(row, begin, end);
  const int single = pieces.single(thread);
  if (single < end) f(Vec<T, 1>::load(row + single), single);
  for (int v = thread; v < pieces.vectors; v += kBatch * threads) {
    Vec<T, kVec> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = v + b * threads;
      if (at < pieces.vectors) batch[b] = Vec<T, kVec>::load(row + pieces.vector(at));
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int at = v + b * threads;
      if (at < pieces.vectors) f(batch[b], pieces.vector(at));
    }
  }
}

// Writes zeros, as sweep reads.
template <typename T>
__device__ __forceinline__ void clear(T* row, int begin, int end, int thread, int threads) {
  constexpr int kVec = Pieces<T>::kVec;
  const Pieces<T> pieces(row, begin, end);
  const int single = pieces.single(thread);
  if (single < end) Vec<T, 1>::zero().store(row + single);
  for (int v = thread; v < pieces.vectors; v += threads) {
    Vec<T, kVec>::zero().store(row + pieces.vector(v));
  }
}

// What a forward keeps of the part of a row that it has seen.
struct alignas(16) RowState {
  float max;    // the largest logit
  float sum;    // of e^(x' - max)
  float cost;   // sum of k_c (max - x'_c): terms of one sign, so that a large mean costs no digits
  float mass;   // sum of k_c
  float logit;  // the target's, once it is met, else 0
  float unused;
  unsigned long long best;  // rank of the best class, 0: no class yet

  __device__ __forceinline__ static RowState empty() {
    return {-INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f, 0};
  }
  // What sums are relative to: 0 before the first finite logit, for -inf - -inf is NaN.
  __device__ __forceinline__ float base() const { return max == -INFINITY ? 0.f : max; }
};

// Larger for a better class: a NaN before all numbers, larger before smaller, then lower columns.
__device__ __forceinline__ unsigned long long rank_of(float x, int column) {
  const unsigned bits = __float_as_uint(x + 0.f);  // one zero
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const unsigned value = isnan(x) ? 0xffffffffu : ordered;
  return static_cast<unsigned long long>(value) << 32 | (0xffffffffu - column);
}
__device__ __forceinline__ int64_t column_of(unsigned long long rank) {
  return 0xffffffffu - static_cast<unsigned>(rank);
}

// Adds kCount elements of input to a state; columns[i] == kNoClass: there is none. `share` is read
// where p.shared only.
template <int kCount>
__device__ __forceinline__ void add(RowState& state, const Problem& p, const float (&raw)[kCount],
                                    const float (&share)[kCount], const int (&columns)[kCount],
                                    int target, bool stats) {
  float x[kCount];
  const float before = state.base(), max_before = state.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool there = columns[i] != kNoClass;
    x[i] = there ? p.logit(raw[i]) : -INFINITY;
    state.max = fmaxf(state.max, x[i]);
    if (there && columns[i] == target) state.logit = x[i];
  }
  if (stats) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float directed = p.logit_scale < 0.f ? -raw[i] : raw[i];
      if (columns[i] != kNoClass) state.best = max(state.best, rank_of(directed, columns[i]));
    }
  }
  const float base = state.base();
  state.sum *= exp_of(max_before - base);
#pragma unroll
  for (int i = 0; i < kCount; ++i) state.sum += exp_of(x[i] - base);
  if (p.shared) {
    state.cost = fmaf(state.mass, base - before, state.cost);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (columns[i] == kNoClass) continue;
      state.cost = fmaf(share[i], base - x[i], state.cost);
      state.mass += share[i];
    }
  }
}

__device__ __forceinline__ RowState merged(const RowState& a, const RowState& b) {
  RowState both;
  both.max = fmaxf(a.max, b.max);
  const float base = both.base();
  both.sum = a.sum * exp_of(a.max - base) + b.sum * exp_of(b.max - base);
  both.cost = fmaf(a.mass, base - a.base(), a.cost) + fmaf(b.mass, base - b.base(), b.cost);
  both.mass = a.mass + b.mass;
  both.logit = a.logit + b.logit;
  both.unused = 0.f;
  both.best = max(a.best, b.best);
  return both;
}

// The states of `lanes` neighbouring lanes, a power of two, merged; the whole warp must call. Only
// the first of them may go on with the result: the others may differ from it in the last bit.
__device__ __forceinline__ RowState merged_lanes(RowState state, int lanes) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    if (offset >= lanes) break;
    RowState other;
    other.max = __shfl_xor_sync(kAllLanes, state.max, offset);
    other.sum = __shfl_xor_sync(kAllLanes, state.sum, offset);
    other.cost = __shfl_xor_sync(kAllLanes, state.cost, offset);
    other.mass = __shfl_xor_sync(kAllLanes, state.mass, offset);
    other.logit = __shfl_xor_sync(kAllLanes, state.logit, offset);
    other.best = __shfl_xor_sync(kAllLanes, state.best, offset);
    state = merged(state, other);
  }
  return state;
}

}  // namespace kernels::cross_entropy
