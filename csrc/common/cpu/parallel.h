// Threads and scratch memory of the CPU kernels.
#pragma once
#include <cstdint>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/cpu/simd.h"

namespace kernels::ISA {

// Below this many elements waking a thread costs more than it saves (64 x 768 runs on one).
constexpr int64_t kElementsPerThread = 8192;

// Threads worth using; torch.set_num_threads is the upper limit, for torch shares the OpenMP pool.
SIMD_INLINE int threads_for(int64_t elements) {
#ifdef _OPENMP
  const int64_t useful = elements / kElementsPerThread, limit = omp_get_max_threads();
  return int(useful < 1 ? 1 : useful < limit ? useful : limit);
#else
  return elements < 0 ? 0 : 1;
#endif
}

// Float buffers of `length` each, aligned to cache lines, freed on leaving the scope.
class Scratch {
 public:
  Scratch(int64_t count, int64_t length) : stride_((length + 15) / 16 * 16) {
    data_ = static_cast<float*>(aligned_alloc(64, size_t(count * stride_ + 16) * sizeof(float)));
    if (!data_) abort();  // inside a parallel region nothing can be thrown
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* operator[](int64_t i) const { return data_ + i * stride_; }

 private:
  float* data_;
  int64_t stride_;
};

}  // namespace kernels::ISA
