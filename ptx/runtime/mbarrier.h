// mbarrier objects as the other asynchronous operations see them.
#pragma once
#include <cstdint>

#include "races.h"

namespace ptx {

constexpr uint32_t kNoMbarrier = ~0u;

// The offset in shared memory of a valid mbarrier; reports mbarrier-misuse otherwise.
uint32_t mbarrier_offset(const void* mbarrier, uint32_t site);

// A copy of `bytes` is on its way to this mbarrier; it has landed (complete_tx), seen by the
// asynchronous engine, which must be the running thread.
void mbarrier_copy_issued(uint32_t mbarrier, uint32_t bytes, uint32_t site);
void mbarrier_copy_landed(uint32_t mbarrier, uint32_t bytes, uint32_t site);

// cp.async.mbarrier.arrive: announces an arrival (which counts among the expected ones unless
// no_increment is false), and makes it.
uint32_t mbarrier_expect_arrival(const void* mbarrier, bool no_increment, uint32_t site);
void mbarrier_arrive_async(uint32_t mbarrier, uint32_t site);

// One at which some thread waits and to which copies are on their way, or kNoMbarrier.
uint32_t awaited_mbarrier();

}  // namespace ptx
