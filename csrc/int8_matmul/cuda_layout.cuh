// Copies of int8 matrices as the products want them: K contiguous, rows on 16-byte boundaries.
//
// A copy costs two passes over the matrix, and is made in the same call: a matrix whose rows do not
// start on such boundaries is realigned, one with N contiguous transposed, a word at a time in
// registers and then through shared memory.
#pragma once

#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"

namespace kernels::int8_matmul {

struct LayoutArgs {
  const int8_t* from;  // [rows, columns]
  int64_t stride;      // between rows, or between columns where rows are contiguous
  int8_t* to;          // [rows, columns], rows to_stride apart: a multiple of 16
  int64_t to_stride;
  int rows, columns;
  bool words;  // `from` and `stride` are multiples of 4
};

constexpr int kLayoutThreads = 256;

// Four bytes from `from` on, those past `there` as zeros.
__device__ __forceinline__ uint32_t load_word(const int8_t* from, int there, bool words) {
  if (words && there >= 4) return *reinterpret_cast<const uint32_t*>(from);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < there) word |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << 8 * i;
  }
  return word;
}

// A thread per 16 bytes.
__global__ void __launch_bounds__(kLayoutThreads) realign_kernel(const LayoutArgs a) {
  const int64_t chunks = a.to_stride / 16;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLayoutThreads + threadIdx.x;
  const int64_t row = index / chunks;
  const int column = static_cast<int>(index % chunks) * 16;
  if (row >= a.rows) return;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] =
        load_word(a.from + row * a.stride + column + 4 * i, a.columns - column - 4 * i, a.words);
  }
  *reinterpret_cast<uint4*>(a.to + row * a.to_stride + column) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

// A block per 64 x 64 bytes; a warp takes pieces of 32 rows x 16 columns of them, in words of 4
// rows by 4 columns, 8 lanes beside each other along the rows: 32 bytes of a column at a time.
__global__ void __launch_bounds__(kLayoutThreads) transpose_kernel(const LayoutArgs a) {
  constexpr int kTile = 64, kStride = kTile / 4 + 1;  // odd: the words of 8 x 4 lanes part
  __shared__ uint32_t tile[kTile * kStride];
  const int row_tiles = (a.rows + kTile - 1) / kTile;
  const int row0 = blockIdx.x % row_tiles * kTile, column0 = blockIdx.x / row_tiles * kTile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp % 2 * 32 + lane % 8 * 4, column = warp / 2 * 16 + lane / 8 * 4;
  uint32_t in[4];  // of a column each
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = (int64_t{column0} + column + i) * a.stride + row0 + row;
    const int there = column0 + column + i < a.columns ? a.rows - row0 - row : 0;
    in[i] = load_word(a.from + at, there, a.words);
  }
  // Bytes i of the four words, for i = 0 … 3: pairs first, then pairs of pairs.
  const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140),
                 low23 = __byte_perm(in[2], in[3], 0x5140);
  const uint32_t high01 = __byte_perm(in[0], in[1], 0x7362),
                 high23 = __byte_perm(in[2], in[3], 0x7362);
  uint32_t* to = tile + row * kStride + column / 4;
  to[0] = __byte_perm(low01, low23, 0x5410);
  to[kStride] = __byte_perm(low01, low23, 0x7632);
  to[2 * kStride] = __byte_perm(high01, high23, 0x5410);
  to[3 * kStride] = __byte_perm(high01, high23, 0x7632);
  __syncthreads();

  // A warp takes rows 0 … 3 and 16 … 19 of a piece: those lie in different banks.
  const int out_row = warp / 4 * 32 + lane / 16 * 16 + warp % 4 * 4 + lane / 4 % 4;
  const int chunk = lane % 4;
  const int out_column = column0 + 16 * chunk;
  if (row0 + out_row >= a.rows || out_column >= a.to_stride) return;
  const uint32_t* words = tile + out_row * kStride + 4 * chunk;
  *reinterpret_cast<uint4*>(a.to + (int64_t{row0} + out_row) * a.to_stride + out_column) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace kernels::int8_matmul
