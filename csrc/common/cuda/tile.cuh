// Tiles of rows in shared memory: how they come in, how warps multiply them, how they go out.
//
// A tile holds rows of kColumns elements, without padding. The 16-byte chunks of a row are permuted
// by the row's number (`chunk_at`), so that every access below meets each bank once. The numbers
// are 16-bit floats, or fp32: then each product is three of tf32 halves, added in fp32 outside of
// the tensor core, whose own sums are truncated (Ootomo and Yokota 2022,
// doi 10.1177/10943420221090256).
#pragma once

#include "common/cuda/mma.cuh"
#include "common/cuda/vec.cuh"

namespace kernels {

// Rows of a tensor in global memory.
template <typename T>
struct Rows {
  const T* at;
  int64_t stride;  // elements between rows
  int columns;     // those there are; a tile's further columns become zeros
  bool vectors;    // every row starts on a 16-byte boundary
};

template <typename T, int kColumns>
struct Tile {
  static constexpr int kPerChunk = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kColumns / kPerChunk;  // of a row
  T* at;

  // Any 8 rows from a multiple of 8 on have chunk c in 8 different places; so have, for fp32, rows
  // 2i and 2i + 1 with chunks 4c … 4c + 3, and 4 rows of a parity with chunks 2c and 2c + 1.
  __device__ __forceinline__ T* chunk_at(int row, int chunk) const {
    const int permutation = (row & 6) ^ (row & 1) * 5;
    return at + (row * kChunks + (chunk ^ permutation)) * kPerChunk;
  }
  __device__ __forceinline__ Tile from_row(int row) const { return {at + row * kColumns}; }
};

// Columns that matter to products: those beyond are neither loaded nor multiplied.
__device__ __forceinline__ int padded(int columns) { return (columns + 31) & ~31; }

// Row r of the tile = row row_at(r) of `from`, or zeros where that is negative. All threads of the
// block call; wait_for_copies and a barrier must stand between this and the first use.
template <int kRows, int kThreads, typename T, int kColumns, typename F>
__device__ __forceinline__ void load_tile(Tile<T, kColumns> tile, const Rows<T>& from, F row_at) {
  using Chunks = Tile<T, kColumns>;
  const int columns = padded(from.columns);
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * Chunks::kChunks; index += kThreads) {
    const int r = index / Chunks::kChunks, chunk = index % Chunks::kChunks;
    const int column = chunk * Chunks::kPerChunk;
    if (column >= columns) continue;
    const int row = row_at(r);
    const int there = row < 0 ? 0 : min(max(from.columns - column, 0), Chunks::kPerChunk);
    const T* source = there ? from.at + row * from.stride + column : from.at;
    if (from.vectors) {
      copy_async(tile.chunk_at(r, chunk), source, there * static_cast<int>(sizeof(T)));
      continue;
    }
    Vec<T, Chunks::kPerChunk> values = Vec<T, Chunks::kPerChunk>::zero();
#pragma unroll
    for (int i = 0; i < Chunks::kPerChunk; ++i) {
      if (i < there) values.at[i] = source[i];
    }
    values.store(tile.chunk_at(r, chunk));
  }
}

// Two tiles, one after the other in shared memory, of the same rows of two tensors.
template <int kRows, int kThreads, typename T, int kColumns, typename F>
__device__ __forceinline__ void load_tiles(Tile<T, kColumns> tiles, const Rows<T>& first,
                                           const Rows<T>& second, F row_at) {
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const Rows<T> from{which ? second.at : first.at, which ? second.stride : first.stride,
                       which ? second.columns : first.columns,
                       which ? second.vectors : first.vectors};
    load_tile<kRows, kThreads>(tiles.from_row(which * kRows), from, row_at);
  }
}

// Left operands: 16 rows times 16 columns in the layout of mma.sync.
template <typename T>
struct LeftOperand {
  uint32_t part[4];
};
template <>
struct LeftOperand<float> {  // two steps of 8 columns
  uint32_t high[2][4], low[2][4];
};

// Columns k … k + 15 of rows 0 … 15 of the tile. In fp32 the order of the columns within a step is
// that in which one 128-bit load per row finds them; right operands have the same.
template <typename T, int kColumns>
__device__ __forceinline__ LeftOperand<T> load_left(Tile<T, kColumns> tile, int k) {
  const int lane = threadIdx.x % kWarp;
  const int chunk = k / Tile<T, kColumns>::kPerChunk;
  LeftOperand<T> a;
  if constexpr (sizeof(T) == 2) {
    load_matrices(a.part, tile.chunk_at(lane % 16, chunk + lane / 16));
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto x = Vec<float, 4>::load(tile.chunk_at(lane / 4 + 8 * half, chunk + lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = half + i % 2 * 2;
        split_tf32(x.at[i], a.high[i / 2][to], a.low[i / 2][to]);
      }
    }
  }
  return a;
}

// c += a b for one step of 8 columns of fp32.
__device__ __forceinline__ void multiply_add_fp32(Accumulator& c, const uint32_t (&high)[4],
                                                  const uint32_t (&low)[4], float b0, float b1) {
  uint32_t high0, low0, high1, low1;
  split_tf32(b0, high0, low0);
  split_tf32(b1, high1, low1);
  Accumulator sum = {};
  multiply_add_tf32(sum, low, high0, high1);
  multiply_add_tf32(sum, high, low0, low1);
  multiply_add_tf32(sum, high, high0, high1);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

// c[m][n] += a bᵀ: rows 16 m … of `a` against rows 8 n … of `b`, over their first `depth` columns.
template <typename T, int kM, int kN, int kColumns>
__device__ __forceinline__ void multiply_rows(Accumulator (&c)[kM][kN], Tile<T, kColumns> a,
                                              Tile<T, kColumns> b, int depth) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    LeftOperand<T> left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) left[m] = load_left(a.from_row(16 * m), k);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t right[4];  // two tiles of 8 rows, columns k … k + 15
        load_matrices(right, b.chunk_at(8 * n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(c[m][n], left[m].part, right[0], right[1]);
          multiply_add<T>(c[m][n + 1], left[m].part, right[2], right[3]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const auto right = Vec<float, 4>::load(b.chunk_at(8 * n + lane / 4, k / 4 + lane % 4));
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply_add_fp32(c[m][n], left[m].high[step], left[m].low[step], right.at[2 * step],
                              right.at[2 * step + 1]);
          }
        }
      }
    }
  }
}

// The column that elements c and c + 2 of accumulator n of `multiply_columns` stand for.
template <typename T>
__device__ __forceinline__ int column_of(int n, int c) {
  const int pair = threadIdx.x % 4 * 2 + c;
  return sizeof(T) == 2 ? 8 * n + pair : n / 4 * 32 + 4 * pair + n % 4;
}

// c[m][·] += p b: the accumulators p, rounded to T, against the first `columns` columns of `b`.
template <typename T, int kM, int kK, int kN, int kColumns>
__device__ __forceinline__ void multiply_columns(Accumulator (&c)[kM][kN],
                                                 const Accumulator (&p)[kM][kK],
                                                 Tile<T, kColumns> b, int columns) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kK; k += 2) {
      uint32_t left[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Accumulator& from = p[m][k + i / 2];
          left[m][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        if (8 * n >= columns) break;
        uint32_t right[4];  // rows 8 k … 8 k + 15 of two tiles of 8 columns
        load_matrices_transposed(right, b.chunk_at(8 * k + lane % 16, n + lane / 16));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(c[m][n], left[m], right[0], right[1]);
          multiply_add<T>(c[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      uint32_t high[kM][4], low[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // element 0 … 3 of p: (g, 2t), (g, 2t + 1), (g + 8, …)
          split_tf32(p[m][k][i], high[m][i / 2 + i % 2 * 2], low[m][i / 2 + i % 2 * 2]);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 4) {
        if (8 * n >= columns) break;
        const int row = 8 * k + lane % 4 * 2, chunk = 2 * n + lane / 4;
        const auto even = Vec<float, 4>::load(b.chunk_at(row, chunk));
        const auto odd = Vec<float, 4>::load(b.chunk_at(row + 1, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply_add_fp32(c[m][n + i], high[m], low[m], even.at[i], odd.at[i]);
          }
        }
      }
    }
  }
}

// Row r of the warp's 16 kM rows of c, times `factor(r's slot)`, to row row_at(r) of `to`, by way
// of the warp's own rows of `tile`, so that 16 bytes go out at a time. Slot 2 m + h of a lane is
// row 16 m + 8 h + lane / 4. Rows with a negative row_at are left out.
template <typename T, int kM, int kN, int kColumns, typename Scale, typename F>
__device__ __forceinline__ void store_rows(const Accumulator (&c)[kM][kN], Tile<T, kColumns> tile,
                                           const Rows<T>& to, Scale factor, F row_at) {
  using Chunks = Tile<T, kColumns>;
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // the tile's earlier readers are done
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + lane / 4;
      const float scale = factor(2 * m + half);
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const Accumulator& from = c[m][n];
          *reinterpret_cast<uint32_t*>(tile.chunk_at(row, n) + lane % 4 * 2) =
              pack<T>(from[2 * half] * scale, from[2 * half + 1] * scale);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kN; n += 4) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const int e = 2 * half + odd;
            float* to_chunk = tile.chunk_at(row, 2 * n + lane % 4 * 2 + odd);
            *reinterpret_cast<float4*>(to_chunk) =
                make_float4(c[m][n][e] * scale, c[m][n + 1][e] * scale, c[m][n + 2][e] * scale,
                            c[m][n + 3][e] * scale);
          }
        }
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int index = lane; index < 16 * kM * Chunks::kChunks; index += kWarp) {
    const int r = index / Chunks::kChunks, chunk = index % Chunks::kChunks;
    const int column = chunk * Chunks::kPerChunk, row = row_at(r);
    if (row < 0 || column >= to.columns) continue;
    const auto values = Vec<T, Chunks::kPerChunk>::load(tile.chunk_at(r, chunk));
    T* target = const_cast<T*>(to.at) + row * to.stride + column;
    if (to.vectors && column + Chunks::kPerChunk <= to.columns) {
      values.store(target);
      continue;
    }
#pragma unroll
    for (int i = 0; i < Chunks::kPerChunk; ++i) {
      if (column + i < to.columns) target[i] = values.at[i];
    }
  }
}

}  // namespace kernels
