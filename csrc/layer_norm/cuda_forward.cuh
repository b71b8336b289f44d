// Layer norm forward on CUDA: the mean first, then the centred variance, then the output.
//
// Rows of up to 16384 columns (8192 where they are not 128-bit aligned) stay in registers, so x is
// read once: part of a warp per row while 32 columns per lane hold it, else a block per row. The
// grid is persistent and a thread keeps its weights and biases over all its rows. Longer rows: a
// block per row sweeps over it twice. Maths and shapes: kernels/layer_norm/README.md.
#pragma once

#include "common/cuda/row.cuh"

namespace kernels::layer_norm {

struct ForwardArgs {
  const void* x;              // [rows, cols]
  const void *weight, *bias;  // [cols] or null
  void* y;                    // [rows, cols], dtype of x
  float *mean, *rstd;         // [rows]
  int64_t rows, cols;
  float eps;
  DType weight_dtype, bias_dtype;
};

constexpr int kGroupThreads = 256;  // block size where a warp holds a whole row
constexpr int kLongThreads = 512;   // block size of the sweeping kernels
constexpr int kLongBlocks = 2;      // of those that a multiprocessor holds

// Largest block of a kernel, and how many of those the registers of a multiprocessor shall hold:
// the compiler is told both, the grids are planned by them.
struct Bounds {
  int threads, blocks;
  constexpr int resident() const { return threads * blocks; }
};

constexpr Bounds forward_bounds(int items, int vec) {
  if (items == 8) return {kGroupThreads, vec == 1 ? 3 : 4};
  if (items == 16 && vec > 1) return {256, 3};
  return {512, 1};
}

// Columns a thread owns, by row length: few for short rows, 16 where a block shares the row, 32
// where a warp, or `wide_threads` threads, would otherwise not hold it. Element-wise chunks cost
// registers for their addresses, so rows of those go over to a block per row earlier.
inline int items_for(int64_t cols, int vec, int wide_threads) {
  if (cols <= 8 * kWarp) return 8;
  if (vec == 1 || cols <= 16 * kWarp) return 16;
  return cols <= 32 * kWarp || cols > 16 * wide_threads ? 32 : 16;
}

// The longest rows that the forward keeps in registers.
inline int64_t max_register_columns(int vec) { return vec == 1 ? 16 * 512 : 32 * 512; }

template <typename T, int kVec, int kItems>
__global__ void __launch_bounds__(forward_bounds(kItems, kVec).threads,
                                  forward_bounds(kItems, kVec).blocks)
    forward_rows_kernel(ForwardArgs a) {
  extern __shared__ __align__(kVectorBytes) float tile[];
  __shared__ RowSumScratch<1> scratch;
  __shared__ RowSumScratch<2> squares_scratch;
  constexpr int kChunks = kItems / kVec;
  const int cols = static_cast<int>(a.cols);
  const int own = owned_column<kVec>(0), stride = blockDim.x * kVec;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int turn = 0, squares_turn = 0;

  Vec<T, kVec> x[kChunks];
  const auto load_chunk = [&](int chunk, int64_t of_row) {
    const T* from = static_cast<const T*>(a.x) + of_row * a.cols + own;
    x[chunk] = of_row < a.rows && own + chunk * stride < cols
                   ? Vec<T, kVec>::load(from + chunk * stride)
                   : Vec<T, kVec>::zero();
  };
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) load_chunk(chunk, row);
  float w[kItems], b[kItems];
  load_owned<kVec>(a.weight, a.weight_dtype, 1.f, cols, tile, w);
  load_owned<kVec>(a.bias, a.bias_dtype, 0.f, cols, tile, b);

  // All threads of a block make the same number of rounds: row_sum needs every one of them.
  for (; row - threadIdx.y < a.rows; row += step) {
    float sum[1] = {0.f};
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum[0] += to_float(x[i / kVec].at[i % kVec]);
    row_sum(sum, scratch, turn);
    const float estimate = sum[0] / cols;

    float deviations[2] = {0.f, 0.f};  // their sum, which the estimate's rounding left, and squares
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      x[chunk].forget_conversions();
      if (own + chunk * stride >= cols) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float centred = to_float(x[chunk].at[v]) - estimate;
        deviations[0] += centred;
        deviations[1] = fmaf(centred, centred, deviations[1]);
      }
    }
    row_sum(deviations, squares_scratch, squares_turn);
    const float shift = deviations[0] / cols;
    const float mean = estimate + shift;
    const float rstd = rsqrtf(fmaf(-shift, shift, deviations[1] / cols) + a.eps);

    if (row < a.rows && threadIdx.x == 0) {
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      x[chunk].forget_conversions();
      if (row < a.rows && own + chunk * stride < cols) {
        Vec<T, kVec> y;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          const int i = chunk * kVec + v;
          y.at[v] = from_float<T>(fmaf((to_float(x[chunk].at[v]) - mean) * rstd, w[i], b[i]));
        }
        y.store(static_cast<T*>(a.y) + row * a.cols + own + chunk * stride);
      }
      load_chunk(chunk, row + step);  // the register is free: the next row sets out now
    }
  }
}

// Statistics of a long row: every thread merges its steps as (count, mean, sum of squared distances
// to that mean) after Chan, Golub and LeVeque 1983; the threads are then merged by two sums.
template <typename T, int kVec>
__device__ __forceinline__ float2 long_row_statistics(const T* x, int64_t cols,
                                                      RowSumScratch<1>& scratch, int& turn,
                                                      RowSumScratch<2>& squares_scratch,
                                                      int& squares_turn) {
  constexpr int kChunks = kVec == 1 ? 8 : 16 / kVec;  // of one step
  constexpr int kItems = kChunks * kVec;
  float count = 0.f, mean = 0.f, squares = 0.f;
  for (int64_t base = 0; base < cols; base += static_cast<int64_t>(blockDim.x) * kItems) {
    Vec<T, kVec> part[kChunks];
    float part_count = 0.f, part_sum = 0.f, part_squares = 0.f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t col = base + owned_column<kVec>(chunk);
      part[chunk] = col < cols ? Vec<T, kVec>::load(x + col) : Vec<T, kVec>::zero();
      part_count += col < cols ? kVec : 0;
    }
    if (part_count == 0.f) break;
#pragma unroll
    for (int i = 0; i < kItems; ++i) part_sum += to_float(part[i / kVec].at[i % kVec]);
    const float part_mean = part_sum / part_count;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (base + owned_column<kVec>(chunk) >= cols) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const float centred = to_float(part[chunk].at[v]) - part_mean;
        part_squares = fmaf(centred, centred, part_squares);
      }
    }
    const float total = count + part_count, delta = part_mean - mean;
    const float share = part_count / total;
    mean = fmaf(delta, share, mean);
    squares += part_squares + delta * delta * count * share;
    count = total;
  }
  float sum[1] = {mean * count};
  row_sum(sum, scratch, turn);
  const float estimate = sum[0] / cols, distance = mean - estimate;
  float deviations[2] = {count * distance, squares + count * distance * distance};
  row_sum(deviations, squares_scratch, squares_turn);
  const float shift = deviations[0] / cols;
  return {estimate + shift, fmaf(-shift, shift, deviations[1] / cols)};
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kLongThreads, kLongBlocks) forward_long_kernel(ForwardArgs a) {
  __shared__ RowSumScratch<1> scratch;
  __shared__ RowSumScratch<2> squares_scratch;
  int turn = 0, squares_turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + row * a.cols;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    const float2 statistics =
        long_row_statistics<T, kVec>(x, a.cols, scratch, turn, squares_scratch, squares_turn);
    const float mean = statistics.x, rstd = rsqrtf(statistics.y + a.eps);
    if (threadIdx.x == 0) {
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    const int64_t stride = static_cast<int64_t>(blockDim.x) * kVec;
#pragma unroll 2
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * kVec; col < a.cols; col += stride) {
      const auto in = Vec<T, kVec>::load(x + col);
      float w[kVec], b[kVec];
      load_parameter<kVec>(a.weight, a.weight_dtype, 1.f, col, w);
      load_parameter<kVec>(a.bias, a.bias_dtype, 0.f, col, b);
      Vec<T, kVec> out;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        out.at[v] = from_float<T>(fmaf((to_float(in.at[v]) - mean) * rstd, w[v], b[v]));
      }
      out.store(y + col);
    }
  }
}

}  // namespace kernels::layer_norm
