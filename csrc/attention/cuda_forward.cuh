// Attention forward on CUDA: a block of query rows against tiles of keys and values, which come in
// by cp.async while the tile before is worked on; softmax online, in powers of two.
//
// A warp has 16 or 32 whole rows, so that their maxima and sums stay inside groups of four lanes
// and its weights go from the accumulators of q kᵀ straight into the product with v.
#pragma once

#include "attention/cuda_scores.cuh"

namespace kernels::attention {

struct ForwardArgs {
  Problem problem;
  Heads query, key, value, out;
  float* lse;
  Grid grid;
};

// Rows of a warp / 16, warps of a block, keys of a tile, by the size of T and the head-dim class.
template <typename T, int kColumns>
struct ForwardShape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kM = kHalf && kColumns <= 128 ? 2 : 1;
  static constexpr int kWarps = !kHalf && kColumns == 256 ? 2 : 4;
  static constexpr int kKeys = kHalf ? (kColumns == 64 ? 64 : 32) : (kColumns == 256 ? 16 : 32);
  static constexpr int kRows = 16 * kM * kWarps;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kBlocks =
      8 / kWarps;  // of a multiprocessor: a thread may have 255 registers
  // The queries, and two stages of keys and values.
  static constexpr size_t kShared = sizeof(T) * kColumns * (kRows + 4 * kKeys);
  static_assert(kShared <= kMaxShared);
};

// Running maximum, in powers of two, and sum of a lane's rows. The sum is the lane's own part.
template <int kM>
struct Softmax {
  float top[2 * kM], sum[2 * kM];

  __device__ __forceinline__ explicit Softmax(const float* sink) {
    const float first = sink == nullptr ? -INFINITY : *sink * kLog2E;
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      top[row] = first;
      sum[row] = first > -INFINITY && threadIdx.x % 4 == 0 ? 1.f : 0.f;
    }
  }

  // Replaces scores / factor by weights relative to the new maximum; what was summed up before must
  // be multiplied by `shrink`.
  template <typename T, int kN>
  __device__ __forceinline__ void weigh(Accumulator (&s)[kM][kN], Split factor,
                                        float (&shrink)[2 * kM]) {
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      const int m = row / 2, e = row % 2 * 2;
      float most = fmaxf(s[m][0][e], s[m][0][e + 1]);
#pragma unroll
      for (int n = 1; n < kN; ++n) most = fmaxf(most, fmaxf(s[m][n][e], s[m][n][e + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float next = fmaxf(top[row], most * factor.high);
      const float base = next == -INFINITY ? 0.f : next;  // -inf - -inf is no number
      shrink[row] = exp2_fast(top[row] - base);
      top[row] = next;
      sum[row] *= shrink[row];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = e; c < e + 2; ++c) {
          s[m][n][c] = weight<T>(s[m][n][c], factor, {base, 0.f});
          sum[row] += s[m][n][c];
        }
      }
    }
  }

  // The lanes' parts of the sums become the sums.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      sum[row] += __shfl_xor_sync(kAllLanes, sum[row], 1);
      sum[row] += __shfl_xor_sync(kAllLanes, sum[row], 2);
    }
  }
  // After that, in powers of e.
  __device__ __forceinline__ float lse(int row) const {
    const float logarithm = fmaf(top[row], kLn2, fmaf(top[row], kLn2Low, logf(sum[row])));
    return sum[row] > 0.f ? logarithm : sum[row] - INFINITY;
  }
};

template <int kM, int kN>
__device__ __forceinline__ void rescale(Accumulator (&out)[kM][kN], const float (&shrink)[2 * kM]) {
#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      out[row / 2][n][row % 2 * 2] *= shrink[row];
      out[row / 2][n][row % 2 * 2 + 1] *= shrink[row];
    }
  }
}

// Products to scores in powers of two, all of them looked at one by one.
template <int kM, int kN, typename T>
__device__ __forceinline__ void score_tile(Accumulator (&s)[kM][kN], const Plane<T>& plane,
                                           const Band& band, const Subset& rows, int row0,
                                           const Subset& keys, int key0) {
  float derivative;
#pragma unroll 1
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int j = keys.at(key0 + 8 * n + threadIdx.x % 4 * 2 + c);
#pragma unroll
      for (int r = 0; r < 2 * kM; ++r) {
        float& element = s[r / 2][0][r % 2 * 2 + c];
        const int i = rows.at(row0 + 8 * r + threadIdx.x % kWarp / 4);
        element = plane.score(element, i, j, band, derivative);
      }
    }
    rotate(s);
  }
}

template <int kM, int kN>
__device__ __forceinline__ void drop(Accumulator (&p)[kM][kN], Bits<kM, kN> bits) {
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (!(bits >> keep_bit<kM, kN, false>(r, 2 * n + c) & 1)) p[r / 2][n][r % 2 * 2 + c] = 0.f;
      }
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(ForwardShape<T, kColumns>::kThreads,
                                  ForwardShape<T, kColumns>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Shape = ForwardShape<T, kColumns>;
  constexpr int kM = Shape::kM, kKeys = Shape::kKeys, kN = kKeys / 8, kRows = Shape::kRows;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  using Chunks = Tile<T, kColumns>;
  const Chunks queries{reinterpret_cast<T*>(memory)};
  const Chunks stages = queries.from_row(kRows);

  const Problem& a = args.problem;
  const Place place(args.grid, kRows);
  const Sequence sequence(a, place.sequence);
  const Subset rows = place.gathered ? sequence.global_queries(a) : sequence.all_queries();
  if (place.first >= rows.count) return;
  const Walk<kKeys, false> walk(a, sequence, place, rows, kRows);
  const Plane<T> plane(a, sequence, place.head);
  const int kv_head = place.head / a.group;
  const Rows<T> key = args.key.rows<T>(sequence.batch, kv_head, sequence.key0);
  const Rows<T> value = args.value.rows<T>(sequence.batch, kv_head, sequence.key0);

  const auto load_keys = [&](int tile) {
    const Subset keys = walk.subset(tile);
    const auto row_at = [&](int r) { return keys.at(walk.start(tile) + r); };
    const Chunks stage = stages.from_row(tile % 2 * 2 * kKeys);
    load_tiles<kKeys, Shape::kThreads>(stage, key, value, row_at);
  };
  if (walk.tiles > 0) {
    const Rows<T> query = args.query.rows<T>(sequence.batch, place.head, sequence.query0);
    load_tile<kRows, Shape::kThreads>(queries, query,
                                      [&](int r) { return rows.at(place.first + r); });
  }

  const int warp_row = threadIdx.x / kWarp * 16 * kM, row0 = place.first + warp_row;
  const Chunks own = queries.from_row(warp_row);
  Accumulator out[kM][kColumns / 8] = {};
  Softmax<kM> softmax(a.sinks == nullptr ? nullptr : a.sinks + place.head);
  const bool elaborate = plane.elaborate() || place.gathered;

#pragma unroll 1
  for (int tile = -1; tile < walk.tiles; ++tile) {
    if (tile >= 0) {
      wait_for_copies();
      __syncthreads();  // the tile is there for all, and nobody reads the one before any more
    }
    if (tile + 1 < walk.tiles) load_keys(tile + 1);
    if (tile < 0) continue;
    const Chunks stage = stages.from_row(tile % 2 * 2 * kKeys);
    const int key0 = walk.start(tile);
    Work work = Work::kElementwise;
    if (walk.is_near(tile) && !place.gathered) {
      work = work_of<false>(walk.near, plane.offset, row0, 16 * kM, key0, kKeys, sequence.keys);
    }
    if (work == Work::kNone) continue;

    Accumulator s[kM][kN] = {};
    multiply_rows<T>(s, own, stage, args.key.columns);
    const bool scored = elaborate || work != Work::kPlain;
    if (scored) score_tile(s, plane, walk.band(tile), rows, row0, walk.subset(tile), key0);
    float shrink[2 * kM];
    softmax.template weigh<T>(s, plane.factor(scored), shrink);
    rescale(out, shrink);
    if (a.seed != nullptr) {
      drop(s, keep_bits<kM, kN, false>(plane, rows, row0, walk.subset(tile), key0));
    }
    multiply_columns<T>(out, s, stage.from_row(kKeys), args.value.columns);
  }

  const auto is_stored = [&](int query) {
    return query >= 0 &&
           (place.gathered || !a.has_globals() || !sequence.is_global(a, query + sequence.offset));
  };
  softmax.add_up();
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int query = rows.at(row0 + 8 * r + threadIdx.x % kWarp / 4);
    if (threadIdx.x % 4 == 0 && is_stored(query)) {
      args.lse[sequence.lse0(a, place.head) + query] = softmax.lse(r);
    }
  }
  const float factor = a.seed == nullptr ? 1.f : a.keep_factor;
  store_rows(
      out, own, args.out.rows<T>(sequence.batch, place.head, sequence.query0),
      [&](int r) { return softmax.sum[r] == 0.f ? 0.f : factor / softmax.sum[r]; },
      [&](int r) {
        const int query = rows.at(row0 + r);
        return is_stored(query) ? query : -1;
      });
}

}  // namespace kernels::attention
