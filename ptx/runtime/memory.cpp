// One lane's access to memory: where it goes, whether it may, and then the shadow and the counters.
#include <cstring>

#include "arena.h"
#include "launch.h"
#include "registry.h"
#include "shadow.h"
#include "state.h"

namespace ptx {

namespace {

const char* verb(bool writes) { return writes ? "write" : "read"; }

void check_alignment(const void* p, uint32_t bytes, uint32_t alignment, uint32_t site,
                     bool writes) {
  if (reinterpret_cast<uintptr_t>(p) & (alignment - 1))
    report_and_abort("misaligned", site, kNoSite,
                     text("%u-byte %s at an address that is not %u-byte aligned: %s", bytes,
                          verb(writes), alignment, where(p).c_str()));
}

[[noreturn]] void out_of_bounds(const void* p, uint32_t bytes, const char* outside, uint32_t site,
                                bool writes) {
  report_and_abort("out-of-bounds", site, kNoSite,
                   text("%u-byte %s %s: %s", bytes, verb(writes), outside, where(p).c_str()));
}

bool all_allocated(const uint8_t* flags, uint32_t bytes) {
  constexpr uint64_t kAll = kAllocated * 0x0101010101010101;
  uint64_t common = kAll;
  for (; bytes >= 8; bytes -= 8, flags += 8) {
    uint64_t word;
    std::memcpy(&word, flags, 8);
    common &= word;
  }
  if (bytes >= 4) {
    uint32_t word;
    std::memcpy(&word, flags, 4);
    common &= word | kAll << 32;
    bytes -= 4, flags += 4;
  }
  for (; bytes; bytes--, flags++) common &= kAll ^ (~*flags & kAllocated);
  return common == kAll;
}

Span global_span(unsigned char* p, uint32_t bytes, uint32_t site, bool writes) {
  size_t offset = p - arena;
  if (bytes > kArenaBytes - offset || !all_allocated(arena_flags + offset, bytes))
    out_of_bounds(p, bytes, "outside every allocation", site, writes);
  return {p, arena_flags + offset, offset, bytes, false};
}

Span shared_span(unsigned char* p, uint32_t bytes, uint32_t site, bool writes) {
  size_t offset = p - shared_window;
  if (offset > total_shared() || bytes > total_shared() - offset)
    out_of_bounds(p, bytes, "past the block's shared memory", site, writes);
  return {p, flags_of_shared(offset), offset, bytes, true};
}

// Memory without a shadow: module variables, and the running thread's own local window.
Span other_span(unsigned char* p, uint32_t bytes, Space space, uint32_t site, bool writes) {
  if (const Variable* variable = variable_at(p)) {
    if (writes)
      report_and_abort("unsupported", site, kNoSite,
                       "write to a module-scope variable (only tables that are read)");
    size_t offset = p - static_cast<unsigned char*>(variable->data);
    if (offset + bytes > variable->bytes)
      report_and_abort("out-of-bounds", site, kNoSite,
                       text("%u-byte read of bytes %zu... of a module-scope variable of %u bytes",
                            bytes, offset, variable->bytes));
    return {p, nullptr, 0, bytes, false};
  }
  if (space == Space::kGeneric && p >= current->local && p < current->local + local_bytes()) {
    local(p - current->local, bytes, site);
    return {p, nullptr, 0, bytes, false};
  }
  if (const Thread* owner = local_window_owner(p))
    report_and_abort(
        "wild-access", site, kNoSite,
        text("%u-byte %s of the local memory of thread %u", bytes, verb(writes), owner->linear));
  report_and_abort("wild-access", site, kNoSite,
                   text("%u-byte %s at %s", bytes, verb(writes), where(p).c_str()));
}

inline void count_patience() {
  if (--switch_countdown == 0) patience_ended();
}

// What a racing read sees under poison_races.
struct Poison {
  alignas(32) unsigned char bytes[64];
  Poison() { std::memset(bytes, 0xff, sizeof bytes); }
};
const Poison poison;

}  // namespace

Span span(const void* pointer, uint32_t bytes, Space space, uint32_t site, bool writes,
          uint32_t alignment) {
  auto* p = static_cast<unsigned char*>(const_cast<void*>(pointer));
  check_alignment(p, bytes, alignment, site, writes);
  // An address of the shared space is an offset from the window and can only miss upwards.
  if (space == Space::kShared || (space == Space::kGeneric && in_shared_window(p)))
    return shared_span(p, bytes, site, writes);
  if (in_arena(p)) return global_span(p, bytes, site, writes);
  return other_span(p, bytes, space, site, writes);
}

const void* access(const void* p, uint32_t bytes, Access kind, Space space, uint32_t site,
                   const void* stored, bool counted) {
  Span target = span(p, bytes, space, site, kind != Access::kRead, bytes);
  if (!target.flags) return p;
  counts.accesses++;
  racing_read = false;
  touch(target, kind, site, stored);
  if (counted && options.count) count_access(target, kind, site);
  return racing_read && options.poison_races && bytes <= sizeof poison.bytes ? poison.bytes : p;
}

const void* read(const void* p, uint32_t bytes, Space space, uint32_t site) {
  count_patience();  // before the check: check and access are one step
  if (in_arena(p)) count_load_phase();
  return access(p, bytes, Access::kRead, space, site);
}

void write(void* p, uint32_t bytes, Space space, uint32_t site, const void* data) {
  count_patience();
  access(p, bytes, Access::kWrite, space, site, data);
  std::memcpy(p, data, bytes);
}

void* atomic(void* p, uint32_t bytes, Space space, uint32_t site) {
  count_patience();
  access(p, bytes, Access::kAtomic, space, site);
  return p;
}

// The other order, a write after the load, is found at the write by the mark.
void read_only(const void* p, uint32_t bytes, uint32_t site) {
  if (!options.race || !in_arena(p)) return;
  Span target = span(p, bytes, Space::kGlobal, site, false, 1);
  mark(target, kReadOnly);
  for (uint32_t i = 0; i < bytes; i++) {
    const Record& record = record_of(target, i);
    if (record.write_epoch < launch_epoch) continue;
    if (Report* r = new_report("nc-load-of-written-data", site, record.write_site))
      r->message = "ld.global.nc of " + where(target.data + i) + ", which this launch writes";
    return;
  }
}

unsigned char* local(uint32_t offset, uint32_t bytes, uint32_t site) {
  if (offset & (bytes - 1))
    report_and_abort(
        "misaligned", site, kNoSite,
        text("%u-byte access to local+%u, which is not %u-byte aligned", bytes, offset, bytes));
  if (uint64_t{offset} + bytes > local_bytes())
    report_and_abort("out-of-bounds", site, kNoSite,
                     text("%u-byte access past the thread's local memory: local+%u of %u bytes",
                          bytes, offset, local_bytes()));
  return current->local + offset;
}

}  // namespace ptx
