// Rows to int8 on CUDA: part of a warp per short row, else a block per row, each thread with 32 of
// its numbers in registers. Longer rows' further numbers are read again by every sweep.
//
// The numbers are x's, or those of its layer norm: then a thread has 16 of them, and the weights
// and biases of their columns for all rows of a persistent block. They stay fp32 from the
// statistics to the rounding. Maths and shapes: kernels/int8_matmul/README.md.
#pragma once

#include "common/cuda/row.cuh"

namespace kernels::int8_matmul {

constexpr int kMaxInt8 = 127;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kSmallestBits = 0x03800000u;  // 2^-120: smaller rows count as zeros

// How the numbers of a row become int8, and back.
struct Quantizer {
  float inverse, scale;

  // Ties to even. NaN, which is infinity times 0 here, becomes 0.
  __device__ __forceinline__ int8_t operator()(float x) const {
    const int rounded = __float2int_rn(__fmul_rn(x, inverse));
    return static_cast<int8_t>(min(max(rounded, -kMaxInt8), kMaxInt8));
  }
};

// From the bits of the row's largest magnitude, which order NaN above infinity; `given`: the scale,
// or null.
__device__ __forceinline__ Quantizer quantizer_of(uint32_t largest_bits, const float* given) {
  if (largest_bits >= kInfinityBits) return {0.f, NAN};
  if (given != nullptr) return {__fdiv_rn(1.f, *given), *given};
  if (largest_bits < kSmallestBits) return {0.f, 1.f};
  const float largest = __uint_as_float(largest_bits);
  return {__fdiv_rn(kMaxInt8, largest), __fdiv_rn(largest, kMaxInt8)};
}

__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

// The maxima of a block's warps: two sets used in turn, as in RowSumScratch.
using RowMaxScratch = uint32_t[2][kWarp];

// Replaces v by its maximum over the blockDim.x threads of the row, as row_sum its sums.
__device__ __forceinline__ void row_max(uint32_t& v, RowMaxScratch& scratch, int& turn) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < blockDim.x) v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  if (blockDim.x <= kWarp) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[turn][warp] = v;
  __syncthreads();
  v = lane < blockDim.x / kWarp ? scratch[turn][lane] : 0;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  turn ^= 1;
}

// kVec neighbours from `col` on as fp32, zeros from `cols` on.
template <int kVec, typename T>
__device__ __forceinline__ void load_neighbours(const T* row, int col, int cols, bool vectors,
                                                float (&out)[kVec]) {
  Vec<T, kVec> values = Vec<T, kVec>::zero();
  if (vectors && col + kVec <= cols) {
    values = Vec<T, kVec>::load(row + col);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (col + i < cols) values.at[i] = row[col + i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = to_float(values.at[i]);
}

struct RowsArgs {
  const void* x;  // [rows, cols], rows x_stride elements apart
  int64_t x_stride;
  const void *weight, *bias;  // of the layer norm: [cols] or null
  DType weight_dtype, bias_dtype;
  float eps;
  const float* given;  // the scale, or null: from the row's largest magnitude
  int8_t* values;      // [rows, cols], rows values_stride apart
  int64_t values_stride;
  float* scale;  // [rows]
  int64_t rows;
  int cols;
  bool vectors;     // rows of x start on 16-byte boundaries
  bool parameters;  // so do weight and bias
  bool stores;      // a thread's values may be stored at once
};

// What the numbers are, and whether a row of the layer norm is too long for registers.
enum class RowKind { kPlain, kNormalized, kLongNormalized };

constexpr int kPlainItems = 32, kNormalizedItems = 16;  // numbers that a thread keeps
constexpr int kGroupThreads = 128;                      // block size where a warp holds a whole row
constexpr int kMaxRowThreads = 640;  // else the largest block, and all that a multiprocessor holds

// kVec neighbours of a parameter as fp32, or `missing` where it is null or past the row.
template <int kVec>
__device__ __forceinline__ void load_parameters(const void* parameter, DType dtype, float missing,
                                                int col, int cols, bool vectors,
                                                float (&out)[kVec]) {
  if (vectors && col + kVec <= cols) {
    return load_parameter<kVec>(parameter, dtype, missing, col, out);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = missing;
  if (parameter == nullptr) return;
  with_type(dtype, parameter, [&](auto* from) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (col + i < cols) out[i] = to_float(from[col + i]);
    }
  });
}

template <typename T, RowKind kKind>
__global__ void __launch_bounds__(kMaxRowThreads) quantize_rows_kernel(const RowsArgs a) {
  constexpr bool kNormalized = kKind != RowKind::kPlain;
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kItems = kNormalized ? kNormalizedItems : kPlainItems;
  constexpr int kChunks = kKind == RowKind::kLongNormalized ? 0 : kItems / kVec;
  __shared__ RowSumScratch<1> scratch;
  __shared__ RowSumScratch<2> squares_scratch;
  __shared__ RowMaxScratch max_scratch;
  int turn = 0, squares_turn = 0, max_turn = 0;
  const int own = owned_column<kVec>(0), stride = blockDim.x * kVec;
  float w[kItems / kVec][kVec], b[kItems / kVec][kVec];
  if constexpr (kNormalized) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int col = own + chunk * stride;
      load_parameters(a.weight, a.weight_dtype, 1.f, col, a.cols, a.parameters, w[chunk]);
      load_parameters(a.bias, a.bias_dtype, 0.f, col, a.cols, a.parameters, b[chunk]);
    }
  }

  // All threads of a block make the same number of rounds: sums and maxima need every one of them.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = first + threadIdx.y; row - threadIdx.y < a.rows; row += step) {
    const int cols = row < a.rows ? a.cols : 0;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float kept[kItems / kVec][kVec];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      load_neighbours(x, own + chunk * stride, cols, a.vectors, kept[chunk]);
    }
    // Calls f(numbers, column of the first) for each kVec neighbours of the thread; those that are
    // read again pass through `prepare` first.
    const auto sweep = [&](auto&& prepare, auto&& f) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (own + chunk * stride < cols) f(kept[chunk], own + chunk * stride);
      }
      if constexpr (kKind != RowKind::kNormalized) {
#pragma unroll 1
        for (int col = own + kChunks * stride; col < cols; col += stride) {
          float again[kVec];
          load_neighbours(x, col, cols, a.vectors, again);
          prepare(again, col);
          f(again, col);
        }
      }
    };
    const auto as_it_is = [](float (&)[kVec], int) {};

    float mean = 0.f, rstd = 0.f;
    const auto normalize = [&](float (&v)[kVec], int col) {
      if constexpr (kNormalized) {
        float weights[kVec], biases[kVec];
        load_parameters(a.weight, a.weight_dtype, 1.f, col, cols, a.parameters, weights);
        load_parameters(a.bias, a.bias_dtype, 0.f, col, cols, a.parameters, biases);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          v[i] = col + i < cols ? fmaf((v[i] - mean) * rstd, weights[i], biases[i]) : 0.f;
        }
      }
    };
    if constexpr (kNormalized) {
      float sum[1] = {0.f};
      sweep(as_it_is, [&](float (&v)[kVec], int) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[0] += v[i];
      });
      row_sum(sum, scratch, turn);
      const float estimate = sum[0] / a.cols;
      float deviations[2] = {0.f, 0.f};  // their sum, which the estimate's rounding left; squares
      sweep(as_it_is, [&](float (&v)[kVec], int col) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float centred = col + i < cols ? v[i] - estimate : 0.f;
          deviations[0] += centred;
          deviations[1] = fmaf(centred, centred, deviations[1]);
        }
      });
      row_sum(deviations, squares_scratch, squares_turn);
      const float shift = deviations[0] / a.cols;
      mean = estimate + shift;
      rstd = rsqrtf(fmaf(-shift, shift, deviations[1] / a.cols) + a.eps);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float& v = kept[chunk][i];
          const bool there = own + chunk * stride + i < cols;
          v = there ? fmaf((v - mean) * rstd, w[chunk][i], b[chunk][i]) : 0.f;
        }
      }
    }

    uint32_t largest = 0;
    sweep(normalize, [&](float (&v)[kVec], int) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) largest = max(largest, magnitude_bits(v[i]));
    });
    row_max(largest, max_scratch, max_turn);
    const Quantizer quantize = quantizer_of(largest, a.given);
    if (row < a.rows && threadIdx.x == 0) a.scale[row] = quantize.scale;
    int8_t* to = a.values + row * a.values_stride;
    sweep(normalize, [&](float (&v)[kVec], int col) {
      Vec<int8_t, kVec> values;
#pragma unroll
      for (int i = 0; i < kVec; ++i) values.at[i] = quantize(v[i]);
      if (a.stores && col + kVec <= cols) return values.store(to + col);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (col + i < cols) to[col + i] = values.at[i];
      }
    });
  }
}

}  // namespace kernels::int8_matmul
