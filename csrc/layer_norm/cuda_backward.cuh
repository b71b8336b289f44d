// Layer norm backward on CUDA. With xhat = (x - mean) rstd and g = dy w:
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  dweight = sum(dy xhat),  dbias = sum(dy).
//
// Enough rows that fit registers: one persistent pass reads x and dy once, writes dx, and every
// block leaves one fp32 row of column sums; a second kernel adds those rows up, always in the same
// order. Few or very long rows: dx by itself, and the column sums by a kernel whose blocks are
// tiles of columns times ranges of rows. No atomics.
#pragma once

#include "layer_norm/cuda_forward.cuh"

namespace kernels::layer_norm {

struct BackwardArgs {
  const void *dy, *x;        // [rows, cols]
  const void* weight;        // [cols] or null
  const float *mean, *rstd;  // [rows]
  void* dx;                  // [rows, cols] or null, dtype of x
  void *dweight, *dbias;     // [partials, cols] or null
  int64_t rows, cols;
  DType weight_dtype, dweight_dtype, dbias_dtype;
  int64_t rows_per_range;  // column_sums_kernel: rows of one blockIdx.y
};

constexpr int kSumItems = 8;   // columns per thread of column_sums_kernel
constexpr int kSumRows = 8;    // its blockDim.y
constexpr int kSumBlocks = 3;  // of those that a multiprocessor holds

constexpr Bounds backward_bounds(int items) {
  if (items == 8) return {kGroupThreads, 3};
  return items == 16 ? Bounds{512, 1} : Bounds{kGroupThreads, 1};
}

// The longest rows whose sums the backward keeps in registers.
constexpr int64_t kMaxRegisterColumnsBackward = 16 * backward_bounds(16).threads;

// dx, and where dweight or dbias is given the column sums of the block's rows at row blockIdx.x.
template <typename T, int kVec, int kItems>
__global__ void __launch_bounds__(backward_bounds(kItems).threads, backward_bounds(kItems).blocks)
    backward_rows_kernel(BackwardArgs a) {
  extern __shared__ __align__(kVectorBytes) float tile[];
  __shared__ RowSumScratch<2> scratch;
  constexpr int kChunks = kItems / kVec;
  const int cols = static_cast<int>(a.cols);
  const int own = owned_column<kVec>(0), stride = blockDim.x * kVec;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool sums_wanted = a.dweight != nullptr || a.dbias != nullptr;
  int turn = 0;

  Vec<T, kVec> x[kChunks], dy[kChunks];
  const auto load_chunk = [&](int chunk, int64_t of_row) {
    const int64_t at = of_row * a.cols + own;
    x[chunk] = dy[chunk] = Vec<T, kVec>::zero();
    if (of_row < a.rows && own + chunk * stride < cols) {
      x[chunk] = Vec<T, kVec>::load(static_cast<const T*>(a.x) + at + chunk * stride);
      dy[chunk] = Vec<T, kVec>::load(static_cast<const T*>(a.dy) + at + chunk * stride);
    }
  };
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) load_chunk(chunk, row);
  float w[kItems], dw[kItems] = {}, db[kItems] = {};
  load_owned<kVec>(a.weight, a.weight_dtype, 1.f, cols, tile, w);

  for (; row - threadIdx.y < a.rows; row += step) {  // equal rounds for all threads of the block
    const float mean = row < a.rows ? a.mean[row] : 0.f;
    const float rstd = row < a.rows ? a.rstd[row] : 0.f;
    float sums[2] = {0.f, 0.f};  // of g and of g xhat; dy is 0 outside the row
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float xhat = (to_float(x[i / kVec].at[i % kVec]) - mean) * rstd;
      const float dy_i = to_float(dy[i / kVec].at[i % kVec]);
      const float g = dy_i * w[i];
      sums[0] += g;
      sums[1] = fmaf(g, xhat, sums[1]);
      if (sums_wanted) {
        dw[i] = fmaf(dy_i, xhat, dw[i]);
        db[i] += dy_i;
      }
    }
    row_sum(sums, scratch, turn);
    const float mean_g = sums[0] / cols, mean_g_xhat = sums[1] / cols;

#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      x[chunk].forget_conversions();
      dy[chunk].forget_conversions();
      if (row < a.rows && own + chunk * stride < cols) {
        Vec<T, kVec> dx;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          const float xhat = (to_float(x[chunk].at[v]) - mean) * rstd;
          const float g = to_float(dy[chunk].at[v]) * w[chunk * kVec + v];
          dx.at[v] = from_float<T>(rstd * (g - mean_g - xhat * mean_g_xhat));
        }
        dx.store(static_cast<T*>(a.dx) + row * a.cols + own + chunk * stride);
      }
      load_chunk(chunk, row + step);  // the registers are free: the next row sets out now
    }
  }
  const int64_t offset = blockIdx.x * a.cols;
  if (a.dweight != nullptr) {
    store_column_sums<kVec>(dw, cols, tile, a.dweight, a.dweight_dtype, offset);
  }
  if (a.dbias != nullptr) {
    store_column_sums<kVec>(db, cols, tile, a.dbias, a.dbias_dtype, offset);
  }
}

// dx of long rows: a block per row, one sweep for the two sums and one for dx.
template <typename T, int kVec>
__global__ void __launch_bounds__(kLongThreads, kLongBlocks) backward_long_kernel(BackwardArgs a) {
  __shared__ RowSumScratch<2> scratch;
  int turn = 0;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kVec;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.cols;
    const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sums[2] = {0.f, 0.f};  // of g and of g xhat
#pragma unroll 2
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVec; col < a.cols; col += stride) {
      const auto x_in = Vec<T, kVec>::load(x + col), dy_in = Vec<T, kVec>::load(dy + col);
      float w[kVec];
      load_parameter<kVec>(a.weight, a.weight_dtype, 1.f, col, w);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float g = to_float(dy_in.at[v]) * w[v];
        sums[0] += g;
        sums[1] = fmaf(g, (to_float(x_in.at[v]) - mean) * rstd, sums[1]);
      }
    }
    row_sum(sums, scratch, turn);
    const float mean_g = sums[0] / a.cols, mean_g_xhat = sums[1] / a.cols;
#pragma unroll 2
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVec; col < a.cols; col += stride) {
      const auto x_in = Vec<T, kVec>::load(x + col), dy_in = Vec<T, kVec>::load(dy + col);
      float w[kVec];
      load_parameter<kVec>(a.weight, a.weight_dtype, 1.f, col, w);
      Vec<T, kVec> out;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float xhat = (to_float(x_in.at[v]) - mean) * rstd;
        const float g = to_float(dy_in.at[v]) * w[v];
        out.at[v] = from_float<T>(rstd * (g - mean_g - xhat * mean_g_xhat));
      }
      out.store(dx + col);
    }
  }
}

// Column sums of rows [blockIdx.y * rows_per_range, ...) for the columns of tile blockIdx.x, at row
// blockIdx.y of dweight and dbias. Lanes hold columns, the warps of a block take rows in turn.
template <typename T, int kVec>
__global__ void __launch_bounds__(kWarp* kSumRows, kSumBlocks) column_sums_kernel(BackwardArgs a) {
  extern __shared__ __align__(kVectorBytes) float tile[];
  constexpr int kChunks = kSumItems / kVec;
  constexpr int kUnroll = kVec == 1 ? 1 : 2;  // rows in flight; 8 chunks are enough by themselves
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * kWarp * kSumItems;
  const int cols = static_cast<int>(min(a.cols - first_col, int64_t{kWarp * kSumItems}));
  const int64_t begin = blockIdx.y * a.rows_per_range;
  const int64_t end = min(begin + a.rows_per_range, a.rows);
  float dw[kSumItems] = {}, db[kSumItems] = {};

#pragma unroll kUnroll
  for (int64_t row = begin + threadIdx.y; row < end; row += kSumRows) {
    const T* x = static_cast<const T*>(a.x) + row * a.cols + first_col;
    const T* dy = static_cast<const T*>(a.dy) + row * a.cols + first_col;
    const float mean = a.dweight != nullptr ? a.mean[row] : 0.f;
    const float rstd = a.dweight != nullptr ? a.rstd[row] : 0.f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int col = owned_column<kVec>(chunk);
      if (col >= cols) continue;
      const auto dy_in = Vec<T, kVec>::load(dy + col);
      const auto x_in = a.dweight != nullptr ? Vec<T, kVec>::load(x + col) : Vec<T, kVec>::zero();
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const int i = chunk * kVec + v;
        const float dy_i = to_float(dy_in.at[v]);
        if (a.dweight != nullptr) dw[i] = fmaf(dy_i, (to_float(x_in.at[v]) - mean) * rstd, dw[i]);
        db[i] += dy_i;
      }
    }
  }
  const int64_t offset = blockIdx.y * a.cols + first_col;
  if (a.dweight != nullptr) {
    store_column_sums<kVec>(dw, cols, tile, a.dweight, a.dweight_dtype, offset);
  }
  if (a.dbias != nullptr) {
    store_column_sums<kVec>(db, cols, tile, a.dbias, a.dbias_dtype, offset);
  }
}

struct ReduceArgs {
  const float* partials;   // [gradients, count, cols]
  void *out, *second_out;  // [cols] each
  DType dtype, second_dtype;
  int64_t count, cols;
};

// out = sum of the rows of partials. blockIdx.y picks the gradient, lanes hold columns, the warps
// of a block take rows in turn and are then added in order.
__global__ void __launch_bounds__(kWarp* kWarp) reduce_partials_kernel(ReduceArgs a) {
  __shared__ float tile[kWarp][kWarp];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const float* partials = a.partials + blockIdx.y * a.count * a.cols + col;
  float sum = 0.f;
  if (col < a.cols) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < a.count; i += blockDim.y) sum += partials[i * a.cols];
  }
  tile[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= a.cols) return;
  for (int y = 1; y < blockDim.y; ++y) sum += tile[y][threadIdx.x];
  if (blockIdx.y == 0) {
    store_as(a.out, a.dtype, col, sum);
  } else {
    store_as(a.second_out, a.second_dtype, col, sum);
  }
}

}  // namespace kernels::layer_norm
