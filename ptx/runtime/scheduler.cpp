// The scheduler: which thread runs next, parked wait loops, and deadlocks.
#include "scheduler.h"

#include <algorithm>

#include "barriers.h"
#include "fibers.h"
#include "registry.h"
#include "state.h"

namespace ptx {

Thread* current = nullptr;
uint32_t thread_count = 0, warp_count = 0, live_threads = 0;

namespace {

// Without the option preempt a thread still gives way after this many accesses: it may spin on
// memory that only another thread of the block writes.
constexpr uint32_t kPatience = 1 << 16;
// How often pollers are woken without anything having changed before that is a deadlock.
constexpr int kFruitlessRounds = 16;

uint32_t ready_lanes[kMaxWarps], ready_warps;  // bit sets
uint32_t polling_lanes[kMaxWarps], polling_warps;
int fruitless_rounds;
uint64_t progress_accesses;  // counts.accesses at the last progress
uint32_t last_warp, last_lane;
bool change_warp;  // the next pick in turn is to be of another warp
int64_t priorities[kMaxWarps], lowest_priority;
void* main_stack;
bool aborted;
void (*body_of_block)(const unsigned char*);
const unsigned char* parameters_of_block;
uint64_t random_state = 1;

void set_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  ready_lanes[fiber.warp] |= 1u << fiber.lane;
  ready_warps |= 1u << fiber.warp;
}

Fiber* take(uint32_t warp, uint32_t lane) {
  ready_lanes[warp] &= ~(1u << lane);
  if (!ready_lanes[warp]) ready_warps &= ~(1u << warp);
  last_warp = warp;
  last_lane = lane;
  change_warp = false;
  return &fibers[warp * 32 + lane];
}

uint32_t lowest(uint32_t set) { return __builtin_ctz(set); }
uint32_t highest(uint32_t set) { return 31 - __builtin_clz(set); }
// The first member after `last`, cyclically; the other way round the first before it.
uint32_t next_up(uint32_t set, uint32_t last) {
  uint32_t after = set & ~((2u << last) - 1);
  return lowest(after ? after : set);
}
uint32_t next_down(uint32_t set, uint32_t last) {
  uint32_t before = set & ((1u << last) - 1);
  return highest(before ? before : set);
}

// Lanes of one warp in turn until all wait; then the next warp.
Fiber* pick_round_robin() {
  if (ready_lanes[last_warp] && !change_warp)
    return take(last_warp, next_up(ready_lanes[last_warp], last_lane));
  uint32_t warp = next_up(ready_warps, last_warp);
  return take(warp, lowest(ready_lanes[warp]));
}

Fiber* pick_reverse() {
  if (ready_lanes[last_warp] && !change_warp)
    return take(last_warp, next_down(ready_lanes[last_warp], last_lane));
  uint32_t warp = next_down(ready_warps, last_warp);
  return take(warp, highest(ready_lanes[warp]));
}

// Probabilistic concurrency testing: always the ready warp of the highest random priority, and now
// and then some warp falls behind all others. Finds what uniformly random choice averages away.
Fiber* pick_by_priority() {
  if (random_number() % 64 == 0) priorities[random_number() % warp_count] = --lowest_priority;
  uint32_t best = lowest(ready_warps);
  for (uint32_t set = ready_warps; set; set &= set - 1)
    if (priorities[lowest(set)] > priorities[best]) best = lowest(set);
  return take(best, next_up(ready_lanes[best], last_lane));
}

Fiber* pick_random() {
  uint32_t total = 0;
  for (uint32_t set = ready_warps; set; set &= set - 1)
    total += __builtin_popcount(ready_lanes[lowest(set)]);
  uint32_t choice = random_number() % total;
  for (uint32_t warps = ready_warps;; warps &= warps - 1) {
    uint32_t lanes = ready_lanes[lowest(warps)], count = __builtin_popcount(lanes);
    if (choice < count) {
      while (choice--) lanes &= lanes - 1;
      return take(lowest(warps), lowest(lanes));
    }
    choice -= count;
  }
}

Fiber* pick() {
  if (!ready_warps) return nullptr;
  switch (options.schedule) {
    case Schedule::kReverse:
      return pick_reverse();
    case Schedule::kPriorities:
      return pick_by_priority();
    case Schedule::kRandom:
      return pick_random();
    default:
      return pick_round_robin();
  }
}

void wake_pollers() {
  for (; polling_warps; polling_warps &= polling_warps - 1) {
    uint32_t warp = lowest(polling_warps);
    for (; polling_lanes[warp]; polling_lanes[warp] &= polling_lanes[warp] - 1)
      set_ready(fibers[warp * 32 + lowest(polling_lanes[warp])]);
  }
}

// Nobody is ready. Can some parked wait loop still go on?
bool revive_pollers() {
  while (polling_warps) {
    if (land_asynchronous_copies()) {
      if (ready_warps) return true;
      continue;
    }
    if (++fruitless_rounds > kFruitlessRounds) return false;
    wake_pollers();
    return true;
  }
  return false;
}

uint32_t draw_patience() {
  return options.preempt ? 1 + random_number() % (2 * uint64_t{options.preempt} - 1) : kPatience;
}

void report_deadlock(const char* why) {
  constexpr int kListed = 4;
  std::string message = text("%u threads %s:", live_threads, why);
  int listed = 0;
  const Fiber* previous = nullptr;
  Fiber* first = nullptr;
  for (uint32_t i = 0; i < thread_count; i++) {
    Fiber& fiber = fibers[i];
    if (fiber.state == State::kDone) continue;
    if (!first) first = &fiber;
    if (previous && previous->site == fiber.site && previous->waits_for == fiber.waits_for)
      continue;  // one line for all that wait at one place
    previous = &fiber;
    if (listed++ == kListed) break;
    bool waits = fiber.state != State::kReady;
    message +=
        text(" thread %u %s %s at %s;", fiber.linear, waits ? "waits in" : "runs since",
             fiber.waits_for ? fiber.waits_for : "its start", site_source(fiber.site).c_str());
  }
  RunAs reporter(*first);  // some thread is live, or this were no deadlock
  report("deadlock", first->site, kNoSite, message);
}

void run_body() {
  body_of_block(parameters_of_block);
  Fiber* me = running();
  async_thread_exit(*me);
  me->state = State::kDone;
  live_threads--;
  meetings_thread_exit(*me);
  barriers_thread_exit();
  progress();
  switch_away();
  __builtin_unreachable();  // a done fiber is never picked
}

}  // namespace

uint32_t switch_countdown = kPatience;

uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void scheduler_launch_start() {
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 1;
  switch_countdown = draw_patience();
}

void switch_away() {
  Fiber* me = running();
  Fiber* next = pick();
  if (!next && revive_pollers()) next = pick();
  counts.switches++;
  if (next == me) return;
  current = next;
  ptx_switch_stack(&me->stack_pointer, next ? next->stack_pointer : main_stack);
}

void make_ready(Fiber& fiber) { set_ready(fiber); }

void yield() {
  Fiber* me = running();
  if (options.schedule == Schedule::kPriorities) priorities[me->warp] = --lowest_priority;
  set_ready(*me);
  switch_away();
}

void patience_ended() {
  switch_countdown = draw_patience();
  if (!ready_warps) {  // nobody else: perhaps one of those that wait for a copy
    land_asynchronous_copies();
    wake_pollers();
  }
  if (counts.accesses - progress_accesses > options.spin_limit) {
    report_deadlock("make no step forward, some thread spins");
    abort_launch();
  }
  change_warp = true;  // its own warp may spin as a whole
  yield();
}

void give_way(const char* waits_for, uint32_t site) {
  Fiber* me = running();
  me->state = State::kPolling;
  me->waits_for = waits_for;
  me->site = site;
  polling_lanes[me->warp] |= 1u << me->lane;
  polling_warps |= 1u << me->warp;
  switch_away();
}

void progress() {
  fruitless_rounds = 0;
  progress_accesses = counts.accesses;
  wake_pollers();
}

void abort_launch() {
  aborted = true;
  void* abandoned;
  current = nullptr;
  ptx_switch_stack(&abandoned, main_stack);
  __builtin_unreachable();
}

bool run_block(void (*body)(const unsigned char*), const unsigned char* parameters) {
  body_of_block = body;
  parameters_of_block = parameters;
  aborted = false;
  live_threads = thread_count;
  fruitless_rounds = 0;
  progress_accesses = counts.accesses;
  last_warp = options.schedule == Schedule::kReverse ? 0 : kMaxWarps - 1;
  last_lane = 0;
  ready_warps = polling_warps = 0;
  std::fill_n(ready_lanes, kMaxWarps, 0);
  std::fill_n(polling_lanes, kMaxWarps, 0);
  lowest_priority = 0;
  for (uint32_t w = 0; w < warp_count; w++) priorities[w] = 1 + random_number() % 1000;
  for (uint32_t i = 0; i < thread_count; i++) {
    prepare_stack(fibers[i], run_body);
    set_ready(fibers[i]);
  }
  current = pick();
  ptx_switch_stack(&main_stack, running()->stack_pointer);
  current = nullptr;
  if (aborted) return false;
  if (live_threads) report_deadlock("wait for ever");
  return live_threads == 0;
}

}  // namespace ptx
