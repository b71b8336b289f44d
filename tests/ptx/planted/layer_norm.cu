// Layer norm of rows of up to 512 fp32 columns, a block of 128 threads per row, and six things
// that may go wrong in it. `// BUG name` marks the line that the report on kernel layer_norm_name
// has to point at.
#include <cstddef>

enum class Bug {
  kNone,
  kNoBarrier,         // reads the warps' sums before they are all written
  kReusedScratch,     // writes the second sums while slow warps still read the first
  kColumnBound,       // <= instead of <
  kMisalignedLoad,    // a 16-byte load 4 bytes off
  kDivergentBarrier,  // half of the threads wait at one barrier, half at another
  kSharedRow,         // two blocks write one row
};

constexpr int kThreads = 128, kWarps = kThreads / 32;

__device__ float warp_sum(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  return value;
}

__device__ float total(const float* warp_sums) {
  return warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];  // BUG no_barrier
}

__device__ float4 load(const float* from) {
  return *reinterpret_cast<const float4*>(from);  // BUG column_bound, misaligned_load
}

template <Bug kBug>
__device__ __forceinline__ void layer_norm(float* y, const float* x, int cols) {
  __shared__ float sums[kWarps], squares[kWarps];
  const int row = blockIdx.x, col = threadIdx.x * 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool inside = kBug == Bug::kColumnBound ? col <= cols : col < cols;
  const float* from = x + static_cast<size_t>(row) * cols + (kBug == Bug::kMisalignedLoad);
  const float4 in = inside ? load(from + col) : float4{};

  const float sum = warp_sum(in.x + in.y + in.z + in.w);
  if (lane == 0) sums[warp] = sum;
  if constexpr (kBug != Bug::kNoBarrier) __syncthreads();
  const float mean = total(sums) / cols;

  const float4 centred{in.x - mean, in.y - mean, in.z - mean, in.w - mean};
  float square = centred.x * centred.x + centred.y * centred.y;
  square += centred.z * centred.z + centred.w * centred.w;
  square = warp_sum(inside ? square : 0.f);
  float* second = kBug == Bug::kReusedScratch ? sums : squares;
  if constexpr (kBug == Bug::kDivergentBarrier) {
    if (lane == 0) {
      second[warp] = square;
      __syncthreads();  // BUG divergent_barrier
    } else {
      __syncthreads();
    }
  } else {
    if (lane == 0) second[warp] = square;  // BUG reused_scratch
    __syncthreads();
  }
  const float rstd = rsqrtf(total(second) / cols + 1e-5f);

  if (!inside) return;
  const int to_row = kBug == Bug::kSharedRow && row > 0 ? row - 1 : row;
  float4* to = reinterpret_cast<float4*>(y + static_cast<size_t>(to_row) * cols + col);
  *to = {centred.x * rstd, centred.y * rstd, centred.z * rstd, centred.w * rstd};  // BUG shared_row
}

#define KERNEL(name, bug)                                \
  extern "C" __global__ void __launch_bounds__(kThreads) \
      name(float* y, const float* x, int cols) {         \
    layer_norm<Bug::bug>(y, x, cols);                    \
  }

KERNEL(layer_norm, kNone)
KERNEL(layer_norm_no_barrier, kNoBarrier)
KERNEL(layer_norm_reused_scratch, kReusedScratch)
KERNEL(layer_norm_column_bound, kColumnBound)
KERNEL(layer_norm_misaligned_load, kMisalignedLoad)
KERNEL(layer_norm_divergent_barrier, kDivergentBarrier)
KERNEL(layer_norm_shared_row, kSharedRow)
