// mbarriers: what threads that fetch tiles and threads that use them wait on (PTX ISA, "mbarrier";
// sm_90 and later).
//
// A phase ends when the expected number of threads have arrived and as many bytes have landed as
// they announced. Phases alternate in parity: the first one, which is under way after `init`, has
// parity 0, so that a wait for parity 1 returns at once.
#pragma once

#include "common/cuda/mma.cuh"

namespace kernels {

struct Mbarrier {
  uint64_t word;  // opaque, in shared memory

  // By one thread; `show_mbarriers` by the same one, and a barrier, must follow.
  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
  }
  // Publishes what the calling thread has done.
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives and announces bytes that copies will bring.
  __device__ __forceinline__ void arrive_expecting(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  // Returns when the phase of this parity has ended.
  __device__ __forceinline__ void wait(int parity) {
    while (!try_wait(parity)) {
    }
  }

 private:
  // May give up early, after a time that the hardware chooses.
  __device__ __forceinline__ bool try_wait(int parity) {
    int done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return done;
  }
};

// Shows initialised mbarriers to the copies that will complete them.
__device__ __forceinline__ void show_mbarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace kernels
