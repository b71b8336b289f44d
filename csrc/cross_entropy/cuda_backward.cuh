// Cross-entropy backward on CUDA: every row is read once and its gradient written once, which may
// go where the row was. With K the sum of a row's shares, g = dlosses and h = dlse,
//   dx'_c = (g (K + 2 z_loss lse) + h) softmax_c - g k_c.
//
// Short rows come in tiles (cuda_tile.cuh); of longer ones a thread's vectors are independent, so
// rows are cut into parts freely. K of probabilities takes a reading of them beforehand.
#pragma once

#include "cross_entropy/cuda_forward.cuh"

namespace kernels::cross_entropy {

struct BackwardArgs {
  Problem problem;
  const float *dlosses, *dlse;          // [rows], the latter or null
  int64_t dlosses_stride, dlse_stride;  // elements, 0 where all rows have the same
  const float *lse, *lse_rest;          // [rows] each, as the forward left them
  const float* mass;                    // [rows]: K of probabilities, or null
  const float* total_weight;            // [1]: the sum of weight, or null where there is no weight
  void* dinput;                         // [rows, classes], dtype of input, perhaps input itself
  int64_t dinput_stride;                // elements from one row to the next
  int part_classes;                     // backward_rows_kernel: of one blockIdx.y
};

// What all elements of a row share.
struct alignas(16) RowGradient {
  float lse, lse_rest;
  float slope;  // the factor of softmax
  float g;      // the factor of k_c
  float on;     // what the target's class gets less
  int target;   // its column, or kNoClass
  int zero;     // an ignored row, whatever its logits
  int unused;

  __device__ __forceinline__ static RowGradient of(const BackwardArgs& a, int64_t row) {
    const Problem& p = a.problem;
    const Label label = p.label_of(row);
    RowGradient r;
    r.lse = a.lse[row];
    r.lse_rest = a.lse_rest[row];
    r.g = label.ignored ? 0.f : a.dlosses[row * a.dlosses_stride];
    float mass = p.off * (a.total_weight == nullptr ? p.classes : a.total_weight[0]);
    if (a.mass != nullptr) mass = a.mass[row];
    const float on = label.column == kNoClass ? 0.f : p.on * p.weight_of(label.column);
    if (label.column != kNoClass) mass += on;
    r.on = r.g * on;
    r.slope = r.g * fmaf(2.f * p.z_loss, r.lse, mass);
    if (label.ignored) r.slope = 0.f;
    if (label.wrong) r.slope = NAN;
    if (a.dlse != nullptr) r.slope += a.dlse[row * a.dlse_stride];
    r.target = label.column;
    r.zero = label.ignored && a.dlse == nullptr;
    r.unused = 0;
    return r;
  }

  __device__ __forceinline__ float of_element(const Problem& p, float raw, float share,
                                              int column) const {
    const float x = p.logit(raw);
    float dx = slope * exp_of((x - lse) - lse_rest);
    if (p.shared) dx = fmaf(-g, share, dx);
    if (column == target) dx -= on;
    if (p.softcap != 0.f) {
      const float tanh = x / p.softcap;
      dx *= fmaf(-tanh, tanh, 1.f);
    }
    return dx * p.logit_scale;
  }
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    backward_tile_kernel(BackwardArgs a, int tile_rows) {
  extern __shared__ __align__(kSectorBytes) char memory[];
  const Problem& p = a.problem;
  RowGradient* gradients = reinterpret_cast<RowGradient*>(memory);  // [tile_rows]
  void* elements = memory + tile_rows * sizeof(RowGradient);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * tile_rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_rows; first < p.rows;
       first += step) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(tile_rows), p.rows - first));
    const T* from = static_cast<const T*>(p.input) + first * p.classes;
    T* tile = tile_start(from, elements);
    fetch_tile(from, tile, rows * p.classes);
    if (thread < rows) gradients[thread] = RowGradient::of(a, first + thread);
    __syncthreads();
    for (int r = threadIdx.y; r < rows; r += blockDim.y) {
      const RowGradient gradient = gradients[r];
      for_each_column(p.classes, [&](const int (&columns)[kTileItems]) {
#pragma unroll
        for (int i = 0; i < kTileItems; ++i) {
          if (columns[i] == kNoClass) continue;
          T& element = tile[r * p.classes + columns[i]];
          float share[1] = {0.f};
          if (p.shared) load_shares<T>(p, first + r, columns[i], share);
          const float dx = gradient.of_element(p, to_float(element), share[0], columns[i]);
          element = from_float<T>(gradient.zero ? 0.f : dx);
        }
      });
    }
    __syncthreads();
    store_tile(tile, static_cast<T*>(a.dinput) + first * p.classes, rows * p.classes);
    __syncthreads();  // the next tile goes where this one is
  }
}

// blockDim and blockIdx.y as forward_rows_kernel's.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) backward_rows_kernel(BackwardArgs a) {
  const Problem& p = a.problem;
  const int begin = blockIdx.y * a.part_classes, end = min(begin + a.part_classes, p.classes);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (; row < p.rows; row += step) {
    const RowGradient gradient = RowGradient::of(a, row);
    const T* x = static_cast<const T*>(p.input) + row * p.row_stride;
    T* dx = static_cast<T*>(a.dinput) + row * a.dinput_stride;
    if (gradient.zero) {  // its logits need not be read
      clear(dx, begin, end, threadIdx.x, blockDim.x);
      continue;
    }
    const bool alike =
        (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % kVectorBytes ==
        0;  // both rows start as far from a boundary
    sweep(x, begin, end, threadIdx.x, blockDim.x, [&]<int kCount>(Vec<T, kCount> part, int column) {
      float share[kCount] = {};
      if (p.shared) load_shares<T>(p, row, column, share);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        part.at[i] =
            from_float<T>(gradient.of_element(p, to_float(part.at[i]), share[i], column + i));
      }
      if (alike) {
        store_global(part, dx + column);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) dx[column + i] = part.at[i];
      }
    });
  }
}

// mass[row] = sum of w_c (on q_c + off): a block per row of Q probabilities.
template <typename Q>
__global__ void __launch_bounds__(kRowThreads) mass_kernel(Problem p, float* mass) {
  __shared__ RowSumScratch<1> scratch;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Q* q = static_cast<const Q*>(p.probabilities) + row * p.classes;
    float sum[1] = {0.f};
    sweep(q, 0, p.classes, threadIdx.x, blockDim.x,
          [&]<int kCount>(Vec<Q, kCount> part, int column) {
            float w[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) w[i] = 1.f;
            if (p.weight != nullptr) load_floats(p.weight + column, w);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              sum[0] = fmaf(w[i], fmaf(p.on, to_float(part.at[i]), p.off), sum[0]);
            }
          });
    row_sum(sum, scratch, turn);
    if (threadIdx.x == 0) mass[row] = sum[0];
  }
}

}  // namespace kernels::cross_entropy
