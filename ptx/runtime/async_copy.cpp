// cp.async: 4, 8 or 16 bytes from global to shared memory, complete when the issuing thread says
// so.
//
// From issue until the wait the destination is in flight: any touch is a hazard. The copy is made
// as late as the program allows (option async_early: at once), so that a missing wait shows in the
// numbers too. The issue is checked as a write by the thread, and the landing again: between them
// others may have come to rely on the old bytes.
#include <cstring>

#include "async_state.h"
#include "mbarrier.h"

namespace ptx {

namespace {

void move_bytes(const CpAsync& copy) {
  const Span& to = copy.destination;
  std::memcpy(to.data, copy.source, copy.source_bytes);
  std::memset(to.data + copy.source_bytes, 0, to.bytes - copy.source_bytes);
}

void land(CpAsync& copy) {
  if (copy.landed) return;
  copy.landed = true;
  unmark(copy.destination, kAsyncWrite);
  move_bytes(copy);
  touch(copy.destination, Access::kWrite, copy.site);
}

// Makes the arrivals whose copies have all landed.
void fire_arrivals(AsyncState& state) {
  for (size_t i = 0; i < state.arrivals.size();) {
    const DeferredArrival arrival = state.arrivals[i];
    if (arrival.copies > state.copies_completed) {
      i++;
      continue;
    }
    state.arrivals.erase(state.arrivals.begin() + static_cast<ptrdiff_t>(i));
    mbarrier_arrive_async(arrival.mbarrier, arrival.site);
  }
}

void wait_groups(uint32_t pending) {
  if (!running()->async) return;  // never started a copy
  AsyncState& state = async_state();
  state.copies.wait(pending, [&](CpAsync& copy) {
    land(copy);
    state.copies_completed++;
  });
  fire_arrivals(state);
}

}  // namespace

void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t source_bytes,
              uint32_t site) {
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fatal("unsupported", "cp.async of other than 4, 8 or 16 bytes", site);
  }
  counts.async_copies++;
  if (source_bytes > bytes) source_bytes = bytes;
  // Even a copy of no bytes needs an aligned source address.
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    report_and_abort("misaligned", site, kNoSite,
                     text("cp.async of %u bytes from %s", bytes, where(global).c_str()));
  }
  if (source_bytes) {
    const Span from = span(global, source_bytes, Space::kGlobal, site, /*writes=*/false, bytes);
    touch(from, Access::kRead, site);
    if (options.count) count_access(from, Access::kRead, site);
  } else {
    skip(Space::kGlobal, site);
  }
  const Span to = span(shared, bytes, Space::kShared, site, /*writes=*/true, bytes);
  touch(to, Access::kWrite, site);
  if (options.count) count_access(to, Access::kWrite, site);
  const CpAsync copy{to, static_cast<const unsigned char*>(global), source_bytes, site, false};
  if (options.async_early) {
    move_bytes(copy);
  } else {
    std::memset(to.data, 0xff, bytes);
  }
  mark(to, kAsyncWrite);
  async_state().copies.add(copy);
}

void cp_async_commit() { async_state().copies.commit(); }

void cp_async_wait(uint32_t pending) { wait_groups(pending); }

void cp_async_wait_all() {
  if (!running()->async) return;
  async_state().copies.commit();
  wait_groups(0);
}

void cp_async_mbarrier_arrive(void* mbarrier, bool no_increment, uint32_t site) {
  const uint32_t offset = mbarrier_expect_arrival(mbarrier, no_increment, site);
  AsyncState& state = async_state();
  const uint64_t issued = state.copies_completed + state.copies.all().size();
  state.arrivals.push_back({offset, site, issued, {}});
  release(state.arrivals.back().issued);
  fire_arrivals(state);
}

bool land_cp_async_for(uint32_t mbarrier) {
  bool any = false;
  for (uint32_t i = 0; i < thread_count; i++) {
    AsyncState* state = fibers[i].async;
    if (!state) continue;
    for (size_t j = 0; j < state->arrivals.size();) {
      const DeferredArrival arrival = state->arrivals[j];
      if (arrival.mbarrier != mbarrier) {
        j++;
        continue;
      }
      // The engine writes on behalf of whoever waits at the mbarrier; groups stay as they are.
      const RunAs engine(async_engine());
      acquire(arrival.issued);
      auto& copies = state->copies.all();
      for (size_t k = 0; k < copies.size() && state->copies_completed + k < arrival.copies; k++) {
        land(copies[k]);
      }
      state->arrivals.erase(state->arrivals.begin() + static_cast<ptrdiff_t>(j));
      mbarrier_arrive_async(mbarrier, arrival.site);
      any = true;
    }
  }
  return any;
}

void cp_async_thread_exit(Fiber& fiber) {
  for (CpAsync& copy : fiber.async->copies.all()) {
    land(copy);
    fiber.async->copies_completed++;
  }
  fiber.async->copies.clear();
  fire_arrivals(*fiber.async);
}

}  // namespace ptx
