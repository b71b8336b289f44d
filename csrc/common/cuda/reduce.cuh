// Sums over the threads that share a row: shuffles inside a warp, shared memory between warps.
#pragma once

namespace kernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Partial sums of the warps of a block. Two sets used in turn: a warp may write the next sum while
// a slower one still reads this one, so one barrier per sum is enough.
template <int kSums>
struct RowSumScratch {
  float warp_sums[2][kSums][kWarp];
};

// Replaces each of v by its sum over the blockDim.x threads of the row, in a fixed order, in all of
// them. blockDim.x is a power of two up to 32 (several rows per block: the sum stays inside a warp)
// or a multiple of 32 (one row per block). All threads of the block must call. `turn` starts at 0.
template <int kSums>
__device__ __forceinline__ void row_sum(float (&v)[kSums], RowSumScratch<kSums>& scratch,
                                        int& turn) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < blockDim.x) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) v[s] += __shfl_xor_sync(kAllLanes, v[s], offset);
    }
  }
  if (blockDim.x <= kWarp) return;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) scratch.warp_sums[turn][s][warp] = v[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    v[s] = lane < blockDim.x / kWarp ? scratch.warp_sums[turn][s][lane] : 0.f;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      v[s] += __shfl_xor_sync(kAllLanes, v[s], offset);
    }
  }
  turn ^= 1;
}

}  // namespace kernels
