// What becomes of finished sums: scales, bias, activation and the result's dtype, four neighbours
// of a row at a time; or, where blocks share a sum, its parts for another kernel to add.
#pragma once

#include "common/cuda/reduce.cuh"
#include "common/cuda/vec.cuh"

namespace kernels::int8_matmul {

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };
enum class Output : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3 };  // as DType

struct Epilogue {
  void* y;                                  // [m, n]
  const float *x_scale, *weight_scale;      // null: 1
  int64_t x_scale_step, weight_scale_step;  // between scales; 0: there is only one
  const void* bias;                         // [n] or null
  DType bias_dtype;
  Activation activation;
  Output dtype;
  bool vectors;         // four elements of y from a multiple of 4 on may be stored at once
  bool factor_vectors;  // and four scales and biases of columns be loaded
  int m, n;
  void* parts;  // int or float [splits, m, part_columns], or null: the sums are whole

  // Of a row of parts: a multiple of 4, so that they move 16 bytes at a time.
  __host__ __device__ int64_t part_columns() const { return (int64_t{n} + 3) / 4 * 4; }
};

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0.f ? 0.f : x;  // NaN stays
    case Activation::kGelu:
      return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.79788456080286536f * fmaf(0.044715f * x * x, x, x)));
    default:
      return x;
  }
}

__device__ __forceinline__ float row_scale_of(const Epilogue& e, int row) {
  return e.x_scale == nullptr ? 1.f : e.x_scale[row * e.x_scale_step];
}

// Scale and bias of four columns; those past the last are not used.
struct ColumnFactors {
  float scale[4], bias[4];

  __device__ __forceinline__ ColumnFactors(const Epilogue& e, int column, int count) {
    const bool whole = e.factor_vectors && count == 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = 1.f;
      bias[i] = 0.f;
    }
    if (e.weight_scale != nullptr) {
      load_four(e.weight_scale + column * e.weight_scale_step, e.weight_scale_step, count,
                whole && e.weight_scale_step == 1, scale);
    }
    if (e.bias == nullptr) return;
    with_type(e.bias_dtype, e.bias,
              [&](auto* from) { load_four(from + column, 1, count, whole, bias); });
  }

 private:
  template <typename T>
  __device__ __forceinline__ static void load_four(const T* from, int64_t step, int count,
                                                   bool whole, float (&to)[4]) {
    if (whole) {
      const auto values = Vec<T, 4>::load(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = to_float(values.at[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = to_float(from[i * step]);
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_neighbours(void* y, int64_t at, const T (&values)[4],
                                                 int count, bool vectors) {
  Vec<T, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.at[i] = values[i];
  T* to = static_cast<T*>(y) + at;
  if (vectors && count == 4) return out.store(to);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = out.at[i];
  }
}

template <typename T>
__device__ __forceinline__ void store_rounded(const Epilogue& e, int64_t at,
                                              const float (&values)[4], int count) {
  T rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(values[i]);
  store_neighbours(e.y, at, rounded, count, e.vectors);
}

// The sums of `count` neighbours of a row from `column` on, a multiple of 4, to y.
template <typename Sum>
__device__ __forceinline__ void finish(const Epilogue& e, const Sum (&sums)[4], int row, int column,
                                       int count, float row_scale, const ColumnFactors& factors) {
  const int64_t at = int64_t{row} * e.n + column;
  if constexpr (std::is_same_v<Sum, int>) {
    if (e.dtype == Output::kInt32) return store_neighbours(e.y, at, sums, count, e.vectors);
  }
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scale = factors.scale[i] * row_scale;
    values[i] = activate(fmaf(static_cast<float>(sums[i]), scale, factors.bias[i]), e.activation);
  }
  if (e.dtype == Output::kFloat32) return store_neighbours(e.y, at, values, count, e.vectors);
  if (e.dtype == Output::kBFloat16) return store_rounded<__nv_bfloat16>(e, at, values, count);
  store_rounded<__half>(e, at, values, count);
}

// Eight bytes at once: the compiler splits two stores, and a pair of them, too.
template <typename Sum>
__device__ __forceinline__ void store_pair(Sum* to, Sum first, Sum second) {
  const uint64_t low = reinterpret_cast<const uint32_t&>(first);
  const uint64_t high = reinterpret_cast<const uint32_t&>(second);
  *reinterpret_cast<uint64_t*>(to) = high << 32 | low;
}

// The sums c of a warp, in the layout of mma.sync, as rows row0 … and columns column0 … of the
// result or of part `split`. The lanes exchange them in `scratch`, the warp's own, so that each has
// four neighbours: its 16-byte chunks are permuted by the row.
template <typename Sum, int kM, int kN>
__device__ __forceinline__ void finish_tile(const Epilogue& e, const Sum (&c)[kM][kN][4],
                                            Sum (&scratch)[kM * 16][kN * 8], int row0, int column0,
                                            int split) {
  constexpr int kChunks = kN * 2;  // of a row
  const int lane = threadIdx.x % kWarp;
  const auto chunk_at = [&](int row, int chunk) {
    return scratch[row] + (chunk ^ row % 4 * 2) * 4;
  };
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int row = 16 * m + 8 * half + lane / 4;
        store_pair(chunk_at(row, 2 * n + lane % 4 / 2) + lane % 2 * 2, c[m][n][2 * half],
                   c[m][n][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  const int chunk = lane % kChunks, column = column0 + 4 * chunk;
  if (column >= e.n) return;
  const int count = min(e.n - column, 4);
  const ColumnFactors factors(e, column, count);
#pragma unroll 1
  for (int r = lane / kChunks; r < 16 * kM && row0 + r < e.m; r += kWarp / kChunks) {
    const int row = row0 + r;
    const auto sums = Vec<Sum, 4>::load(chunk_at(r, chunk));
    if (e.parts != nullptr) {
      const int64_t at = (int64_t{split} * e.m + row) * e.part_columns() + column;
      sums.store(static_cast<Sum*>(e.parts) + at);
    } else {
      finish(e, sums.at, row, column, count, row_scale_of(e, row), factors);
    }
  }
}

constexpr int kReduceThreads = 128;

// Adds the parts of every sum in their order, four neighbours a thread.
template <typename Sum>
__global__ void __launch_bounds__(kReduceThreads) add_parts_kernel(const Epilogue e, int splits) {
  const int64_t chunks = e.part_columns() / 4;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= chunks * e.m) return;
  const int row = static_cast<int>(index / chunks);
  const int column = static_cast<int>(index % chunks) * 4;
  const Sum* from = static_cast<const Sum*>(e.parts) + index * 4;
  Sum sums[4] = {};
#pragma unroll 4
  for (int split = 0; split < splits; ++split) {
    const auto part = Vec<Sum, 4>::load(from + split * chunks * e.m * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += part.at[i];
  }
  const int count = min(e.n - column, 4);
  finish(e, sums, row, column, count, row_scale_of(e, row), ColumnFactors(e, column, count));
}

}  // namespace kernels::int8_matmul
