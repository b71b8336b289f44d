// Counters of a launch: per kind of event, and per memory instruction.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "races.h"

namespace ptx {

constexpr uint32_t kSector = 32;  // bytes that global memory moves at a time

struct Counts {
  uint64_t mma, wgmma, ldmatrix, stmatrix, shuffles, barriers, warp_syncs, async_copies;
  uint64_t bulk_copies, load_phases, blocks, blocks_run, switches, accesses, same_value_writes;
};
extern Counts counts;

// A memory instruction of the last launch. A request is one warp's execution of it.
struct SiteCounts {
  uint32_t site;
  bool shared;
  Access access;
  uint32_t bytes_per_lane;
  uint64_t requests, lanes, bytes, distinct_bytes;
  uint64_t sectors;                       // global: 32-byte sectors requested
  uint64_t wavefronts, ideal_wavefronts;  // shared: passes through the 32 banks of 4 bytes
};
extern std::vector<SiteCounts> site_counts;

// One lane's access. The n-th executions of an instruction by the lanes of a warp are one request.
void count_access(const Span&, Access, uint32_t site);
// A shared access of a whole warp with given rows, such as ldmatrix: `rows` addresses of 16 bytes,
// of which each 8 are served together.
void count_rows(const uint32_t* offsets, int rows, Access, uint32_t site);
// A bulk or tensor copy's global side: whole sectors.
void count_bulk(const Span& global, Access, uint32_t site);

// A plain global load: the first one of a barrier interval begins a load phase.
void count_load_phase();
void counters_barrier();  // a barrier interval ends
void counters_launch_start(uint32_t first_site, uint32_t site_count);
void counters_block_end();
void counters_launch_end();

}  // namespace ptx
