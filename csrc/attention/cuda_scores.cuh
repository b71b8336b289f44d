// From the products of queries and keys to scores: scale, softcap, ALiBi, masks, visibility; and
// which weights dropout keeps. Tiles that every query sees whole, without any of these, skip it
// all.
#pragma once

#include "attention/cuda_problem.cuh"

namespace kernels::attention {

constexpr float kLog2E = 1.4426950408889634f, kLog2ELow = 1.9259630e-8f;  // their sum is log2 e
constexpr float kLn2 = 0.6931471805599453f, kLn2Low = -1.9046543e-9f;

// A number and what its rounding left: in fp32, one rounding of a score of 10 shows in the results.
struct Split {
  float high, low;
};

// x log2 e
__device__ __forceinline__ Split times_log2e(float x) {
  const float high = x * kLog2E;
  return {high, fmaf(x, kLog2E, -high) + x * kLog2ELow};
}

// 2^(s factor - base): for 16-bit T without what rounding left of factor and base.
template <typename T>
__device__ __forceinline__ float weight(float s, Split factor, Split base) {
  float exponent = fmaf(s, factor.high, -base.high);
  if constexpr (sizeof(T) == 4) exponent += s == -INFINITY ? 0.f : fmaf(s, factor.low, -base.low);
  return exp2_fast(exponent);
}

// What the scores of one head of one sequence have in common.
template <typename T>
struct Plane {
  const Problem& a;
  int offset;
  float slope;
  const void* mask;
  unsigned seed_low, seed_high, number;  // dropout's key; the head's number

  __device__ __forceinline__ Plane(const Problem& a, const Sequence& s, int head)
      : a(a), offset(s.offset), slope(0.f), mask(a.mask), number(s.number * a.heads + head) {
    if (a.alibi_slopes != nullptr) {
      slope = a.alibi_slopes[s.number * a.alibi_batch + head * a.alibi_head];
    }
    if (a.mask_kind != Mask::kNone) {
      const int size = a.mask_kind == Mask::kBool ? 1 : a.mask_kind == Mask::kFloat32 ? 4 : 2;
      mask =
          static_cast<const char*>(a.mask) + size * (s.number * a.mask_batch + head * a.mask_head);
    }
    const uint64_t seed = a.seed == nullptr ? 0 : static_cast<uint64_t>(*a.seed);
    seed_low = static_cast<unsigned>(seed);
    seed_high = static_cast<unsigned>(seed >> 32);
  }

  // Are scores more than products times scale, or is that no positive number, so that -inf does not
  // stand for "not seen" before it?
  __device__ __forceinline__ bool composed() const {
    return a.softcap != 0.f || a.alibi_slopes != nullptr || a.mask_kind > Mask::kBool ||
           !(a.scale > 0.f);
  }
  // Does every tile need `score`?
  __device__ __forceinline__ bool elaborate() const {
    return composed() || a.mask_kind == Mask::kBool;
  }
  // What turns products, or what `score` makes of them, into scores in powers of two.
  __device__ __forceinline__ Split factor(bool scored) const {
    return times_log2e(scored && composed() ? 1.f : a.scale);
  }

  // The score of query i and key j from their product, scale left out if not composed(); -inf where
  // not seen or where a number is negative. `derivative` is the softcap's.
  __device__ __forceinline__ float score(float product, int i, int j, const Band& band,
                                         float& derivative) const {
    const int distance = j - i - offset;
    bool seen = (i | j) >= 0 && band.has(distance);
    derivative = 1.f;
    float s = product;
    if (composed()) {
      s *= a.scale;
      if (a.softcap != 0.f) {
        const float t = tanhf(s / a.softcap);
        derivative = fmaf(-t, t, 1.f);
        s = a.softcap * t;
      }
      s = fmaf(-slope, static_cast<float>(abs(distance)), s);
    }
    if (a.mask_kind != Mask::kNone && seen) {
      const int64_t at = i * a.mask_query + j * a.mask_key;
      if (a.mask_kind == Mask::kBool) {
        seen = static_cast<const uint8_t*>(mask)[at] != 0;
      } else if (a.mask_kind == Mask::kFloat32) {
        s += static_cast<const float*>(mask)[at];
      } else {
        s += to_float(static_cast<const T*>(mask)[at]);
      }
    }
    return seen ? s : -INFINITY;
  }
};

// Four words by Philox4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ uint4 philox(unsigned key0, unsigned key1, uint4 counter) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t second = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<unsigned>(second >> 32) ^ counter.y ^ key0,
               static_cast<unsigned>(second), static_cast<unsigned>(first >> 32) ^ counter.w ^ key1,
               static_cast<unsigned>(first)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// One bit for each of a lane's elements of kM x kN accumulators: does dropout keep it? `rows` from
// row0 on are down the accumulators, `columns` across; those are keys or, if kKeysKept, queries.
// Bit `keep_bit` belongs to slot `row` (of 2 kM) and `column` (of 2 kN). One call of the generator
// serves eight keys: elements that share it come one after the other.
template <int kM, int kN, bool kKeysKept>
__device__ constexpr int keep_bit(int row, int column) {
  return kKeysKept ? column * 2 * kM + row : row * 2 * kN + column;
}

template <int kM, int kN>
using Bits = std::conditional_t<(4 * kM * kN > 32), uint64_t, uint32_t>;

template <int kM, int kN, bool kKeysKept, typename T>
__device__ __forceinline__ Bits<kM, kN> keep_bits(const Plane<T>& plane, const Subset& rows,
                                                  int row0, const Subset& columns, int column0) {
  constexpr int kInner = kKeysKept ? 2 * kM : 2 * kN;
  const int lane = threadIdx.x % kWarp;
  Bits<kM, kN> bits = 0;
  uint4 words = {};
  int last_query = -1, last_call = -1;
#pragma unroll 1
  for (int element = 0; element < 4 * kM * kN; ++element) {
    const int row = kKeysKept ? element % kInner : element / kInner;
    const int column = kKeysKept ? element / kInner : element % kInner;
    const int down = rows.at(row0 + row * 8 + lane / 4);
    const int across = columns.at(column0 + column / 2 * 8 + lane % 4 * 2 + column % 2);
    const int i = kKeysKept ? across : down, j = kKeysKept ? down : across;
    if ((i | j) < 0) continue;
    const int call = j / 32 * 4 + j / 2 % 4;
    if (i != last_query || call != last_call) {
      const uint4 counter = {static_cast<unsigned>(i), static_cast<unsigned>(call), plane.number,
                             0};
      words = philox(plane.seed_low, plane.seed_high, counter);
      last_query = i;
      last_call = call;
    }
    const int n = j / 8 % 4;
    const unsigned word = n < 2 ? (n == 0 ? words.x : words.y) : (n == 2 ? words.z : words.w);
    const unsigned half = j % 2 ? word >> 16 : word & 0xffffu;
    bits |= Bits<kM, kN>{half >= plane.a.threshold} << element;
  }
  return bits;
}

// Moves column tile n + 1 to n, and 0 to the end. A rolled loop that works on tile 0 and then
// rotates has a kN-th of the code of an unrolled one, at the cost of moves between registers.
template <int kM, int kN>
__device__ __forceinline__ void rotate(Accumulator (&s)[kM][kN]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float first = s[m][0][e];
#pragma unroll
      for (int n = 0; n + 1 < kN; ++n) s[m][n][e] = s[m][n + 1][e];
      s[m][kN - 1][e] = first;
    }
  }
}

// What a warp has to do with a tile: nothing, everything elementwise, or the products alone.
enum class Work { kNone, kElementwise, kPlain };

// `rows` consecutive rows from row0 on against `columns` from column0 on, of `there` columns.
template <bool kKeysKept>
__device__ __forceinline__ Work work_of(const Band& band, int offset, int row0, int rows,
                                        int column0, int columns, int there) {
  const int first = kKeysKept ? row0 - (column0 + columns - 1) : column0 - (row0 + rows - 1);
  const int last = first + rows + columns - 2;
  if (last - offset < band.low || first - offset > band.high) return Work::kNone;
  const bool whole = first - offset >= band.low && last - offset <= band.high;
  return whole && column0 + columns <= there ? Work::kPlain : Work::kElementwise;
}

}  // namespace kernels::attention
