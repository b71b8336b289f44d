// C[M, N] = A[M, K] B[N, K]^T in bf16 and s8 on tensor cores, and nine things that may go wrong in
// it. A block of 4 warps computes 64 x 64 of C; tiles of 64 bytes of K come by cp.async into two
// stages, their 16-byte chunks swizzled so that ldmatrix meets no bank twice.
// `// BUG name` marks the line that the report on kernel gemm_bf16_name has to point at.
#include "tensor_core.cuh"

enum class Bug {
  kNone,
  kNoBarrierAfterWait,  // cp.async.wait_group waits for the thread's own copies alone
  kWaitTooMany,         // wait_group 2 where 1 is meant: the newest tile may not have landed
  kNoBarrierAtEnd,      // the next tile overwrites a stage that slow warps still read
  kRowBound,            // <= instead of <
  kEpilogueBound,       // the second column of a pair is stored unasked
  kMisalignedCopy,      // a 16-byte cp.async from 2 bytes off
  kWrongFragment,       // the halves of B in the wrong order: only the numbers tell
  kNoSwizzle,           // right numbers; only the bank conflicts tell
  kSwappedRegisters,    // in the text of the asm: only the numbers tell
};

constexpr int kTile = 64, kThreads = 128;
constexpr int kTileBytes = kTile * 64, kStageBytes = 2 * kTileBytes;

template <Bug kBug>
__device__ __forceinline__ int slot(int row, int chunk) {
  return row * 64 + (kBug == Bug::kNoSwizzle ? chunk : chunk ^ (row / 2 % 4)) * 16;
}

// 64 rows of 64 bytes from byte `column` on; rows past the end become zeros.
template <Bug kBug>
__device__ __forceinline__ void load_tile(unsigned char* tile, const unsigned char* from, int first,
                                          int rows, int row_bytes, int column) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
    const int row = first + i / 4, chunk = i % 4;
    const bool inside = kBug == Bug::kRowBound ? row <= rows : row < rows;
    const unsigned char* source =
        from + static_cast<size_t>(inside ? row : 0) * row_bytes + column + chunk * 16;
    if (kBug == Bug::kMisalignedCopy) source += 2;
    unsigned char* to = tile + slot<kBug>(i / 4, chunk);
    copy_async(to, source, inside ? 16 : 0);  // BUG row_bound, misaligned_copy
  }
}

template <Bug kBug, typename Sum>
__device__ __forceinline__ void multiply_tile(Sum (&sums)[2][4][4], const unsigned char* a_tile,
                                              const unsigned char* b_tile, int m, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 2; ++step) {  // of 32 bytes of K
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m + i * 16 + lane % 16;
      const unsigned char* from = a_tile + slot<kBug>(row, step * 2 + lane / 16);
      load_matrices(a[i], from);  // BUG no_barrier_after_wait, wait_too_many
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = n + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(b[j], b_tile + slot<kBug>(row, step * 2 + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t (&pair)[4] = b[j / 2];
        if constexpr (kBug == Bug::kWrongFragment) {
          multiply_add(sums[i][j], a[i], pair[j % 2], pair[j % 2 + 2]);
        } else if constexpr (kBug == Bug::kSwappedRegisters) {
          multiply_add_swapped(sums[i][j], a[i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
        } else {
          multiply_add(sums[i][j], a[i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
        }
      }
    }
  }
}

template <Bug kBug, typename Sum>
__device__ __forceinline__ void store(Sum* c, const Sum (&sums)[2][4][4], int m, int n, int M,
                                      int N) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 16; ++part) {
    const int i = part / 8, j = part / 2 % 4, half = part % 2;
    const int row = m + i * 16 + half * 8 + lane / 4, col = n + j * 8 + lane % 4 * 2;
    if (row >= M) continue;
    Sum* to = c + static_cast<size_t>(row) * N + col;
    if (col < N) to[0] = sums[i][j][half * 2];
    if (kBug == Bug::kEpilogueBound || col + 1 < N) {
      to[1] = sums[i][j][half * 2 + 1];  // BUG epilogue_bound
    }
  }
}

template <Bug kBug, typename Sum>
__device__ __forceinline__ void gemm(Sum* c, const unsigned char* a, const unsigned char* b, int M,
                                     int N, int row_bytes) {
  __shared__ __align__(128) unsigned char stages[2 * kStageBytes];  // A and B of each
  const int m = blockIdx.y * kTile, n = blockIdx.x * kTile, warp = threadIdx.x / 32;
  const int tiles = row_bytes / 64, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const auto load = [&](int tile) {
    unsigned char* stage = stages + tile % 2 * kStageBytes;
    load_tile<kBug>(stage, a, m, M, row_bytes, tile * 64);  // BUG no_barrier_at_end
    load_tile<kBug>(stage + kTileBytes, b, n, N, row_bytes, tile * 64);
  };
  Sum sums[2][4][4] = {};
  load(0);
  commit_copies();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) load(tile + 1);
    commit_copies();  // a group per round, empty in the last
    wait_for_copies<kBug == Bug::kWaitTooMany ? 2 : 1>();
    if constexpr (kBug != Bug::kNoBarrierAfterWait) __syncthreads();
    const unsigned char* stage = stages + tile % 2 * kStageBytes;
    multiply_tile<kBug>(sums, stage, stage + kTileBytes, warp_m, warp_n);
    if constexpr (kBug != Bug::kNoBarrierAtEnd) __syncthreads();
  }
  store<kBug>(c, sums, m + warp_m, n + warp_n, M, N);
}

#define KERNEL(name, bug, Sum)                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads)                                      \
      name(Sum* c, const unsigned char* a, const unsigned char* b, int M, int N, int bytes) { \
    gemm<Bug::bug>(c, a, b, M, N, bytes);                                                     \
  }

KERNEL(gemm_s8, kNone, int)
KERNEL(gemm_bf16, kNone, float)
KERNEL(gemm_bf16_no_barrier_after_wait, kNoBarrierAfterWait, float)
KERNEL(gemm_bf16_wait_too_many, kWaitTooMany, float)
KERNEL(gemm_bf16_no_barrier_at_end, kNoBarrierAtEnd, float)
KERNEL(gemm_bf16_row_bound, kRowBound, float)
KERNEL(gemm_bf16_epilogue_bound, kEpilogueBound, float)
KERNEL(gemm_bf16_misaligned_copy, kMisalignedCopy, float)
KERNEL(gemm_bf16_wrong_fragment, kWrongFragment, float)
KERNEL(gemm_bf16_no_swizzle, kNoSwizzle, float)
KERNEL(gemm_bf16_swapped_registers, kSwappedRegisters, float)
