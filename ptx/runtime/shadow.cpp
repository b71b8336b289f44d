// Shadow memory: flags per byte, and records of the last write and reads, per byte where they
// differ and per 2, 4, 8 or 16 bytes where all accesses so far took those bytes together.
#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "state.h"

namespace ptx {

unsigned char* arena = nullptr;
unsigned char* shared_window = nullptr;
uint8_t* arena_flags = nullptr;
uint8_t* arena_pages_seen = nullptr;

namespace {

constexpr uint32_t kGranule = 16, kLevels = 5;
constexpr uint64_t kEveryByte = 0x0101010101010101;

// The records of a stretch of memory. A granule's level says how far it is split: its records stand
// for 16 >> level bytes each. Every level has an array of its own, so that records of neighbours
// are neighbours: memory that is accessed by fours costs 52 bytes of shadow per 4.
struct Records {
  uint8_t* levels;            // per granule
  Record* at_level[kLevels];  // per 16 >> level bytes
  size_t bytes;

  Record& at(size_t offset) { return at(offset, levels[offset / kGranule]); }
  Record& at(size_t offset, uint32_t level) {
    return at_level[level][offset >> (kLevels - 1 - level)];
  }
};
Records global_records, shared_records;
uint8_t* shared_flags;

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

uint32_t step_of(uint32_t level) { return kGranule >> level; }

bool reserve(Records& records, size_t bytes) {
  records.bytes = bytes;
  records.levels = static_cast<uint8_t*>(reserve(bytes / kGranule));
  bool reserved = records.levels;
  for (uint32_t level = 0; level < kLevels; level++) {
    void* memory = reserve(bytes / step_of(level) * sizeof(Record));
    records.at_level[level] = static_cast<Record*>(memory);
    reserved &= memory != nullptr;
  }
  return reserved;
}

// Gives every record of the granule a copy at `level` for each of its parts.
void split(Records& records, size_t granule, uint32_t level) {
  const size_t begin = granule * kGranule, end = begin + kGranule;
  for (size_t at = begin; at < end; at += step_of(level)) {
    const Record& whole = records.at(at);
    Record& part = records.at(at, level);
    part = whole;
    if (at % step_of(records.levels[granule])) copy_read_table(part);
  }
  records.levels[granule] = level;
}

// The records of one granule against bytes [low, high) of it.
void check_granule(Records& records, size_t granule, uint32_t low, uint32_t high, Access kind,
                   uint32_t site, const unsigned char* p, const unsigned char* stored,
                   bool shared) {
  const uint32_t bounds = low | high | kGranule;
  const uint32_t needed = kLevels - 1 - __builtin_ctz(bounds);
  if (records.levels[granule] < needed) split(records, granule, needed);
  const uint32_t level = records.levels[granule], step = step_of(level);
  const uint32_t since = shared ? block_epoch : launch_epoch;
  bool fresh = true;  // nothing of this block (shared), of this launch (global)
  for (uint32_t at = low; at < high; at += step) {
    Record& record = records.at(granule * kGranule + at, level);
    fresh &= record.write_epoch < since && record.read_epoch < since;
    check_race(record, kind, site, p + (at - low), step, stored ? stored + (at - low) : nullptr,
               shared);
  }
  // All records of the granule now say the same.
  const bool whole = high - low == kGranule;
  if (whole && level > 0 && (fresh || kind == Access::kWrite)) {
    records.at(granule * kGranule, 0) = records.at(granule * kGranule, level);
    records.levels[granule] = 0;
  }
}

void check_records(const Span& span, Access kind, uint32_t site, const void* stored) {
  Records& records = span.shared ? shared_records : global_records;
  const auto* data = static_cast<const unsigned char*>(stored);
  for (size_t at = span.offset, end = span.offset + span.bytes; at < end;) {
    size_t granule = at / kGranule, next = std::min(end, (granule + 1) * kGranule);
    size_t done = at - span.offset;
    check_granule(records, granule, at % kGranule, next - granule * kGranule, kind, site,
                  span.data + done, data ? data + done : nullptr, span.shared);
    at = next;
  }
}

// ---- Flags, eight bytes at a time

struct FlagWord {
  uint64_t value, every;  // `every`: 1 in each byte that is there
};

FlagWord load_flags(const uint8_t* flags, uint32_t bytes) {
  if (bytes >= 8) {
    FlagWord word{0, kEveryByte};
    std::memcpy(&word.value, flags, 8);
    return word;
  }
  FlagWord word{0, kEveryByte >> (64 - 8 * bytes)};
  switch (bytes) {
    case 4:
      std::memcpy(&word.value, flags, 4);
      break;
    case 2:
      std::memcpy(&word.value, flags, 2);
      break;
    case 1:
      std::memcpy(&word.value, flags, 1);
      break;
    default:
      std::memcpy(&word.value, flags, bytes);
  }
  return word;
}

void store_flags(uint8_t* flags, uint64_t value, uint32_t bytes) {
  switch (bytes) {
    case 4:
      std::memcpy(flags, &value, 4);
      break;
    case 2:
      std::memcpy(flags, &value, 2);
      break;
    case 1:
      std::memcpy(flags, &value, 1);
      break;
    default:
      std::memcpy(flags, &value, bytes < 8 ? bytes : 8);
  }
}

const unsigned char* first_with(const Span& span, uint32_t from, uint8_t flag, bool set) {
  uint32_t i = from;
  while (i + 1 < span.bytes && ((span.flags[i] & flag) != 0) != set) i++;
  return span.data + i;
}

void report_hazard(const Span& span, uint32_t from, uint8_t flag, Access kind, uint32_t site) {
  const unsigned char* p = first_with(span, from, flag, true);
  bool writes = flag == kAsyncWrite;
  uint32_t other = bulk_copy_of(p, writes);
  const char *name = "bulk-copy-hazard", *operation = "bulk copy";
  if (other == kNoSite && writes) {
    name = "cp.async-hazard", operation = "cp.async";
    other = record_of(span, p - span.data).write_site;
  } else if (other == kNoSite) {
    name = "wgmma-hazard", operation = "wgmma";
  }
  if (Report* r = new_report(name, site, other))
    r->message = text("%s %s, which an unfinished %s still %s",
                      kind == Access::kRead ? "read of" : "write to", where(p).c_str(), operation,
                      writes ? "writes" : "reads");
}

void report_read_only(const Span& span, uint32_t from, uint32_t site) {
  const unsigned char* p = first_with(span, from, kReadOnly, true);
  uint32_t read_site = record_of(span, p - span.data).read_site;
  if (Report* r = new_report("nc-load-of-written-data", site, read_site))
    r->message = "write to " + where(p) + ", which this launch reads by ld.global.nc";
}

void note_pages(const Span& span) {
  if (span.shared || !span.bytes) return;
  size_t last = (span.offset + span.bytes - 1) / kPageBytes;
  for (size_t page = span.offset / kPageBytes; page <= last; page++) arena_pages_seen[page] = 1;
}

void check_flags(const Span& span, Access kind, uint32_t site) {
  for (uint32_t i = 0; i < span.bytes; i += 8) {
    uint32_t bytes = std::min(span.bytes - i, 8u);
    auto [value, every] = load_flags(span.flags + i, bytes);
    if (value & (kAsyncWrite * every)) report_hazard(span, i, kAsyncWrite, kind, site);
    if (kind != Access::kRead && (value & (kAsyncRead * every)))
      report_hazard(span, i, kAsyncRead, kind, site);
    if (kind != Access::kRead && !span.shared && (value & (kReadOnly * every)))
      report_read_only(span, i, site);
    if (kind != Access::kWrite && options.init && (~value & (kWritten * every))) {
      if (Report* r = new_report("uninitialised-read", site, kNoSite))
        r->message = "read of never-written " + where(first_with(span, i, kWritten, false));
    }
    if (kind != Access::kWrite) value |= kSeenRead * every;
    if (kind != Access::kRead) value |= (kSeenWritten | kWritten) * every;
    store_flags(span.flags + i, value, bytes);
  }
  note_pages(span);
}

struct RacedRead {
  uint32_t block, writer, read_site;
};
std::unordered_multimap<const unsigned char*, RacedRead> raced_reads;
constexpr size_t kMaxRacedReads = 4000000;

uint32_t block_number() {
  return block_index.x + grid_dim.x * (block_index.y + grid_dim.y * block_index.z);
}

}  // namespace

bool reserve_memory() {
  if (arena) return true;
  auto* memory = static_cast<unsigned char*>(reserve(kArenaBytes));
  arena_flags = static_cast<uint8_t*>(reserve(kArenaBytes));
  arena_pages_seen = static_cast<uint8_t*>(reserve(kArenaBytes / kPageBytes));
  shared_window = static_cast<unsigned char*>(reserve(kSharedBytes));
  shared_flags = static_cast<uint8_t*>(reserve(kSharedBytes));
  if (!memory || !arena_flags || !arena_pages_seen || !shared_window || !shared_flags ||
      !reserve(global_records, kArenaBytes) || !reserve(shared_records, kSharedBytes))
    return false;
  arena = memory;
  return true;
}

bool in_arena(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - arena) < kArenaBytes;
}
bool in_shared_window(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - shared_window) < kSharedBytes;
}

uint8_t* flags_of_shared(size_t offset) { return shared_flags + offset; }

void touch(const Span& span, Access kind, uint32_t site, const void* stored) {
  if (!span.flags || !span.bytes) return;
  check_flags(span, kind, site);
  if (options.race) check_records(span, kind, site, stored);
}

const Record& record_of(const Span& span, uint32_t byte) {
  Records& records = span.shared ? shared_records : global_records;
  return records.at(span.offset + byte);
}

void mark(const Span& span, uint8_t flags) {
  for (uint32_t i = 0; i < span.bytes; i++) span.flags[i] |= flags;
  note_pages(span);
}

void unmark(const Span& span, uint8_t flags) {
  for (uint32_t i = 0; i < span.bytes; i++) span.flags[i] &= ~flags;
}

void remember_raced_read(const unsigned char* p, uint32_t bytes, uint32_t read_site) {
  if (options.poison_races) return;  // this is the second run
  for (uint32_t i = 0; i < bytes && raced_reads.size() < kMaxRacedReads; i++)
    raced_reads.insert({p + i, {block_number(), current->linear, read_site}});
}

bool was_raced(const unsigned char* p, uint32_t bytes, uint32_t site) {
  if (raced_reads.empty()) return false;
  for (uint32_t i = 0; i < bytes; i++) {
    auto [begin, end] = raced_reads.equal_range(p + i);
    for (auto it = begin; it != end; ++it)
      if (it->second.block == block_number() && it->second.read_site == site &&
          it->second.writer != current->linear)
        return true;
  }
  return false;
}

void shadow_launch_start() {
  if (!options.poison_races) raced_reads.clear();
}

void shadow_block_start() {
  uint32_t bytes = (total_shared() + kGranule - 1) / kGranule * kGranule;
  std::memset(shared_window, 0xff, bytes);
  std::memset(shared_flags, kAllocated, bytes);
  std::memset(shared_records.levels, 0, bytes / kGranule);
}

void return_records(size_t offset, size_t bytes) {
  // Whole pages of each array only; a record that stays is of a former launch.
  auto drop = [](Record* records, size_t first, size_t count) {
    auto round_up = [](uintptr_t p) { return (p + kPageBytes - 1) / kPageBytes * kPageBytes; };
    uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(records + first));
    uintptr_t end = reinterpret_cast<uintptr_t>(records + first + count) / kPageBytes * kPageBytes;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  };
  for (uint32_t level = 0; level < kLevels; level++)
    drop(global_records.at_level[level], offset / step_of(level), bytes / step_of(level));
  std::memset(global_records.levels + offset / kGranule, 0, bytes / kGranule);
}

void forget_records() {
  for (Records* records : {&global_records, &shared_records}) {
    for (uint32_t level = 0; level < kLevels; level++) {
      const size_t bytes = records->bytes / step_of(level) * sizeof(Record);
      madvise(records->at_level[level], bytes, MADV_DONTNEED);
    }
  }
}

}  // namespace ptx
