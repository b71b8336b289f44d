// What the operating system can be told about an output before it is written for the first time.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/cpu/simd.h"

namespace kernels::ISA {

// Asks for huge pages under a large output.  Fresh memory then costs one page fault in 2 MiB
// instead of 512, which otherwise takes longer than the kernel: 16 MiB of float32 layer norm output
// 5.5 ms instead of 0.8 ms.  Memory that was touched before is left as it is.  Only whole huge
// pages inside the output are marked; where the system's setting is "never" nothing happens.
SIMD_INLINE void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kFromBytes = int64_t{8} << 20;
  if (bytes < kFromBytes) return;
  const uintptr_t begin = (uintptr_t(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kernels::ISA
