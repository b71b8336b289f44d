// Rows to int8 on CUDA: part of a warp per short row, else a block per row, each thread with 32 of
// its numbers in registers. Longer rows' further numbers are read again by every sweep.
//
// The numbers are x's, or those of its layer norm: they stay fp32 from the statistics to the
// rounding. Maths and shapes: kernels/int8_matmul/README.md.
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

// Replaces v by its maximum over the blockDim.x threads of the row, as row_sum its sums.
__device__ __forceinline__ void row_max(uint32_t& v, uint32_t (&scratch)[kWarp]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < blockDim.x) v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  if (blockDim.x <= kWarp) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < blockDim.x / kWarp ? scratch[lane] : 0;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = max(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
}

// kVec neighbours from `col` on as fp32, zeros from `cols` on.
template <int kVec, typename T>
__device__ __forceinline__ void load_neighbours(const T* row, int64_t col, int64_t cols,
                                                bool vectors, float (&out)[kVec]) {
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
  int64_t rows, cols;
  bool vectors;     // rows of x start on 16-byte boundaries
  bool parameters;  // so do weight and bias
  bool stores;      // a thread's values may be stored at once
};

constexpr int kRowItems = 32;        // numbers a thread keeps
constexpr int kGroupThreads = 256;   // block size where a warp holds a whole row
constexpr int kMaxRowThreads = 512;  // else the largest block

// kVec neighbours of a parameter as fp32, or `missing` where it is null or past the row.
template <int kVec>
__device__ __forceinline__ void load_parameters(const void* parameter, DType dtype, float missing,
                                                int64_t col, int64_t cols, bool vectors,
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

template <typename T, bool kNormalized>
__global__ void __launch_bounds__(kMaxRowThreads) quantize_rows_kernel(RowsArgs a) {
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T)), kChunks = kRowItems / kVec;
  __shared__ RowSumScratch<1> scratch;
  __shared__ RowSumScratch<2> squares_scratch;
  __shared__ uint32_t max_scratch[kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t cols = row < a.rows ? a.cols : 0;  // rows past the last take part in the sums
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const int own = owned_column<kVec>(0), stride = blockDim.x * kVec;
  float mean = 0.f, rstd = 0.f;

  float kept[kChunks][kVec];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    load_neighbours(x, own + chunk * stride, cols, a.vectors, kept[chunk]);
  }
  // Calls f(numbers, column of the first) for each kVec neighbours of the thread.
  const auto sweep = [&](auto&& prepare, auto&& f) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (own + chunk * stride < cols) f(kept[chunk], own + chunk * stride);
    }
#pragma unroll 1
    for (int64_t col = own + kChunks * stride; col < cols; col += stride) {
      float again[kVec];
      load_neighbours(x, col, cols, a.vectors, again);
      prepare(again, col);
      f(again, col);
    }
  };
  const auto as_it_is = [](float (&)[kVec], int64_t) {};
  // y = (x - mean) rstd weight + bias, zeros past the row
  const auto normalize = [&](float (&v)[kVec], int64_t col) {
    if constexpr (kNormalized) {
      float w[kVec], b[kVec];
      load_parameters(a.weight, a.weight_dtype, 1.f, col, cols, a.parameters, w);
      load_parameters(a.bias, a.bias_dtype, 0.f, col, cols, a.parameters, b);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        v[i] = col + i < cols ? fmaf((v[i] - mean) * rstd, w[i], b[i]) : 0.f;
      }
    }
  };

  if constexpr (kNormalized) {
    int turn = 0, squares_turn = 0;
    float sum[1] = {0.f};
    sweep(as_it_is, [&](float (&v)[kVec], int64_t) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[0] += v[i];
    });
    row_sum(sum, scratch, turn);
    const float estimate = sum[0] / a.cols;
    float deviations[2] = {0.f, 0.f};  // their sum, which the estimate's rounding left, and squares
    sweep(as_it_is, [&](float (&v)[kVec], int64_t col) {
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
    for (int chunk = 0; chunk < kChunks; ++chunk) normalize(kept[chunk], own + chunk * stride);
  }

  uint32_t largest = 0;
  sweep(normalize, [&](float (&v)[kVec], int64_t) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) largest = max(largest, magnitude_bits(v[i]));
  });
  row_max(largest, max_scratch);
  if (row >= a.rows) return;
  const Quantizer quantize = quantizer_of(largest, a.given);
  if (threadIdx.x == 0) a.scale[row] = quantize.scale;
  int8_t* to = a.values + row * a.values_stride;
  sweep(normalize, [&](float (&v)[kVec], int64_t col) {
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

}  // namespace kernels::int8_matmul
