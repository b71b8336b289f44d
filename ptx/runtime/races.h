// Shadow memory and the happens-before check.
//
// Time. `epoch` is a counter of the whole process that goes up whenever threads synchronise through
// a barrier (or an mbarrier), and at the start of every block and launch. A memory access is
// stamped with the epoch it was made in.
//
// Between warps. Every warp w keeps one SyncTimes: known[w].of[v] is the epoch at which warp v last
// released its work in a synchronisation that w has learnt of, directly or through others. What
// warp v did in an epoch before that has happened before anything w does now; the rest is
// concurrent. So a named barrier orders only the warps that take part in it. A barrier joins the
// times of those who come (release) and gives the result to those who leave (acquire).
//
// Inside a warp. Lanes are ordered by block barriers as above, and by syncwarp, for which every
// lane has a clock and a vector of the other lanes' clocks. Shuffles, votes and mma order nothing.
#pragma once
#include <cstdint>
#include <string>

#include "scheduler.h"

namespace ptx {

extern uint32_t epoch;
extern uint32_t block_epoch, launch_epoch;  // the first epoch of the running block, launch

// One past the last real warp: what asynchronous engines write may be released under this name.
constexpr uint32_t kAsyncWarp = kMaxWarps;

struct SyncTimes {
  uint32_t of[kMaxWarps + 1];
};

extern SyncTimes known[kMaxWarps + 1];  // of the running block

void join(SyncTimes& into, const SyncTimes& from);
// Publishes in `times` what the running thread's warp has done and knows; begins a new epoch.
void release(SyncTimes& times);
// The running thread's warp (or another) learns what `times` holds.
void acquire(const SyncTimes& times);
void acquire(uint32_t warp, const SyncTimes& times);
// syncwarp: the lanes of mask know of everything that any of them did or knew.
void join_lanes(uint32_t warp, uint32_t mask);

// ---- Per byte: flags

enum Flag : uint8_t {
  kAllocated = 1,
  kWritten = 2,
  kReadOnly = 4,  // read by ld.global.nc in this launch
  kSeenRead = 8,  // in this launch: the footprint
  kSeenWritten = 16,
  kAsyncWrite = 32,  // an unfinished asynchronous copy writes it
  kAsyncRead = 64    // an unfinished asynchronous operation reads it
};

// ---- Per byte: the last write and the reads since, kept once for neighbouring bytes that have
// only been accessed together

struct Record {
  uint32_t write_epoch, write_clock, write_site;
  uint16_t writer : 15;    // thread of the block of that epoch
  uint16_t atomic : 1;     // the last write was an atomic operation
  uint16_t writer_fences;  // the writer's proxy_fences then
  // The reads since, as long as one warp made them: the lanes, and the least of their clocks.
  uint32_t read_epoch, read_clock, read_lanes, read_site;
  // The last read by a block before the one of read_epoch: no write may follow it in its launch.
  uint32_t earlier_block_epoch, earlier_block_site;
  uint32_t read_warps;  // warps whose reads may be concurrent with each other
  uint32_t read_table;  // where several warps read: index of their epochs, clocks and lanes
};

// A run of bytes inside one allocation or the shared window, with its shadow.
struct Span {
  unsigned char* data;
  uint8_t* flags;  // one per byte; null for local memory and module variables, which have no shadow
  size_t offset;   // from the start of the arena or of the shared window
  uint32_t bytes;
  bool shared;
};

// The span of a pointer's bytes; reports out-of-bounds, misaligned (against `alignment`) or
// wild-access, and then does not return.
Span span(const void* p, uint32_t bytes, Space, uint32_t site, bool writes, uint32_t alignment);

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Checks an access by the running thread for hazards with asynchronous operations, never-written
// bytes and races, and records it. `stored`: what a plain store writes, if known. (The asynchronous
// engine, warp kAsyncWarp, is recorded as a writer only: marks stand for what it still reads.)
void touch(const Span&, Access, uint32_t site, const void* stored = nullptr);

// span + touch + count for one lane's access; no preemption (see read, write, atomic in device.h,
// which add it). Returns where to read from.
const void* access(const void* p, uint32_t bytes, Access, Space, uint32_t site,
                   const void* stored = nullptr, bool counted = true);

// The record of one byte, for checks of one's own (missing-proxy-fence).
const Record& record_of(const Span&, uint32_t byte);
// Was this byte last written in the running block through the generic proxy, by a thread that has
// not executed fence.proxy.async since?
bool unfenced_write(const Record&);

// What the running thread knows of the others' work now, to ask later whether a write by a thread
// of the block had happened before. All zeros: nothing had.
struct Knowledge {
  SyncTimes warps;
  uint32_t lanes[32];
};
Knowledge knowledge();
bool had_happened(const Record&, const Knowledge&);

// In-flight marks: kAsyncWrite, kAsyncRead.
void mark(const Span&, uint8_t flags);
void unmark(const Span&, uint8_t flags);
// The instruction of the unfinished bulk or tensor copy that writes (or reads) this byte; kNoSite
// where the mark is of a cp.async or wgmma.
uint32_t bulk_copy_of(const unsigned char* p, bool writes);

void races_launch_start();
void races_block_start();

}  // namespace ptx
