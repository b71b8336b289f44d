// The happens-before check of one memory access (races.h explains epochs, times and clocks).
#include "races.h"

#include <algorithm>
#include <cstring>

#include "shadow.h"
#include "state.h"

namespace ptx {

uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
SyncTimes known[kMaxWarps + 1];
bool racing_read;

namespace {

// lane_clocks[w][l][m]: the clock of lane m up to which lane l of warp w knows of its work.
uint32_t lane_clocks[kMaxWarps + 1][32][32];

// Reads of one record by several warps that may be concurrent. Only of the running block: of an
// earlier one it matters no longer who read, no barrier orders blocks.
struct WarpReads {
  uint32_t epoch, clock, lanes;
};
struct ReadTable {
  WarpReads of[kMaxWarps];
};
std::vector<ReadTable> read_tables;
uint32_t read_tables_used;

constexpr uint32_t kLastEpoch = 0xf0000000;  // a new launch then starts from a clean shadow

uint32_t warp_of(uint32_t thread) { return thread / 32; }

// ---- Has the last write happened before what the running thread does now?

bool write_happened_before(const Record& record) {
  if (record.write_epoch < launch_epoch) return true;  // the host waited in between
  if (record.write_epoch < block_epoch) return false;  // another block of this launch
  uint32_t me = current->warp, writer_warp = warp_of(record.writer);
  if (record.writer == current->linear || record.write_epoch < known[me].of[writer_warp])
    return true;
  return writer_warp == me &&
         record.write_clock < lane_clocks[me][current->lane][record.writer % 32];
}

// ---- Have all reads since the last write?

bool reads_of_warp_happened_before(uint32_t warp, const WarpReads& reads) {
  uint32_t me = current->warp;
  if (reads.epoch < known[me].of[warp]) return true;
  if (warp != me) return false;
  const uint32_t* clocks = lane_clocks[me][current->lane];
  for (uint32_t lanes = reads.lanes & ~(1u << current->lane); lanes; lanes &= lanes - 1)
    if (reads.clock >= clocks[__builtin_ctz(lanes)]) return false;
  return true;
}

bool several(uint32_t warps) { return warps & (warps - 1); }

bool reads_happened_before(const Record& record) {
  if (record.read_epoch < launch_epoch) return true;
  if (record.read_epoch < block_epoch) return false;
  if (!several(record.read_warps))
    return reads_of_warp_happened_before(__builtin_ctz(record.read_warps),
                                         {record.read_epoch, record.read_clock, record.read_lanes});
  for (uint32_t warps = record.read_warps; warps; warps &= warps - 1) {
    uint32_t warp = __builtin_ctz(warps);
    if (!reads_of_warp_happened_before(warp, read_tables[record.read_table].of[warp])) return false;
  }
  return true;
}

// ---- Recording

// Adds the running lane to the reads of its own warp. Those that are ordered before are dropped:
// who is ordered after this read is after them too. Lanes that remain share the least of their
// clocks, which errs on the side of silence where divergent lanes have synchronised differently
// often.
void add_lane(WarpReads& reads, bool fresh) {
  const Fiber& me = *running();
  uint32_t others = 0;
  if (!fresh && reads.epoch >= known[me.warp].of[me.warp]) {
    const uint32_t* clocks = lane_clocks[me.warp][me.lane];
    for (uint32_t lanes = reads.lanes & ~(1u << me.lane); lanes; lanes &= lanes - 1)
      if (reads.clock >= clocks[__builtin_ctz(lanes)]) others |= lanes & -lanes;
  }
  reads.clock = others ? std::min(reads.clock, me.clock) : me.clock;
  reads.lanes = others | 1u << me.lane;
  reads.epoch = epoch;
}

// Warps among the record's readers, other than the running one, that may still be concurrent.
uint32_t concurrent_readers(const Record& record) {
  uint32_t me = current->warp, result = 0;
  for (uint32_t warps = record.read_warps & ~(1u << me); warps; warps &= warps - 1) {
    uint32_t warp = __builtin_ctz(warps);
    uint32_t read = several(record.read_warps) ? read_tables[record.read_table].of[warp].epoch
                                               : record.read_epoch;
    if (read >= known[me].of[warp]) result |= warps & -warps;
  }
  return result;
}

void note_shared_read(Record& record, uint32_t others, bool mine) {
  uint32_t me = current->warp;
  WarpReads before{record.read_epoch, record.read_clock, record.read_lanes};
  if (!several(record.read_warps)) {  // the second warp to read: open a table
    if (read_tables_used == read_tables.size()) read_tables.emplace_back();
    record.read_table = read_tables_used++;
    read_tables[record.read_table].of[__builtin_ctz(record.read_warps)] = before;
  }
  add_lane(read_tables[record.read_table].of[me], !mine);
  record.read_warps = others | 1u << me;
}

void note_read(Record& record, uint32_t site) {
  uint32_t me = current->warp;
  if (me == kAsyncWarp) return;
  bool in_block = record.read_epoch >= block_epoch && record.read_warps;
  bool mine = in_block && (record.read_warps >> me & 1);
  uint32_t others = in_block ? concurrent_readers(record) : 0;
  if (others) {
    note_shared_read(record, others, mine);
  } else {
    WarpReads reads{record.read_epoch, record.read_clock, record.read_lanes};
    if (mine && several(record.read_warps)) reads = read_tables[record.read_table].of[me];
    add_lane(reads, !mine);
    record.read_clock = reads.clock;
    record.read_lanes = reads.lanes;
    record.read_warps = 1u << me;
  }
  if (record.read_epoch < block_epoch) {
    record.earlier_block_epoch = record.read_epoch;
    record.earlier_block_site = record.read_site;
  }
  record.read_epoch = epoch;
  record.read_site = site;
}

void note_write(Record& record, bool atomic, uint32_t site) {
  const Fiber& me = *running();
  record.write_epoch = epoch;
  record.write_clock = me.clock;
  record.write_site = site;
  record.writer = me.linear;
  record.atomic = atomic;
  record.writer_fences = me.proxy_fences;
  // An atomic operation orders nobody: the reads stay known.
  if (!atomic) record.read_epoch = record.earlier_block_epoch = 0;
}

// ---- Reporting

void report_write_race(const Record& record, Access kind, uint32_t site, const void* p) {
  bool blocks = record.write_epoch < block_epoch;
  const char* name = kind == Access::kRead ? blocks ? "race-RAW-blocks" : "race-RAW"
                     : blocks              ? "race-WAW-blocks"
                                           : "race-WAW";
  if (Report* r = new_report(name, site, record.write_site))
    r->message = text("%s %s without a barrier after the write by thread %u%s",
                      kind == Access::kRead ? "read of" : "write to", where(p).c_str(),
                      uint32_t{record.writer}, blocks ? " of another block" : "");
}

void report_read_race(bool blocks, uint32_t read_site, uint32_t site, const void* p) {
  if (Report* r = new_report(blocks ? "race-WAR-blocks" : "race-WAR", site, read_site))
    r->message = text("write to %s without a barrier after a read by another thread%s",
                      where(p).c_str(), blocks ? " of another block" : "");
}

// Several lanes storing one value by one instruction (a replicated layout) do so in any order.
bool same_value(const Record& record, const void* stored, const void* p, uint32_t bytes,
                uint32_t site) {
  if (!stored || site != record.write_site || record.write_epoch < block_epoch) return false;
  if (std::memcmp(stored, p, bytes)) return false;
  counts.same_value_writes += bytes;
  return true;
}

}  // namespace

void check_race(Record& record, Access kind, uint32_t site, const unsigned char* p, uint32_t bytes,
                const void* stored, bool shared) {
  const uint32_t since = shared ? block_epoch : launch_epoch;
  if (record.write_epoch >= since && !(kind == Access::kAtomic && record.atomic) &&
      !write_happened_before(record)) {
    if (!(kind == Access::kWrite && same_value(record, stored, p, bytes, site))) {
      report_write_race(record, kind, site, p);
      racing_read |= kind == Access::kRead;
    }
  }
  if (kind == Access::kRead) {
    if (options.poison_races) racing_read |= was_raced(p, bytes, site);
    note_read(record, site);
    return;
  }
  if (record.read_epoch >= since && !reads_happened_before(record)) {
    bool blocks = record.read_epoch < block_epoch;
    report_read_race(blocks, record.read_site, site, p);
    if (!blocks) remember_raced_read(p, bytes, record.read_site);
  } else if (record.earlier_block_epoch >= since) {
    report_read_race(true, record.earlier_block_site, site, p);
  }
  note_write(record, kind == Access::kAtomic, site);
}

void copy_read_table(Record& record) {
  if (record.read_epoch < block_epoch || !several(record.read_warps)) return;
  if (read_tables_used == read_tables.size()) read_tables.emplace_back();
  read_tables[read_tables_used] = read_tables[record.read_table];
  record.read_table = read_tables_used++;
}

bool unfenced_write(const Record& record) {
  return record.write_epoch >= block_epoch && record.writer < kMaxThreads &&
         uint16_t(fibers[record.writer].proxy_fences) == record.writer_fences;
}

Knowledge knowledge() {
  Knowledge now;
  now.warps = known[current->warp];
  std::copy_n(lane_clocks[current->warp][current->lane], 32, now.lanes);
  return now;
}

bool had_happened(const Record& record, const Knowledge& then) {
  uint32_t writer_warp = warp_of(record.writer);
  return record.write_epoch < then.warps.of[writer_warp] ||
         (writer_warp == current->warp && record.write_clock < then.lanes[record.writer % 32]);
}

void join(SyncTimes& into, const SyncTimes& from) {
  for (uint32_t v = 0; v <= kMaxWarps; v++) into.of[v] = std::max(into.of[v], from.of[v]);
}

void release(SyncTimes& times) {
  join(times, known[current->warp]);
  times.of[current->warp] = ++epoch;
}

void acquire(uint32_t warp, const SyncTimes& times) { join(known[warp], times); }
void acquire(const SyncTimes& times) { acquire(current->warp, times); }

void join_lanes(uint32_t warp, uint32_t mask) {
  uint32_t joined[32] = {};
  for (uint32_t set = mask; set; set &= set - 1) {
    uint32_t lane = __builtin_ctz(set);
    for (int i = 0; i < 32; i++) joined[i] = std::max(joined[i], lane_clocks[warp][lane][i]);
    joined[lane] = std::max(joined[lane], fibers[warp * 32 + lane].clock + 1);
  }
  for (uint32_t set = mask; set; set &= set - 1) {
    uint32_t lane = __builtin_ctz(set);
    std::memcpy(lane_clocks[warp][lane], joined, sizeof joined);
    fibers[warp * 32 + lane].clock++;
  }
}

void races_launch_start() {
  if (epoch > kLastEpoch) {
    forget_records();
    epoch = 0;
  }
  launch_epoch = ++epoch;
}

void races_block_start() {
  block_epoch = ++epoch;
  for (SyncTimes& times : known) std::fill_n(times.of, kMaxWarps + 1, block_epoch);
  std::memset(lane_clocks, 0, sizeof(uint32_t) * 32 * 32 * warp_count);
  std::memset(lane_clocks[kAsyncWarp], 0, sizeof lane_clocks[kAsyncWarp]);
  read_tables_used = 0;
}

}  // namespace ptx
