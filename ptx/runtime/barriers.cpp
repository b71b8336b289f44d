// Block barriers: bar.sync, bar.arrive and bar.red on the 16 named barriers.
#include "barriers.h"

#include "state.h"

namespace ptx {

namespace {

constexpr uint32_t kBarriers = 16;

struct Barrier {
  uint32_t arrived, expected;  // expected 0: every live thread
  uint32_t site;               // where the first came, or the first to wait
  uint32_t waiting_lanes[kMaxWarps], waiting_warps;
  Reduced reduced;
  SyncTimes times;  // what those who came had done and knew
};
Barrier barriers[kBarriers];

void reset(Barrier& barrier) {
  barrier = Barrier{};
  barrier.reduced.all = true;
}

void complete(Barrier& barrier) {
  counts.barriers++;
  ++epoch;
  for (uint32_t warps = barrier.waiting_warps; warps; warps &= warps - 1)
    barrier.times.of[__builtin_ctz(warps)] = epoch;
  for (uint32_t warps = barrier.waiting_warps; warps; warps &= warps - 1) {
    uint32_t warp = __builtin_ctz(warps);
    acquire(warp, barrier.times);
    for (uint32_t lanes = barrier.waiting_lanes[warp]; lanes; lanes &= lanes - 1) {
      Fiber& fiber = fibers[warp * 32 + __builtin_ctz(lanes)];
      fiber.reduced = barrier.reduced;
      make_ready(fiber);
    }
  }
  reset(barrier);
  counters_barrier();
  progress();
}

bool is_complete(const Barrier& barrier) {
  return barrier.arrived && barrier.arrived >= (barrier.expected ? barrier.expected : live_threads);
}

Barrier& arrive(uint32_t id, uint32_t count, uint32_t site) {
  if (id >= kBarriers)
    report_and_abort("divergent-barrier", site, kNoSite,
                     text("barrier %u does not exist: a block has barriers 0 to 15", id));
  if (count % 32)
    report_and_abort("divergent-barrier", site, kNoSite,
                     text("a barrier for %u threads: the count must be a multiple of 32", count));
  Barrier& barrier = barriers[id];
  if (!barrier.arrived) {
    barrier.site = site;
    barrier.expected = count;
  } else if (barrier.expected != count) {
    report_and_abort("divergent-barrier", site, barrier.site,
                     text("barrier %u for %u threads, where others wait for %u (0: all)", id, count,
                          barrier.expected));
  }
  barrier.arrived++;
  return barrier;
}

void wait_at(Barrier& barrier, uint32_t site, bool aligned = true) {
  Fiber* me = running();
  if (!barrier.waiting_warps)
    barrier.site = site;  // those who only arrive do so at an instruction of their own
  else if (barrier.site != site && aligned)
    report("divergent-barrier", site, barrier.site,
           "threads of one block met at different barrier instructions");
  me->state = State::kBarrier;
  me->waits_for = "a barrier";
  me->site = site;
  barrier.waiting_lanes[me->warp] |= 1u << me->lane;
  barrier.waiting_warps |= 1u << me->warp;
  join(barrier.times, known[me->warp]);
  if (is_complete(barrier)) complete(barrier);
  switch_away();
}

}  // namespace

void barrier(uint32_t id, uint32_t count, uint32_t site, bool aligned) {
  wait_at(arrive(id, count, site), site, aligned);
}

Reduced barrier_reduce(uint32_t id, uint32_t count, bool p, uint32_t site) {
  Barrier& barrier = arrive(id, count, site);
  barrier.reduced.count += p;
  barrier.reduced.any |= p;
  barrier.reduced.all &= p;
  wait_at(barrier, site);
  return running()->reduced;
}

void barrier_arrive(uint32_t id, uint32_t count, uint32_t site) {
  if (!count)
    report_and_abort("divergent-barrier", site, kNoSite, "bar.arrive needs a count of threads");
  Barrier& barrier = arrive(id, count, site);
  // An epoch of its own: what this thread does from now on is not covered by the barrier.
  release(barrier.times);
  if (is_complete(barrier)) complete(barrier);
}

void barriers_block_start() {
  for (Barrier& barrier : barriers) reset(barrier);
}

void barriers_thread_exit() {
  for (Barrier& barrier : barriers)
    if (is_complete(barrier)) complete(barrier);
}

}  // namespace ptx
