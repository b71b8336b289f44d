// Float x times int8 weight on CUDA's tensor cores: a block of 2 x 2 warps per 64 x 64 tile of y,
// two stages of 128 bytes of x's rows and as many of the weight's columns in shared memory.
//
// x comes by cp.async; the weight, 16 bytes a thread, through registers, where it becomes x's
// dtype: int8 is exact in all of them. fp32 products are three of tf32 halves
// (common/cuda/tile.cuh).
#pragma once

#include "common/cuda/tile.cuh"
#include "int8_matmul/cuda_epilogue.cuh"
#include "int8_matmul/cuda_gemm.cuh"
#include "int8_matmul/cuda_gemv.cuh"

namespace kernels::int8_matmul {

template <typename T>
struct WeightOnlyShape {
  static constexpr int kRows = 64, kThreads = 4 * kWarp;
  static constexpr int kDepth = 128 / static_cast<int>(sizeof(T));  // columns of a stage
  static constexpr size_t kShared = 2 * 2 * kRows * 128;
  static_assert(kShared >= kRows * kRows * sizeof(float));  // the sums, in the end
  static constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;    // of a multiprocessor
};

struct WeightOnlyArgs {
  const void* x;  // [m, k]
  int64_t x_stride;
  bool x_vectors;
  const int8_t* weight;  // [n, k], K contiguous, rows on 16-byte boundaries
  int64_t weight_stride;
  int k;
  int split_steps;  // stages of a split
  Epilogue out;
};

// 16 weights, rounded to T, to the chunks from `chunk` on of a row.
template <typename T, int kColumns>
__device__ __forceinline__ void store_weights(Tile<T, kColumns> tile, int row, int chunk,
                                              const uint4& bytes) {
  constexpr int kPerChunk = Tile<T, kColumns>::kPerChunk;
  float values[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float four[4];
    unpack(reinterpret_cast<const uint32_t*>(&bytes)[i], four);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[4 * i + j] = four[j];
  }
#pragma unroll
  for (int c = 0; c < 16 / kPerChunk; ++c) {
    Vec<T, kPerChunk> out;
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) out.at[i] = from_float<T>(values[c * kPerChunk + i]);
    out.store(tile.chunk_at(row, chunk + c));
  }
}

// c[m][n] += x weightᵀ over 16 columns from k on, in fp32: as multiply_rows, whose order of columns
// this is, but for a right operand that tf32 holds exactly.
template <int kM, int kN, int kColumns>
__device__ __forceinline__ void multiply_weights(Accumulator (&c)[kM][kN], Tile<float, kColumns> x,
                                                 Tile<float, kColumns> weight, int k) {
  const int lane = threadIdx.x % kWarp, chunk = k / 4 + lane % 4;
  uint32_t high[kM][2][4], low[kM][2][4];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const auto values = Vec<float, 4>::load(x.chunk_at(8 * r + lane / 4, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t& rest = low[r / 2][i / 2][r % 2 + i % 2 * 2];
      split_tf32(values.at[i], high[r / 2][i / 2][r % 2 + i % 2 * 2], rest);
      if (isinf(values.at[i])) rest = 0;  // infinity less infinity is no number
    }
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const auto right = Vec<uint32_t, 4>::load(
        reinterpret_cast<const uint32_t*>(weight.chunk_at(8 * n + lane / 4, chunk)));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      Accumulator sum = {};  // a tensor core truncates its sums: the long ones are fp32's
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        multiply_add_tf32(sum, low[m][step], right.at[2 * step], right.at[2 * step + 1]);
        multiply_add_tf32(sum, high[m][step], right.at[2 * step], right.at[2 * step + 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] += sum[i];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(WeightOnlyShape<T>::kThreads, WeightOnlyShape<T>::kBlocks)
    weight_only_kernel(const __grid_constant__ WeightOnlyArgs a) {
  using Shape = WeightOnlyShape<T>;
  constexpr int kRows = Shape::kRows, kDepth = Shape::kDepth, kM = 2, kN = 4;
  constexpr int kPieces = kDepth / 16;                       // of a row of the weight
  constexpr int kLoads = kRows * kPieces / Shape::kThreads;  // of a thread
  using Chunks = Tile<T, kDepth>;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  const Chunks stages{reinterpret_cast<T*>(memory)};
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / 2 * 16 * kM, warp_column = warp % 2 * 8 * kN;
  const TilePlace place(a.out.m, a.out.n, kRows);

  const int begin = blockIdx.y * a.split_steps;
  const int steps = min((a.k + kDepth - 1) / kDepth - begin, a.split_steps);
  const auto stage_of = [&](int step) { return stages.from_row(step % 2 * 2 * kRows); };
  const auto load_x = [&](int step) {
    const int column = (begin + step) * kDepth;
    const Rows<T> rows{static_cast<const T*>(a.x) + column, a.x_stride, a.k - column, a.x_vectors};
    load_tile<kRows, Shape::kThreads>(stage_of(step), rows, [&](int r) {
      const int row = place.row + r;
      return row < a.out.m ? row : -1;
    });
  };
  uint4 weights[kLoads];
  const auto load_weights = [&](int step) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = threadIdx.x + i * Shape::kThreads, row = place.column + index / kPieces;
      const int column = (begin + step) * kDepth + index % kPieces * 16;
      weights[i] = load_bytes16(a.weight + row * a.weight_stride + column,
                                row < a.out.n ? a.k - column : 0, true);
    }
  };
  const auto convert_weights = [&](int step) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = threadIdx.x + i * Shape::kThreads;
      store_weights(stage_of(step).from_row(kRows), index / kPieces,
                    index % kPieces * (16 / Chunks::kPerChunk), weights[i]);
    }
  };

  Accumulator c[kM][kN] = {};
#pragma unroll 1
  for (int step = -1; step < steps; ++step) {
    if (step + 1 < steps) {
      load_x(step + 1);
      load_weights(step + 1);
    }
    if (step >= 0) {
      const int depth = min(padded(a.k - (begin + step) * kDepth), kDepth);
      const Chunks x = stage_of(step).from_row(warp_row);
      const Chunks weight = stage_of(step).from_row(kRows + warp_column);
      if constexpr (sizeof(T) == 2) {
        multiply_rows<T>(c, x, weight, depth);
      } else {
#pragma unroll 1
        for (int k = 0; k < depth; k += 16) multiply_weights(c, x, weight, k);
      }
    }
    if (step + 1 < steps) convert_weights(step + 1);
    wait_for_copies();
    __syncthreads();  // the next stage is there for all, and nobody reads this one any more
  }
  auto& scratch = reinterpret_cast<float (*)[16 * kM][8 * kN]>(memory)[warp];
  finish_tile(a.out, c, scratch, place.row + warp_row, place.column + warp_column, blockIdx.y);
}

}  // namespace kernels::int8_matmul
