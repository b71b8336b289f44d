// Small pairs for what CUDA's memory and execution model forbids: each kernel beside its good twin.
// All take one pointer to 32-bit words. `// BUG name` marks the line that the report on kernel name
// has to point at.
#include <cstdint>

#define KERNEL extern "C" __global__ void

// ---- barriers
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Warps 0, 1 meet at barrier 1 and warps 2, 3 at barrier 2.
template <int kPartner>
__device__ __forceinline__ void exchange_in_half(float* y) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  tile[t] = t;
  named_barrier(1 + t / 64, 64);
  y[t] = tile[t ^ kPartner];  // BUG named_barrier_of_other_warps
}
KERNEL named_barrier_of_own_warps(float* y) { exchange_in_half<32>(y); }
KERNEL named_barrier_of_other_warps(float* y) { exchange_in_half<64>(y); }

template <bool kSync>
__device__ __forceinline__ void exchange_in_warp(float* y) {
  __shared__ volatile float tile[128];
  const int t = threadIdx.x;
  tile[t] = t;
  if constexpr (kSync) __syncwarp();
  y[t] = tile[t ^ 1];  // BUG implicit_warp_synchrony
}
KERNEL explicit_warp_synchrony(float* y) { exchange_in_warp<true>(y); }
KERNEL implicit_warp_synchrony(float* y) { exchange_in_warp<false>(y); }

// Threads may leave before a barrier: it then counts those that live. A fixed count does not.
template <int kCount>
__device__ __forceinline__ void early_exit(float* y) {
  __shared__ float tile[128];
  const int t = threadIdx.x;
  if (t >= 64) return;
  tile[t] = t;
  named_barrier(1, kCount);  // BUG barrier_for_ever
  y[t] = tile[63 - t];
}
KERNEL barrier_of_the_living(float* y) { early_exit<64>(y); }
KERNEL barrier_for_ever(float* y) { early_exit<128>(y); }

// ---- shuffles
template <unsigned kMask, int kOther>
__device__ __forceinline__ void half_warp_shuffle(float* y) {
  const int t = threadIdx.x;
  float value = t;
  if (t < 16) value = __shfl_xor_sync(kMask, value, kOther);  // BUG mask_too_wide, inactive_lane
  y[t] = value;
}
KERNEL mask_of_callers(float* y) { half_warp_shuffle<0xffff, 8>(y); }
KERNEL mask_too_wide(float* y) { half_warp_shuffle<0xffffffff, 8>(y); }
KERNEL inactive_lane(float* y) { half_warp_shuffle<0xffff, 16>(y); }

// ---- atomics, and blocks that meet in global memory
template <bool kPlain>
__device__ __forceinline__ void count(float* y) {
  if (kPlain && threadIdx.x == 5) {
    y[0] += 1.f;  // BUG atomic_and_plain
  } else {
    atomicAdd(y, 1.f);
  }
}
KERNEL atomic_alone(float* y) { count<false>(y); }
KERNEL atomic_and_plain(float* y) { count<true>(y); }

template <bool kOtherBlock>
__device__ __forceinline__ void read_row(float* y) {
  const int t = threadIdx.x;
  const int from = kOtherBlock ? 0 : blockIdx.x;
  y[blockIdx.x * 128 + t] = 2.f;
  y[256 + blockIdx.x * 128 + t] = y[from * 128 + t];  // BUG reads_other_block
}
KERNEL reads_own_block(float* y) { read_row<false>(y); }
KERNEL reads_other_block(float* y) { read_row<true>(y); }

// Every block reads a row, the last one then overwrites it: its own read hides no other's.
template <bool kOtherBlock>
__device__ __forceinline__ void add_to_row(float* y) {
  const int t = threadIdx.x;
  float* row = y + (kOtherBlock ? 0 : blockIdx.x * 128);
  const float value = row[t];
  y[256 + blockIdx.x * 128 + t] = value;
  if (blockIdx.x == gridDim.x - 1) row[t] = value + 1.f;  // BUG adds_to_other_row
}
KERNEL adds_to_own_row(float* y) { add_to_row<false>(y); }
KERNEL adds_to_other_row(float* y) { add_to_row<true>(y); }

// ---- memory that is not there, or holds nothing yet
template <int kOffset>
__device__ __forceinline__ void write_shared(float* y) {
  extern __shared__ float tile[];  // as many floats as threads
  const int t = threadIdx.x;
  tile[t + kOffset] = t;  // BUG shared_overrun
  y[t] = tile[t + kOffset];
}
KERNEL shared_in_bounds(float* y) { write_shared<0>(y); }
KERNEL shared_overrun(float* y) { write_shared<1>(y); }

template <bool kAdd>
__device__ __forceinline__ void fill(float* y) {
  const int t = threadIdx.x;
  if (kAdd) {
    y[t] += 1.f;  // BUG uninitialised_read
  } else {
    y[t] = 1.f;
  }
}
KERNEL initialised_write(float* y) { fill<false>(y); }
KERNEL uninitialised_read(float* y) { fill<true>(y); }

// A local array that registers cannot hold, since its index is known at run time only.
template <int kFirst>
__device__ __forceinline__ void local_array(float* y) {
  float local[8];
  const int t = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 8; ++i) local[i] = t * i;
  volatile float* at = local;
  y[t] = at[t % 8 + kFirst];  // BUG local_overrun
}
KERNEL local_in_bounds(float* y) { local_array<0>(y); }
KERNEL local_overrun(float* y) { local_array<1>(y); }

// ---- the read-only path: nobody may write these bytes while the kernel runs
__device__ __forceinline__ float load_read_only(const float* p) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(p));
  return value;
}
template <int kFrom>
__device__ __forceinline__ void copy_read_only(float* y) {
  const int t = threadIdx.x;
  y[t] += 1.f;
  __syncthreads();
  y[256 + t] = load_read_only(y + kFrom + t);  // BUG read_only_load_of_written
}
KERNEL read_only_load(float* y) { copy_read_only<128>(y); }
KERNEL read_only_load_of_written(float* y) { copy_read_only<0>(y); }
