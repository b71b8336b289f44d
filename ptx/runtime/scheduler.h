// Fibers (one per CUDA thread of the running block), who runs next, and how threads meet.
#pragma once
#include <cstdint>

#include "device.h"

namespace ptx {

constexpr uint32_t kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;

enum class State : uint8_t {
  kReady,
  kBarrier,  // at a block barrier
  kMeeting,  // at a warp or warpgroup operation whose other lanes have not come yet
  kPolling,  // gave way in a wait loop; runs again after progress()
  kDone
};

struct AsyncState;  // a thread's asynchronous copies and matrix operations: async_state.h

struct Fiber : Thread {
  void* stack_pointer;
  State state;
  uint32_t site;          // the instruction it waits at
  const char* waits_for;  // in words, for a deadlock report
  void* payload;          // operands and results of the operation it meets in
  uint32_t clock;         // counts this lane's syncwarps (races.h)
  uint32_t proxy_fences;  // fence.proxy.async executed so far
  Reduced reduced;        // result of its last barrier
  AsyncState* async;      // null until first used
};

extern Fiber fibers[kMaxThreads];
extern uint32_t thread_count, warp_count;  // of the running block
extern uint32_t live_threads;              // that have not returned

// The lanes that exist in a warp of the running block.
inline uint32_t lanes_of_warp(uint32_t warp) {
  uint32_t rest = thread_count - warp * 32;
  return rest >= 32 ? ~0u : (1u << rest) - 1;
}

inline Fiber* running() { return static_cast<Fiber*>(current); }

// Makes another thread the running one for a scope: an asynchronous copy that lands is checked as
// an access of the thread that issued it.
class RunAs {
 public:
  explicit RunAs(Fiber& fiber) : saved_(current) { current = &fiber; }
  ~RunAs() { current = saved_; }
  RunAs(const RunAs&) = delete;

 private:
  Thread* saved_;
};

// ---- Meeting: the lanes of `mask` wait for each other; the last one to come calls resolve with
// all lanes' fibers (indexed by lane, null outside the mask), then all go on. `resolve` is also the
// identity of the operation: lanes meet only in the same one, with the same mask. `waits_for`: a
// name such as "shfl.sync". Reports bad-mask and divergent-warp-op.
using Resolve = void (*)(Fiber* const* lanes, uint32_t mask);
void collective(const char* waits_for, uint32_t mask, uint32_t site, void* payload, Resolve);
// In resolve: what a thread brought.
template <typename Operands>
Operands& operands(Fiber* const* threads, int i) {
  return *static_cast<Operands*>(threads[i]->payload);
}

// The same for the 4 warps of the running thread's warpgroup; resolve gets its 128 fibers.
using ResolveWarpgroup = void (*)(Fiber* const* threads);
void warpgroup_collective(const char* waits_for, uint32_t site, void* payload, ResolveWarpgroup);

// Lanes of the running thread's warp that exist and have not returned.
uint32_t live_lanes();

// ---- Giving way

// Lets others run; the thread itself stays ready.
void yield();
// For wait loops: parks the running thread until progress(). When nobody can run, first
// land_asynchronous_copies() is asked; if that brings nothing, pollers are woken (a try_wait may
// return false and its thread go on to something else), and after some fruitless rounds the launch
// ends with a deadlock report that lists who waits where.
void give_way(const char* waits_for, uint32_t site);
// Something a parked thread may look for has changed (an mbarrier's phase ended, say).
void progress();

// ---- For the runtime's own use

void make_ready(Fiber&);
void switch_away();  // runs the next ready thread; returns when the running one is picked again
// Accesses until the running thread is made to give way (the option preempt, or spinning).
extern uint32_t switch_countdown;
void patience_ended();

void scheduler_launch_start();
// Runs the body on every thread of the running block until all have returned; false: aborted.
bool run_block(void (*body)(const unsigned char*), const unsigned char* parameters);

// ---- Provided by the asynchronous operations (async_state.cpp)

void async_launch_start();       // forget the former launch
void async_block_start();        // all fibers' `async` were set to null
void async_thread_exit(Fiber&);  // its body has returned
// Nobody can run: lands some copy that is still in flight, and says whether one was.
bool land_asynchronous_copies();

}  // namespace ptx
