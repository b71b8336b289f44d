// The runtime's inside, for the files that implement device.h: options, and the headers by concern.
#pragma once
#include "counters.h"
#include "device.h"
#include "races.h"
#include "report.h"
#include "scheduler.h"

namespace ptx {

enum class Schedule : int64_t { kRoundRobin, kReverse, kPriorities, kRandom };

struct Options {
  bool race = true, init = true, count = true;
  Schedule schedule = Schedule::kRoundRobin;
  uint64_t seed = 1;
  uint32_t preempt = 0;      // 1/n chance of a switch at a memory access; 0: never
  bool async_early = false;  // copies land when issued; otherwise as late as the program allows
  int mma_rounding = 0;      // 0: in double, rounded once; 1: fp32 in sequence; 2: truncating
  bool jitter = false;
  uint32_t shared_limit = 232448;  // bytes per block
  uint32_t max_reports = 20;
  uint64_t sample = 0;        // run only this many blocks, evenly chosen; 0: all
  bool poison_races = false;  // run the launch again, racing reads see 0xff...
  // Accesses without a barrier, a return or another step forward that count as spinning for ever.
  uint64_t spin_limit = uint64_t{1} << 30;
};
extern Options options;

constexpr size_t kArenaBytes = size_t{4} << 30, kSharedBytes = size_t{256} << 10;
extern unsigned char* arena;  // all global memory; bytes outside allocations are guard zones

uint64_t random_number();  // from the option seed, restarted by every launch

}  // namespace ptx
