// The small kernels of attention on CUDA: delta of every query, gradients of sinks, and the list of
// global positions that a mask on the device stands for.
#pragma once

#include "attention/cuda_scores.cuh"

namespace kernels::attention {

constexpr int kRowThreads = 256;
constexpr int kLanesPerRow = 8;

struct DeltaArgs {
  Heads dout, out;
  const float *lse, *dlse;  // [batches, heads, queries]; dlse or null
  float* delta;             // as lse
  int heads, queries;
  int64_t rows;
};

// delta = sum of dout out over a row, less dlse: eight lanes per row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) delta_kernel(const DeltaArgs a) {
  constexpr int kPerChunk = kVectorBytes / static_cast<int>(sizeof(T));
  const int64_t number =
      (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kLanesPerRow;
  const int64_t row = min(number, a.rows - 1);  // all lanes take part in the sum
  const int64_t plane = row / a.queries;
  const auto start = [&](const Heads& of) {
    return of.rows<T>(plane / a.heads, plane % a.heads, row % a.queries).at;
  };
  const T *dout = start(a.dout), *out = start(a.out);
  float sum = 0.f;
  for (int column = threadIdx.x % kLanesPerRow * kPerChunk; column < a.out.columns;
       column += kLanesPerRow * kPerChunk) {
    if (a.dout.vectors && a.out.vectors && column + kPerChunk <= a.out.columns) {
      const auto x = Vec<T, kPerChunk>::load(dout + column);
      const auto y = Vec<T, kPerChunk>::load(out + column);
#pragma unroll
      for (int i = 0; i < kPerChunk; ++i) sum = fmaf(to_float(x.at[i]), to_float(y.at[i]), sum);
      continue;
    }
    for (int i = column; i < min(column + kPerChunk, a.out.columns); ++i) {
      sum = fmaf(to_float(dout[i]), to_float(out[i]), sum);
    }
  }
#pragma unroll
  for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  if (threadIdx.x % kLanesPerRow != 0 || number >= a.rows) return;
  if (a.dlse != nullptr) sum -= a.dlse[row];
  a.delta[row] = a.lse[row] == -INFINITY ? 0.f : sum;  // a row that saw nothing passes on nothing
}

struct SinkArgs {
  const float *sinks, *lse, *delta;  // [heads], [batches, heads, queries] twice
  float* dsinks;                     // [heads]
  int batches, heads;
  int64_t queries;
};

// dsink = - sum of exp(sink - lse) delta over the queries of a head: a block per head.
__global__ void __launch_bounds__(kRowThreads) dsinks_kernel(const SinkArgs a) {
  __shared__ RowSumScratch<1> scratch;
  const int head = blockIdx.x;
  const float sink = a.sinks[head];
  float sum[1] = {0.f};
  for (int batch = 0; batch < a.batches; ++batch) {
    const int64_t first = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    for (int64_t i = first + threadIdx.x; i < first + a.queries; i += kRowThreads) {
      const float weight = sink == -INFINITY ? 0.f : exp2_fast((sink - a.lse[i]) * kLog2E);
      sum[0] = fmaf(-weight, a.delta[i], sum[0]);
    }
  }
  int turn = 0;
  row_sum(sum, scratch, turn);
  if (threadIdx.x == 0) a.dsinks[head] = sum[0];
}

struct GlobalsArgs {
  const uint8_t* mask;  // [batches, keys], strides below
  int64_t batch, key;
  int global_tokens, keys;
  int *globals, *count;  // [batches, keys], [batches]
};

// The positions that are global, in order: a block per batch entry goes through its mask.
__global__ void __launch_bounds__(kRowThreads) globals_kernel(const GlobalsArgs a) {
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ int found[2][kWarps];  // by the warps of a round; in turn, so one barrier is enough
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int* to = a.globals + static_cast<int64_t>(blockIdx.x) * a.keys;
  int before = 0, turn = 0;
  for (int first = 0; first < a.keys; first += kRowThreads, turn ^= 1) {
    const int position = first + threadIdx.x;
    const bool is_global =
        position < a.keys &&
        (position < a.global_tokens || a.mask[blockIdx.x * a.batch + position * a.key] != 0);
    const unsigned lanes = __ballot_sync(kAllLanes, is_global);
    if (lane == 0) found[turn][warp] = __popc(lanes);
    __syncthreads();
    int place = before;
    for (int other = 0; other < kWarps; ++other) {
      if (other == warp) place = before + __popc(lanes & ((1u << lane) - 1));
      before += found[turn][other];
    }
    if (is_global) to[place] = position;
  }
  if (threadIdx.x == 0) a.count[blockIdx.x] = before;
}

}  // namespace kernels::attention
