// Warp and warpgroup operations: the lanes wait for each other, the last one to come computes.
#include <vector>

#include "barriers.h"
#include "state.h"

namespace ptx {

namespace {

// An operation some lanes of a warp have come to and others not yet.
struct Meeting {
  Resolve resolve;
  uint32_t mask, arrived;
  uint32_t site;  // where the first came
};
std::vector<Meeting> meetings[kMaxWarps];  // rarely more than one per warp

struct WarpgroupMeeting {
  ResolveWarpgroup resolve;
  uint32_t arrived;  // threads
  uint32_t site;
};
WarpgroupMeeting warpgroup_meetings[kMaxWarps / 4];

uint32_t exited[kMaxWarps];  // lanes

void check_mask(const Fiber& me, uint32_t mask, uint32_t site) {
  if (!(mask >> me.lane & 1))
    report_and_abort(
        "bad-mask", site, kNoSite,
        text("lane %u executes a warp operation whose mask 0x%08x leaves it out", me.lane, mask));
  if (uint32_t missing = mask & ~lanes_of_warp(me.warp))
    report_and_abort(
        "bad-mask", site, kNoSite,
        text("mask 0x%08x names lane %d, which does not exist", mask, __builtin_ctz(missing)));
  if (uint32_t gone = mask & exited[me.warp])
    report_and_abort(
        "bad-mask", site, kNoSite,
        text("mask 0x%08x names lane %d, which has exited", mask, __builtin_ctz(gone)));
}

// The meeting the running lane comes to. Lanes that come with the same mask to different operations
// would wait for each other for ever.
Meeting& join_meeting(const Fiber& me, uint32_t mask, uint32_t site, Resolve resolve) {
  for (Meeting& meeting : meetings[me.warp]) {
    if (meeting.mask != mask) continue;
    if (meeting.resolve != resolve)
      report_and_abort("divergent-warp-op", site, meeting.site,
                       text("lanes of one warp (mask 0x%08x) met in different operations", mask));
    if (meeting.site != site)
      report("divergent-warp-op", site, meeting.site,
             "lanes of one warp met in different instructions");
    meeting.arrived |= 1u << me.lane;
    return meeting;
  }
  meetings[me.warp].push_back({resolve, mask, 1u << me.lane, site});
  return meetings[me.warp].back();
}

void wait_in_meeting(Fiber& me, const char* waits_for, uint32_t site, void* payload) {
  me.state = State::kMeeting;
  me.waits_for = waits_for;
  me.site = site;
  me.payload = payload;
}

}  // namespace

uint32_t live_lanes() { return lanes_of_warp(current->warp) & ~exited[current->warp]; }

void collective(const char* waits_for, uint32_t mask, uint32_t site, void* payload,
                Resolve resolve) {
  Fiber& me = *running();
  check_mask(me, mask, site);
  Meeting& meeting = join_meeting(me, mask, site, resolve);
  wait_in_meeting(me, waits_for, site, payload);
  if (meeting.arrived != mask) {
    switch_away();
    return;
  }
  auto& of_warp = meetings[me.warp];
  of_warp.erase(of_warp.begin() + (&meeting - of_warp.data()));
  Fiber* lanes[32] = {};
  Fiber* first = fibers + me.warp * 32;
  for (uint32_t set = mask; set; set &= set - 1)
    lanes[__builtin_ctz(set)] = first + __builtin_ctz(set);
  resolve(lanes, mask);
  for (uint32_t set = mask & ~(1u << me.lane); set; set &= set - 1)
    make_ready(*lanes[__builtin_ctz(set)]);
  me.state = State::kReady;  // the last one simply runs on
}

void warpgroup_collective(const char* waits_for, uint32_t site, void* payload,
                          ResolveWarpgroup resolve) {
  Fiber& me = *running();
  uint32_t group = me.linear / 128, first = group * 128;
  if (first + 128 > thread_count)
    report_and_abort("bad-mask", site, kNoSite,
                     text("%s needs a whole warpgroup of 4 warps", waits_for));
  for (uint32_t warp = first / 32; warp < first / 32 + 4; warp++)
    if (exited[warp])
      report_and_abort("bad-mask", site, kNoSite,
                       text("%s: lane %d of warp %u of the warpgroup has exited", waits_for,
                            __builtin_ctz(exited[warp]), warp));
  WarpgroupMeeting& meeting = warpgroup_meetings[group];
  if (!meeting.arrived) {
    meeting = {resolve, 0, site};
  } else if (meeting.resolve != resolve) {
    report_and_abort("divergent-warp-op", site, meeting.site,
                     "warps of one warpgroup met in different operations");
  } else if (meeting.site != site) {
    report("divergent-warp-op", site, meeting.site,
           "warps of one warpgroup met in different instructions");
  }
  wait_in_meeting(me, waits_for, site, payload);
  if (++meeting.arrived < 128) {
    switch_away();
    return;
  }
  meeting.arrived = 0;
  Fiber* threads[128];
  for (uint32_t i = 0; i < 128; i++) threads[i] = &fibers[first + i];
  resolve(threads);
  for (Fiber* thread : threads)
    if (thread != &me) make_ready(*thread);
  me.state = State::kReady;
}

void meetings_block_start() {
  for (auto& of_warp : meetings) of_warp.clear();
  for (WarpgroupMeeting& meeting : warpgroup_meetings) meeting.arrived = 0;
  for (uint32_t& lanes : exited) lanes = 0;
}

void meetings_thread_exit(const Fiber& fiber) {
  exited[fiber.warp] |= 1u << fiber.lane;
  for (const Meeting& meeting : meetings[fiber.warp])
    if (meeting.mask >> fiber.lane & 1)
      report_and_abort("bad-mask", meeting.site, kNoSite,
                       text("mask 0x%08x names lane %u, which has exited without coming here",
                            meeting.mask, fiber.lane));
  if (warpgroup_meetings[fiber.linear / 128].arrived)
    report_and_abort(
        "bad-mask", warpgroup_meetings[fiber.linear / 128].site, kNoSite,
        text("thread %u of the warpgroup has exited without coming here", fiber.linear));
}

}  // namespace ptx
