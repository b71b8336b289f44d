// Products of matrices by a warpgroup, four warps together: wgmma (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions"; sm_90a alone).
//
// The products run behind the threads' backs. Until wgmma_wait covers them, neither accumulators
// nor left operands in registers may be touched, nor may tiles in shared memory change. A warp has
// 16 of the 64 rows; their accumulators and left operands lie in the lanes as those of mma.sync.
#pragma once

#include "common/cuda/mma.cuh"

namespace kernels {

constexpr int kWarpgroup = 4 * kWarp;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// What wgmma needs to know of 16 columns of a matrix of panels as TMA leaves them (tma.cuh; PTX
// ISA, "Matrix Descriptor Format"), of which `shared` is the first row.
//
// Columns are summed over ("K-major"): 8 rows stand `8 rows` apart; the panels of other columns
// begin elsewhere, so a step of 16 columns is a step of 32 bytes inside a panel. Rows are summed
// over ("MN-major"): 16 rows, all columns, whose panels stand `panel` bytes apart.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t shared, uint32_t panel) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = 8 * 128;
  return kSwizzle128 | kEightRows >> 4 << 32 | uint64_t{panel >> 4} << 16 | shared >> 4;
}

// Registers written so far are ready for the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All groups but the newest kPending are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators or left operands over a wait or a fence.
template <typename Register, int kN>
__device__ __forceinline__ void pin(Register (&registers)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<Register, float>) {
        asm volatile("" : "+f"(registers[n][i])::"memory");
      } else {
        asm volatile("" : "+r"(registers[n][i])::"memory");
      }
    }
  }
}

// 4, 32 and 64 floats as operands of an asm statement, and their names in it.
#define KERNELS_FLOATS_4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define KERNELS_FLOATS_32(c, n)                                                           \
  KERNELS_FLOATS_4(c, n), KERNELS_FLOATS_4(c, n + 1), KERNELS_FLOATS_4(c, n + 2),         \
      KERNELS_FLOATS_4(c, n + 3), KERNELS_FLOATS_4(c, n + 4), KERNELS_FLOATS_4(c, n + 5), \
      KERNELS_FLOATS_4(c, n + 6), KERNELS_FLOATS_4(c, n + 7)
#define KERNELS_NAMES_32                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define KERNELS_NAMES_64                                                                      \
  KERNELS_NAMES_32                                                                            \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// c = a bᵀ, added to c if `add`: a [64, 16], b [128, 16], both summed over columns.
template <typename T>
__device__ __forceinline__ void wgmma_rows(Accumulator (&c)[16], uint64_t a, uint64_t b, bool add) {
#define KERNELS_WGMMA(type)                                                              \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" KERNELS_NAMES_64 \
      "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                 \
      : KERNELS_FLOATS_32(c, 0), KERNELS_FLOATS_32(c, 8)                                 \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    KERNELS_WGMMA("bf16");
  } else {
    KERNELS_WGMMA("f16");
  }
#undef KERNELS_WGMMA
}

// c += a b: a [64, 16] in registers, b [16, 64] or [16, 128] summed over rows.
template <typename T>
__device__ __forceinline__ void wgmma_columns(Accumulator (&c)[8], const uint32_t (&a)[4],
                                              uint64_t b) {
#define KERNELS_WGMMA(type)                                                             \
  asm volatile(                                                                         \
      "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" KERNELS_NAMES_32 \
      "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n}"                                     \
      : KERNELS_FLOATS_32(c, 0)                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    KERNELS_WGMMA("bf16");
  } else {
    KERNELS_WGMMA("f16");
  }
#undef KERNELS_WGMMA
}
template <typename T>
__device__ __forceinline__ void wgmma_columns(Accumulator (&c)[16], const uint32_t (&a)[4],
                                              uint64_t b) {
#define KERNELS_WGMMA(type)                                                              \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" KERNELS_NAMES_64 \
      "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n}"                                      \
      : KERNELS_FLOATS_32(c, 0), KERNELS_FLOATS_32(c, 8)                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    KERNELS_WGMMA("bf16");
  } else {
    KERNELS_WGMMA("f16");
  }
#undef KERNELS_WGMMA
}

// Waits for the other warps of the warpgroup; `number` is its own, from 0 on.
__device__ __forceinline__ void warpgroup_barrier(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + number), "n"(kWarpgroup) : "memory");
}

// The registers of a thread from here on, a multiple of 8; all warps of the warpgroup call.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ask_for_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace kernels
