// int8 times int8 on CUDA's tensor cores: a block of 2 x 2 warps per square tile of y, four stages
// of 64 columns of x and weight in shared memory that cp.async fills.
//
// Both operands lie K contiguous, rows on 16-byte boundaries (cuda_layout.cuh makes others so): the
// weight is then mma.sync's column operand as it is. Where the tiles are few, blocks share the
// columns and leave parts. Tiles are 128 x 128, or 64 x 64 where those would not fill the device.
#pragma once

#include "common/cuda/mma.cuh"
#include "int8_matmul/cuda_epilogue.cuh"

namespace kernels::int8_matmul {

template <int kRows>  // of the tile, and its columns
struct GemmShape {
  static constexpr int kThreads = 4 * kWarp;
  static constexpr int kM = kRows / 32, kN = kRows / 16;  // mma tiles of a warp
  static constexpr int kDepth = 64;                       // bytes of a row in a stage
  static constexpr int kStages = 4;
  static constexpr int kStageBytes = 2 * kRows * kDepth;
  static constexpr size_t kShared = kStages * kStageBytes;
  static_assert(kShared >= kRows * kRows * sizeof(int));  // the sums, in the end
  static constexpr int kBlocks = kRows == 128 ? 2 : 4;    // of a multiprocessor
};

struct GemmArgs {
  const int8_t *x, *weight;  // [m, k] and [n, k], rows x_stride and weight_stride apart
  int64_t x_stride, weight_stride;
  int k;
  int split_steps;  // stages of a split
  Epilogue out;
};

constexpr int kGroupTiles = 16;  // neighbouring blocks make squares of tiles, for the L2 cache

// Where the tile of this block starts.
struct TilePlace {
  int row, column;

  __device__ __forceinline__ TilePlace(int m, int n, int tile) {
    const int rows = (m + tile - 1) / tile, columns = (n + tile - 1) / tile;
    const int group = blockIdx.x / (kGroupTiles * columns);
    const int index = blockIdx.x - group * kGroupTiles * columns;
    const int in_group = min(rows - group * kGroupTiles, kGroupTiles);
    row = (group * kGroupTiles + index % in_group) * tile;
    column = index / in_group * tile;
  }
};

// Rows of 64 bytes, the 16-byte chunks of two rows permuted so that 8 rows have chunk c in 8
// different places.
struct ByteTile {
  int8_t* at;
  __device__ __forceinline__ int8_t* chunk_at(int row, int chunk) const {
    return at + row * 64 + (chunk ^ row / 2 % 4) * 16;
  }
};

// Columns `column` … of kRows rows from row0 on; rows from `rows` on and columns from `k` on as
// zeros.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_bytes(ByteTile tile, const int8_t* from, int64_t stride,
                                           int row0, int rows, int column, int k) {
  const int chunk = threadIdx.x % 4, first = threadIdx.x / 4, col = column + 16 * chunk;
  const int there = min(max(k - col, 0), 16);
  const int8_t* source = from + int64_t{row0 + first} * stride + col;
#pragma unroll
  for (int r = 0; r < kRows; r += kThreads / 4) {
    const int bytes = row0 + first + r < rows ? there : 0;
    copy_async(tile.chunk_at(first + r, chunk), bytes ? source + r * stride : from, bytes);
  }
}

template <int kRows>
__global__ void __launch_bounds__(GemmShape<kRows>::kThreads, GemmShape<kRows>::kBlocks)
    gemm_kernel(const __grid_constant__ GemmArgs a) {
  using Shape = GemmShape<kRows>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / 2 * 16 * kM, warp_column = warp % 2 * 8 * kN;
  const TilePlace place(a.out.m, a.out.n, kRows);

  const int begin = blockIdx.y * a.split_steps;
  const int steps = min((a.k + Shape::kDepth - 1) / Shape::kDepth - begin, a.split_steps);
  const auto stage_of = [&](int step) {
    return ByteTile{reinterpret_cast<int8_t*>(memory) + step % kStages * Shape::kStageBytes};
  };
  // Every thread closes a group per step, with or without copies: waits count groups.
  const auto load_step = [&](int step) {
    if (step < steps) {
      const ByteTile stage = stage_of(step);
      const int column = (begin + step) * Shape::kDepth;
      load_bytes<kRows, Shape::kThreads>(stage, a.x, a.x_stride, place.row, a.out.m, column, a.k);
      load_bytes<kRows, Shape::kThreads>({stage.at + kRows * Shape::kDepth}, a.weight,
                                         a.weight_stride, place.column, a.out.n, column, a.k);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_step(step);

  int c[kM][kN][4] = {};
  int step = 0;
  do {  // every split has a step; a loop that asks first costs a copy of the sums
    wait_for_groups<kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one before any more
    load_step(step + kStages - 1);
    const ByteTile x = stage_of(step), weight{x.at + kRows * Shape::kDepth};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 columns each
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices(left[m], x.chunk_at(warp_row + 16 * m + lane % 16, 2 * half + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t right[4];  // two tiles of 8 rows of the weight
        const int row = warp_column + 8 * n + lane % 8 + lane / 16 * 8;
        load_matrices(right, weight.chunk_at(row, 2 * half + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add_int8(c[m][n], left[m], right[0], right[1]);
          multiply_add_int8(c[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  } while (++step < steps);
  __syncthreads();  // all have read their last stage: its memory is free
  auto& scratch = reinterpret_cast<int (*)[16 * kM][8 * kN]>(memory)[warp];
  finish_tile(a.out, c, scratch, place.row + warp_row, place.column + warp_column, blockIdx.y);
}

}  // namespace kernels::int8_matmul
