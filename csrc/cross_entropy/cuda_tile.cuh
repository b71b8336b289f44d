// Short rows on CUDA: a block fetches a tile of whole rows, which lie one after another in memory,
// into shared memory in 128-bit steps, whatever the length of a row; a few lanes then share a row.
#pragma once

#include "cross_entropy/cuda_row.cuh"

namespace kernels::cross_entropy {

constexpr int kTileThreads = 256;
constexpr int kTileBlocks = 3;           // of those that a multiprocessor holds
constexpr int64_t kTileRowBytes = 5120;  // longer rows are worth the few sectors of their own ends
constexpr int64_t kTileBytes = 16384;    // aimed at; rows of more than 2048 bytes come by eight
constexpr int kTileItems = 4;            // elements that a lane takes together

struct Tile {
  int lanes;  // of a row, a power of two up to 32: blockDim.x
  int rows;   // at most kTileThreads, so that a thread can finish a row
};

// Rows are shared so that a lane has about 8 elements, and tiles so that every multiprocessor has
// some, but not less than one pass of the block.
inline Tile plan_tile(int64_t rows, int classes, int element_bytes, int multiprocessors) {
  int lanes = 1;
  while (lanes < kWarp && classes > 8 * lanes) lanes *= 2;
  const int64_t row_bytes = int64_t{classes} * element_bytes;
  const int64_t pass = kTileThreads / lanes;  // rows that a block has in hand at a time
  const int64_t most = std::clamp<int64_t>(kTileBytes / row_bytes / pass, 1, kTileThreads / pass);
  const int64_t share = ceil_div(rows, int64_t{multiprocessors} * kTileBlocks);
  return {lanes, static_cast<int>(pass * std::min(most, ceil_div(share, pass)))};
}

// Where element 0 of a tile lies in shared memory: as far from a boundary as in global memory.
template <typename T>
__device__ __forceinline__ T* tile_start(const T* global, void* shared) {
  return static_cast<T*>(shared) +
         reinterpret_cast<uintptr_t>(global) / sizeof(T) % Pieces<T>::kSector;
}

// The elements of a tile from global to shared memory, or back.
template <typename T>
__device__ __forceinline__ void fetch_tile(const T* global, T* tile, int count) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  sweep(global, 0, count, thread, kTileThreads,
        [&](auto part, int at) { store_shared(part, tile + at); });
}
template <typename T>
__device__ __forceinline__ void store_tile(const T* tile, T* global, int count) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  sweep(tile, 0, count, thread, kTileThreads,
        [&](auto part, int at) { store_global(part, global + at); });
}

// Bytes of shared memory: the tile wherever it starts, then `per_row` bytes for each row.
inline size_t tile_bytes(Tile tile, int classes, int element_bytes, size_t per_row) {
  const int64_t elements = int64_t{tile.rows} * classes * element_bytes;
  return ceil_div(elements, kSectorBytes) * kSectorBytes + kSectorBytes + tile.rows * per_row;
}

// The columns that this lane takes of a row, kTileItems at a time: f(int (&columns)[kTileItems]),
// kNoClass where the row has ended. Rows of a warp start at different columns, or the lanes of
// rows of a multiple of 32 words would meet in the same banks.
template <typename F>
__device__ __forceinline__ void for_each_column(int classes, F&& f) {
  const int lanes = blockDim.x, chunks = (classes + lanes - 1) / lanes;
  int chunk = threadIdx.y % (kWarp / lanes) % chunks;
  for (int done = 0; done < chunks; done += kTileItems) {
    int columns[kTileItems];
#pragma unroll
    for (int i = 0; i < kTileItems; ++i) {
      const int column = chunk * lanes + static_cast<int>(threadIdx.x);
      columns[i] = done + i < chunks && column < classes ? column : kNoClass;
      chunk = chunk + 1 == chunks ? 0 : chunk + 1;
    }
    f(columns);
  }
}

}  // namespace kernels::cross_entropy
