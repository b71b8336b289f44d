// A row spread over threads: which columns a thread owns, how a launch shapes its blocks, and how
// per-column parameters come in and per-column sums go out, whole sectors at a time.
//
// blockDim = (threads of a row, rows of a block). A thread owns kItems columns, as chunks of kVec
// neighbours; chunk c of thread t starts at column (c * blockDim.x + t) * kVec, so that the threads
// of a warp touch one contiguous piece of the row per instruction.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"

namespace kernels {

template <int kVec>
__device__ __forceinline__ int owned_column(int chunk) {
  return (chunk * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kVec;
}

__device__ __forceinline__ int block_threads() { return blockDim.x * blockDim.y; }
__device__ __forceinline__ int thread_in_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

// A block for rows of `cols` columns: part of a warp per row where kItems columns per lane hold it
// (then `threads` threads share several rows), else the whole block for one row.
inline dim3 row_block(int64_t cols, int vec, int items, int threads) {
  if (cols > static_cast<int64_t>(kWarp) * items) {
    return dim3(static_cast<unsigned>(ceil_div(ceil_div(cols, items), kWarp) * kWarp), 1);
  }
  int lanes = 1;
  while (lanes < kWarp && lanes * vec < cols) lanes *= 2;
  return dim3(lanes, threads / lanes);
}

// Bytes of shared memory with `floats` per thread; store_column_sums needs kItems of them.
inline size_t tile_bytes(dim3 block, int floats) {
  return sizeof(float) * block.x * block.y * floats;
}
// What load_owned needs: a chunk of the block, or the longest row that a warp holds (32 kItems
// columns, spread over 256 threads).
constexpr int load_tile_floats(int vec, int items) { return std::max(vec, items / 8); }

// Where a tile keeps a column. Threads that read 8 neighbours as two float4 would meet in the banks
// pairwise; moving every other group of 32 by one float4 keeps them apart.
__device__ __forceinline__ int tile_slot(int col) { return col ^ ((col / 32 % 2) * 4); }

template <int kVec>
__device__ __forceinline__ void read_tile(const float* tile, int col, float* out) {
  constexpr int kStep = kVec == 1 ? 1 : 4;
#pragma unroll
  for (int v = 0; v < kVec; v += kStep) {
    const auto part = Vec<float, kStep>::load(tile + tile_slot(col + v));
#pragma unroll
    for (int i = 0; i < kStep; ++i) out[v + i] = part.at[i];
  }
}

template <int kVec>
__device__ __forceinline__ void write_tile(float* tile, int col, const float* in) {
  constexpr int kStep = kVec == 1 ? 1 : 4;
#pragma unroll
  for (int v = 0; v < kVec; v += kStep) {
    Vec<float, kStep> part;
#pragma unroll
    for (int i = 0; i < kStep; ++i) part.at[i] = in[v + i];
    part.store(tile + tile_slot(col + v));
  }
}

// owned[i] = parameter[column of item i] as fp32, or `missing` where the parameter is null.
// The block reads each column once, neighbours by neighbours, and hands the values on through
// shared memory: a thread that fetched its own 8 columns of an fp32 vector would use half of every
// sector it asks for.
template <int kVec, int kItems>
__device__ __forceinline__ void load_owned(const void* parameter, DType dtype, float missing,
                                           int cols, float* tile, float (&owned)[kItems]) {
  constexpr int kChunks = kItems / kVec;
#pragma unroll
  for (int i = 0; i < kItems; ++i) owned[i] = missing;
  if (parameter == nullptr) return;

  if (blockDim.x <= kWarp) {  // the rows of the block share one reading
    __syncthreads();          // the tile's earlier readers are done
    with_type(dtype, parameter, [&](auto* p) {
#pragma unroll 4
      for (int col = thread_in_block(); col < cols; col += block_threads()) {
        tile[tile_slot(col)] = to_float(p[col]);
      }
    });
    __syncthreads();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int col = owned_column<kVec>(chunk);
      if (col < cols) read_tile<kVec>(tile, col, owned + chunk * kVec);
    }
    return;
  }
  with_type(dtype, parameter, [&](auto* p) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = i * blockDim.x + threadIdx.x;
      if (col < cols) owned[i] = to_float(p[col]);
    }
  });
  if constexpr (kVec >
                1) {  // chunk by chunk from "every blockDim.x-th column" to "kVec neighbours"
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        tile[tile_slot(v * blockDim.x + threadIdx.x)] = owned[chunk * kVec + v];
      }
      __syncthreads();
      read_tile<kVec>(tile, threadIdx.x * kVec, owned + chunk * kVec);
    }
  }
}

// to[offset + column] = sum of `owned` over the rows of the block, always in the same order.
template <int kVec, int kItems>
__device__ __forceinline__ void store_column_sums(float (&owned)[kItems], int cols, float* tile,
                                                  void* to, DType dtype, int64_t offset) {
  // First the rows inside a warp, then the warps one after another.
  for (int other = blockDim.x; other < kWarp; other *= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) owned[i] += __shfl_xor_sync(kAllLanes, owned[i], other);
  }
  const int thread = thread_in_block(), threads = block_threads();
  const int width = blockDim.x * kItems;
  const bool shared_warp = blockDim.x <= kWarp;
  const int groups = shared_warp ? threads / kWarp : 1;

  __syncthreads();  // the tile's earlier readers are done
  if (!shared_warp || thread % kWarp < blockDim.x) {
    float* group_tile = tile + (shared_warp ? thread / kWarp * width : 0);
#pragma unroll
    for (int chunk = 0; chunk < kItems / kVec; ++chunk) {
      write_tile<kVec>(group_tile, owned_column<kVec>(chunk), owned + chunk * kVec);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int col = thread; col < cols; col += threads) {
    float sum = 0.f;
    for (int group = 0; group < groups; ++group) sum += tile[group * width + tile_slot(col)];
    store_as(to, dtype, offset + col, sum);
  }
}

// kVec neighbours of a parameter as fp32, or `missing` where it is null.
template <int kVec>
__device__ __forceinline__ void load_parameter(const void* parameter, DType dtype, float missing,
                                               int64_t col, float (&out)[kVec]) {
#pragma unroll
  for (int v = 0; v < kVec; ++v) out[v] = missing;
  if (parameter == nullptr) return;
  with_type(dtype, parameter, [&](auto* p) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(p)>>;
    constexpr int kWidest = kVectorBytes / static_cast<int>(sizeof(T));
    constexpr int kStep = kVec < kWidest ? kVec : kWidest;
#pragma unroll
    for (int first = 0; first < kVec; first += kStep) {
      const auto part = Vec<T, kStep>::load(p + col + first);
#pragma unroll
      for (int v = 0; v < kStep; ++v) out[first + v] = to_float(part.at[v]);
    }
  });
}

}  // namespace kernels
