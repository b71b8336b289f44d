// Up to 8 rows of x against the weight on CUDA, bound by the weight's bytes: a warp per two columns
// of y, 16 bytes of each a lane and step.
//
// The rows of x come into shared memory, a slice of their columns at a time: as int8 for dp4a,
// where a float x is quantised on the way if that is cheap (else quantize_rows_kernel has done it);
// or, for a float x against int8 weights, as fp32, the weights becoming fp32 in registers.
#pragma once

#include "int8_matmul/cuda_epilogue.cuh"
#include "int8_matmul/cuda_quantize.cuh"

namespace kernels::int8_matmul {

constexpr int kGemvRows = 8, kGemvOutputs = 2, kGemvThreads = 256;
constexpr int kGemvStep = 16 * kWarp;       // columns a warp takes at a time
constexpr int kGemvSteps = 2;               // of those that it loads before it needs them
constexpr int kGemvShared = 32 * 1024;      // bytes of a slice of all rows
constexpr int64_t kFusedBytes = 16 * 1024;  // of x, which every block then quantises by itself

struct GemvArgs {
  const void* x;  // [m, k]: int8 where x_is_int8, else x_dtype
  int64_t x_stride;
  bool x_is_int8, x_vectors;
  DType x_dtype;
  const float* given_scale;  // of a float x that is quantised here; null: of each row
  const int8_t* weight;      // [n, k], K contiguous
  int64_t weight_stride;
  bool weight_vectors;  // its rows start on 16-byte boundaries
  int k, slice;         // slice: columns of x in shared memory, a multiple of what a warp loads
  Epilogue out;
};

// Four int8 as fp32: the bytes plus 128 become the low bits of 2^23 + 128 + value.
__device__ __forceinline__ void unpack(uint32_t word, float (&values)[4]) {
  word ^= 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - 8388736.f;
  }
}

// 16 bytes, those past `there` as zeros.
__device__ __forceinline__ uint4 load_bytes16(const int8_t* from, int there, bool vectors) {
  if (vectors && there >= 16) return *reinterpret_cast<const uint4*>(from);
  Vec<int8_t, 16> values = Vec<int8_t, 16>::zero();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < there) values.at[i] = from[i];
  }
  return reinterpret_cast<const uint4&>(values);
}

// Calls f(q, numbers) for each four columns 4 q … of row `row` that belong to the thread, from
// `first` up to `last`; columns past k are zeros.
template <typename F>
__device__ __forceinline__ void for_each_four(const GemvArgs& a, int row, int first, int last,
                                              F&& f) {
  with_type(a.x_dtype, a.x, [&](auto* x) {
    for (int col = first + 4 * threadIdx.x; col < last; col += 4 * blockDim.x) {
      float values[4];
      load_neighbours(x + row * a.x_stride, col, a.k, a.x_vectors, values);
      f((col - first) / 4, values);
    }
  });
}

// Where the four columns 4 q … of a slice of fp32 lie: a lane's 16 columns are read as four times
// 16 bytes, those of all lanes beside each other, and neighbours are written beside each other.
__device__ __forceinline__ int spread_four(int q) {
  const int lane = q / 4 % kWarp, part = q % 4;
  return q / (4 * kWarp) * 4 * kWarp + part * kWarp + (lane ^ 2 * part);
}

// The quantisers of a float x's rows.
__device__ __forceinline__ void find_quantizers(const GemvArgs& a, Quantizer (&found)[kGemvRows],
                                                RowMaxScratch& scratch) {
  int turn = 0;
  for (int row = 0; row < a.out.m; ++row) {
    uint32_t largest = 0;
    for_each_four(a, row, 0, a.k, [&](int, float (&values)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(values[i]));
    });
    row_max(largest, scratch, turn);
    if (threadIdx.x == 0) found[row] = quantizer_of(largest, a.given_scale);
  }
  __syncthreads();  // they are there for all
}

// Columns first … first + slice of x's rows into shared memory, as whole steps.
template <bool kInteger>
__device__ __forceinline__ void fill_slice(const GemvArgs& a, int first, void* memory,
                                           const Quantizer (&quantizers)[kGemvRows]) {
  const int width = min((a.k - first + kGemvStep - 1) / kGemvStep * kGemvStep, a.slice);
  for (int row = 0; row < a.out.m; ++row) {
    if constexpr (!kInteger) {
      float4* to = static_cast<float4*>(memory) + row * a.slice / 4;
      for_each_four(a, row, first, first + width, [&](int q, float (&values)[4]) {
        to[spread_four(q)] = make_float4(values[0], values[1], values[2], values[3]);
      });
    } else if (a.x_is_int8) {
      uint4* to = reinterpret_cast<uint4*>(static_cast<int8_t*>(memory) + row * a.slice);
      const int8_t* x = static_cast<const int8_t*>(a.x) + row * a.x_stride;
      for (int col = first + 16 * threadIdx.x; col < first + width; col += 16 * blockDim.x) {
        to[(col - first) / 16] = load_bytes16(x + col, a.k - col, a.x_vectors);
      }
    } else {
      uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<int8_t*>(memory) + row * a.slice);
      const Quantizer quantize = quantizers[row];
      for_each_four(a, row, first, first + width, [&](int q, float (&values)[4]) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          word |= static_cast<uint32_t>(static_cast<uint8_t>(quantize(values[i]))) << 8 * i;
        }
        to[q] = word;
      });
    }
  }
}

// sums[row][output] += the lane's 16 columns of a step that starts at x.
__device__ __forceinline__ void add_products(const GemvArgs& a, const int8_t* x,
                                             const uint4 (&w)[kGemvOutputs],
                                             int (&sums)[kGemvRows][kGemvOutputs]) {
#pragma unroll
  for (int row = 0; row < kGemvRows; ++row) {
    if (row >= a.out.m) break;
    const uint4 v = *reinterpret_cast<const uint4*>(x + row * a.slice + threadIdx.x % kWarp * 16);
#pragma unroll
    for (int o = 0; o < kGemvOutputs; ++o) {
      sums[row][o] = __dp4a(static_cast<int>(v.x), static_cast<int>(w[o].x), sums[row][o]);
      sums[row][o] = __dp4a(static_cast<int>(v.y), static_cast<int>(w[o].y), sums[row][o]);
      sums[row][o] = __dp4a(static_cast<int>(v.z), static_cast<int>(w[o].z), sums[row][o]);
      sums[row][o] = __dp4a(static_cast<int>(v.w), static_cast<int>(w[o].w), sums[row][o]);
    }
  }
}
__device__ __forceinline__ void add_products(const GemvArgs& a, const float* x,
                                             const uint4 (&w)[kGemvOutputs],
                                             float (&sums)[kGemvRows][kGemvOutputs]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int part = 0; part < 4; ++part) {  // four columns each
    float weights[kGemvOutputs][4];
#pragma unroll
    for (int o = 0; o < kGemvOutputs; ++o) {
      unpack(reinterpret_cast<const uint32_t*>(&w[o])[part], weights[o]);
    }
#pragma unroll
    for (int row = 0; row < kGemvRows; ++row) {
      if (row >= a.out.m) break;
      const auto v =
          Vec<float, 4>::load(x + row * a.slice + 4 * (part * kWarp + (lane ^ 2 * part)));
#pragma unroll
      for (int o = 0; o < kGemvOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[row][o] = fmaf(v.at[i], weights[o][i], sums[row][o]);
      }
    }
  }
}

// What a lane has of kGemvSteps steps of the weight.
using WeightSteps = uint4[kGemvSteps][kGemvOutputs];

// The whole 16 bytes from `col` on and of the steps behind it, as far as `whole`; else zeros.
__device__ __forceinline__ void load_steps(const int8_t* const (&weight)[kGemvOutputs], int col,
                                           int whole, WeightSteps& w) {
#pragma unroll
  for (int s = 0; s < kGemvSteps; ++s) {
#pragma unroll
    for (int o = 0; o < kGemvOutputs; ++o) {
      const int at = col + s * kGemvStep;
      w[s][o] = make_uint4(0, 0, 0, 0);
      if (at < whole) w[s][o] = *reinterpret_cast<const uint4*>(weight[o] + at);
    }
  }
}

template <bool kInteger>
__global__ void __launch_bounds__(kGemvThreads) gemv_kernel(const GemvArgs a) {
  using Sum = std::conditional_t<kInteger, int, float>;
  using Element = std::conditional_t<kInteger, int8_t, float>;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  __shared__ Quantizer quantizers[kGemvRows];
  __shared__ RowMaxScratch max_scratch;
  const int lane = threadIdx.x % kWarp;
  const int group = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int column = group * kGemvOutputs;
  const int8_t* weight[kGemvOutputs];  // columns past the last repeat it, and are not stored
#pragma unroll
  for (int o = 0; o < kGemvOutputs; ++o) {
    weight[o] = a.weight + int64_t{min(column + o, a.out.n - 1)} * a.weight_stride;
  }

  constexpr int kBatch = kGemvSteps * kGemvStep;
  const int whole = a.weight_vectors ? a.k / 16 * 16 : 0;
  WeightSteps w, next;  // the weight's bytes set out before x is looked at
  load_steps(weight, 16 * lane, whole, next);
  const bool fused = kInteger && !a.x_is_int8;
  if constexpr (kInteger) {
    if (fused) find_quantizers(a, quantizers, max_scratch);
  }
  Sum sums[kGemvRows][kGemvOutputs] = {};
#pragma unroll 1
  for (int col0 = 0; col0 < a.k; col0 += kBatch) {
    const int col = col0 + 16 * lane, in_slice = col0 % a.slice;
    if (in_slice == 0) {
      if (col0 > 0) __syncthreads();  // the slice before has been read
      fill_slice<kInteger>(a, col0, memory, quantizers);
      __syncthreads();
    }
#pragma unroll
    for (int s = 0; s < kGemvSteps; ++s) {
#pragma unroll
      for (int o = 0; o < kGemvOutputs; ++o) w[s][o] = next[s][o];
    }
    load_steps(weight, col + kBatch, whole, next);
#pragma unroll
    for (int s = 0; s < kGemvSteps; ++s) {
      const int at = col + s * kGemvStep;
      if (at >= whole && at < a.k) {  // the end of a row, or rows off 16-byte boundaries
#pragma unroll
        for (int o = 0; o < kGemvOutputs; ++o) {
          w[s][o] = load_bytes16(weight[o] + at, a.k - at, false);
        }
      }
      const auto* x = reinterpret_cast<const Element*>(memory) + in_slice + s * kGemvStep;
      if (col0 + s * kGemvStep < a.k) add_products(a, x, w[s], sums);
    }
  }

  Sum own = 0;  // lane row * kGemvOutputs + o has y[row][column + o]
#pragma unroll
  for (int row = 0; row < kGemvRows; ++row) {
    if (row >= a.out.m) break;
#pragma unroll
    for (int o = 0; o < kGemvOutputs; ++o) {
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        sums[row][o] += __shfl_xor_sync(kAllLanes, sums[row][o], offset);
      }
      if (lane == row * kGemvOutputs + o) own = sums[row][o];
    }
  }
  const int row = lane / kGemvOutputs, n = column + lane % kGemvOutputs;
  if (row >= a.out.m || n >= a.out.n) return;
  const float row_scale = fused ? quantizers[row].scale : row_scale_of(a.out, row);
  const Sum mine[4] = {own};
  finish(a.out, mine, row, n, 1, row_scale, ColumnFactors(a.out, n, 1));
}

}  // namespace kernels::int8_matmul
