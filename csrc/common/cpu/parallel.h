// Threads and scratch memory of the CPU kernels.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/cpu/simd.h"

namespace kernels::ISA {

// Each thread gets at least so many elements. On two threads layer norm of 64 x 768 takes an eighth
// less time than on one, call included; PyTorch uses both there as well.
constexpr int64_t kElementsPerThread = 8192;

// Threads worth using; torch.set_num_threads is the upper limit, for torch shares the OpenMP pool.
SIMD_INLINE int threads_for([[maybe_unused]] int64_t elements) {
#ifdef _OPENMP
  const int64_t useful = elements / kElementsPerThread, limit = omp_get_max_threads();
  return int(useful < 1 ? 1 : useful < limit ? useful : limit);
#else
  return 1;
#endif
}

// Of the calling thread among those of `on_threads`; 0 is the one that called it.
SIMD_INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Runs f() on each of `threads` threads; `omp for` loops inside f share their iterations. One
// thread enters no parallel region: that alone would cost a microsecond. Not for use inside another
// region, whose threads the loops would then be shared by.
template <class F>
SIMD_INLINE void on_threads(int threads, F f) {
  if (threads == 1) return f();
#pragma omp parallel num_threads(threads)
  f();
}

// Runs f(item) for every item; with one thread also inside a parallel region.
template <class F>
SIMD_INLINE void parallel_for(int64_t items, int threads, F f) {
  if (threads == 1) {
    for (int64_t item = 0; item < items; item++) f(item);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t item = 0; item < items; item++) f(item);
}

// Float buffers of `length` each, aligned to cache lines, freed on leaving the scope.
class Scratch {
 public:
  Scratch(int64_t count, int64_t length) : stride_((length + 15) / 16 * 16) {
    data_ = static_cast<float*>(aligned_alloc(64, size_t(count * stride_ + 16) * sizeof(float)));
    if (!data_) throw std::bad_alloc();  // MemoryError; inside a parallel region it terminates
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* operator[](int64_t i) const { return data_ + i * stride_; }

 private:
  float* data_;
  int64_t stride_;
};

// Memory of the calling thread that stays with it from call to call, so that only a thread's first
// call faults pages in: at least `floats` floats, aligned to cache lines, with undefined contents.
// The next request ends the last one.  Larger requests than kKeptFloats are not kept.
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t floats) {
    static thread_local Kept kept;
    if (floats > kKeptFloats) {
      data_ = owned_ = allocate(floats);
    } else {
      if (floats > kept.floats) {
        free(kept.data);
        kept = {};
        kept.data = allocate(floats);
        kept.floats = floats;
      }
      data_ = kept.data;
    }
  }
  ~ThreadMemory() { free(owned_); }
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;

  // The next `floats` of it.
  float* take(int64_t floats) {
    float* taken = data_;
    data_ += rounded(floats);
    return taken;
  }
  static constexpr int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  static constexpr int64_t kKeptFloats = int64_t{4} << 20;  // 16 MiB

  struct Kept {
    float* data = nullptr;
    int64_t floats = 0;
    ~Kept() { free(data); }
  };

  static float* allocate(int64_t floats) {
    void* data = aligned_alloc(64, size_t(rounded(floats)) * sizeof(float));
    if (!data) throw std::bad_alloc();  // as in Scratch
    return static_cast<float*>(data);
  }

  float *data_ = nullptr, *owned_ = nullptr;
};

}  // namespace kernels::ISA
