// Cross-entropy forward on CUDA: every row is read once; maximum, sum and the rest are kept in
// step.
//
// Short rows come in tiles (cuda_tile.cuh). Longer ones have a warp or a block each, and where
// there are few, several blocks, whose states a last kernel merges in their order.
#pragma once

#include "cross_entropy/cuda_tile.cuh"

namespace kernels::cross_entropy {

constexpr int kRowThreads = 256;  // largest block of the kernels of long rows
constexpr int kRowBlocks = 3;     // of those that a multiprocessor holds

struct ForwardArgs {
  Problem problem;
  float* losses;          // [rows]
  float *lse, *lse_rest;  // [rows] each: log(sum(e^x')), and what its rounding left over
  float* log_prob;        // [rows], or null
  int64_t* best;          // [rows], or null
  RowState* parts;        // [rows, parts], or null: workspace of the few rows that blocks share
  int part_classes;       // of one blockIdx.y
};

// What becomes of a row whose state is complete.
__device__ __forceinline__ void finish(const ForwardArgs& a, int64_t row, Label label,
                                       const RowState& state) {
  const Problem& p = a.problem;
  const float top = isinf(state.max) ? NAN : state.max;
  const float log_sum = logf(state.sum);
  const float lse = top + log_sum;
  // The error of the addition, exactly (Knuth's TwoSum).
  const float part = lse - top;
  a.lse[row] = lse;
  a.lse_rest[row] = (top - (lse - part)) + (log_sum - part);

  float loss = p.z_loss == 0.f ? 0.f : p.z_loss * lse * lse, log_prob = 0.f;
  if (p.shared) loss += fmaf(state.mass, log_sum, state.cost);
  if (label.column != kNoClass) {
    // Not lse - logit, which would show the rounding of lse in the loss of a sure row.
    log_prob = (state.logit - top) - log_sum;
    loss -= p.on * p.weight_of(label.column) * log_prob;
  }
  if (label.wrong) loss = log_prob = NAN;
  if (label.ignored) loss = 0.f;
  a.losses[row] = loss;
  if (a.log_prob != nullptr) a.log_prob[row] = log_prob;
  if (a.best != nullptr) a.best[row] = column_of(state.best);
}

// blockDim = (lanes of a row, rows of a pass).
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    forward_tile_kernel(ForwardArgs a, int tile_rows) {
  extern __shared__ __align__(kSectorBytes) char memory[];
  const Problem& p = a.problem;
  RowState* states = reinterpret_cast<RowState*>(memory);  // [tile_rows]
  void* elements = states + tile_rows;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * tile_rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile_rows; first < p.rows;
       first += step) {
    const int rows = static_cast<int>(min(static_cast<int64_t>(tile_rows), p.rows - first));
    const T* from = static_cast<const T*>(p.input) + first * p.classes;
    T* tile = tile_start(from, elements);
    fetch_tile(from, tile, rows * p.classes);
    __syncthreads();
    // Equal rounds for all threads: merged_lanes needs whole warps.
    for (int r = threadIdx.y; r - static_cast<int>(threadIdx.y) < rows; r += blockDim.y) {
      RowState state = RowState::empty();
      if (r < rows) {
        for_each_column(p.classes, [&](const int (&columns)[kTileItems]) {
          float raw[kTileItems], share[kTileItems];
#pragma unroll
          for (int i = 0; i < kTileItems; ++i) {
            raw[i] = columns[i] == kNoClass ? 0.f : to_float(tile[r * p.classes + columns[i]]);
            float one[1] = {0.f};
            if (p.shared && columns[i] != kNoClass) load_shares<T>(p, first + r, columns[i], one);
            share[i] = one[0];
          }
          add(state, p, raw, share, columns, kNoClass, a.best != nullptr);
        });
      }
      state = merged_lanes(state, blockDim.x);
      if (threadIdx.x == 0 && r < rows) states[r] = state;
    }
    __syncthreads();
    if (thread < rows) {
      RowState state = states[thread];
      const Label label = p.label_of(first + thread);
      if (label.column != kNoClass) {
        state.logit = p.logit(to_float(tile[thread * p.classes + label.column]));
      }
      finish(a, first + thread, label, state);
    }
    __syncthreads();  // the next tile goes where this one is
  }
}

// blockDim = (threads of a row, rows of a block): 32 of 8 rows, or more of one. blockIdx.y: which
// part of the rows, a.part_classes each.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) forward_rows_kernel(ForwardArgs a) {
  __shared__ RowState warp_states[2][kRowThreads / kWarp];
  const Problem& p = a.problem;
  const int begin = blockIdx.y * a.part_classes, end = min(begin + a.part_classes, p.classes);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  int turn = 0;
  for (; row - threadIdx.y < p.rows; row += step) {  // equal rounds for all threads of the block
    RowState state = RowState::empty();
    if (row < p.rows) {
      const int target = p.label_of(row).column;
      const T* x = static_cast<const T*>(p.input) + row * p.row_stride;
      sweep(x, begin, end, threadIdx.x, blockDim.x, [&]<int kCount>(Vec<T, kCount> in, int column) {
        float raw[kCount], share[kCount];
        int columns[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          raw[i] = to_float(in.at[i]);
          columns[i] = column + i;
        }
        if (p.shared) load_shares<T>(p, row, column, share);
        add(state, p, raw, share, columns, target, a.best != nullptr);
      });
    }
    state = merged_lanes(state, kWarp);
    if (blockDim.x > kWarp) {
      const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
      if (lane == 0) warp_states[turn][warp] = state;
      __syncthreads();
      if (warp == 0) {
        state = lane < blockDim.x / kWarp ? warp_states[turn][lane] : RowState::empty();
        state = merged_lanes(state, kWarp);
      }
      turn ^= 1;  // slower warps may still read this set when the next row's is written
    }
    if (threadIdx.x != 0 || row >= p.rows) continue;
    if (a.parts == nullptr) {
      finish(a, row, p.label_of(row), state);
    } else {
      a.parts[row * gridDim.y + blockIdx.y] = state;
    }
  }
}

// A warp per row; the same order of merging for any grid.
__global__ void __launch_bounds__(kWarp) merge_parts_kernel(ForwardArgs a, int parts) {
  const int64_t row = blockIdx.x;
  RowState state = RowState::empty();
  for (int part = threadIdx.x; part < parts; part += kWarp) {
    state = merged(state, a.parts[row * parts + part]);
  }
  state = merged_lanes(state, kWarp);
  if (threadIdx.x == 0) finish(a, row, a.problem.label_of(row), state);
}

}  // namespace kernels::cross_entropy
