// The arena: first fit between guard zones; freed space is used again.
#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "counters.h"
#include "shadow.h"
#include "state.h"

namespace ptx {

namespace {

constexpr size_t kGuard = 1 << 20;         // more than a tile that runs past its tensor reaches
constexpr size_t kReturned = 1 << 20;      // freed blocks of this size go back to the system
std::map<size_t, Allocation> allocations;  // by offset

// The lowest offset with `bytes` free behind it and guards on both sides; kArenaBytes: none.
size_t find_gap(size_t bytes, size_t align) {
  auto aligned = [align](size_t at) { return (at + align - 1) / align * align; };
  size_t at = aligned(kGuard);
  for (const auto& [offset, allocation] : allocations) {
    if (at + bytes + kGuard <= offset) return at;
    at = aligned(offset + allocation.bytes + kGuard);
  }
  return at + bytes + kGuard <= kArenaBytes ? at : kArenaBytes;
}

void release_entry(const Allocation& allocation) {
  std::memset(arena_flags + allocation.offset, 0, allocation.bytes);
  // Records need no reset: they are of former launches, and so say nothing in the next.
  if (allocation.bytes < kReturned) return;
  size_t begin = (allocation.offset + kPageBytes - 1) / kPageBytes * kPageBytes;
  size_t end = (allocation.offset + allocation.bytes) / kPageBytes * kPageBytes;
  madvise(arena + begin, end - begin, MADV_DONTNEED);
  return_records(begin, end - begin);
}

}  // namespace

void* allocate(size_t bytes, const char* name, size_t align, bool written) {
  if (!reserve_memory() || !align || bytes > kArenaBytes) return nullptr;
  bytes = std::max<size_t>(bytes, 1);
  size_t offset = find_gap(bytes, align);
  if (offset == kArenaBytes) return nullptr;
  allocations[offset] = Allocation{offset, bytes, name ? name : "", {0, 0}};
  std::memset(arena_flags + offset, written ? kAllocated | kWritten : kAllocated, bytes);
  std::memset(arena + offset, written ? 0 : 0xff, bytes);  // 0xff...: a NaN in every float format
  return arena + offset;
}

bool release_allocation(void* p) {
  if (!in_arena(p)) return false;
  auto it = allocations.find(static_cast<unsigned char*>(p) - arena);
  if (it == allocations.end()) return false;
  release_entry(it->second);
  allocations.erase(it);
  return true;
}

void release_all_allocations() {
  for (const auto& entry : allocations) release_entry(entry.second);
  allocations.clear();
}

Allocation* allocation_at(size_t offset, bool nearest) {
  auto after = allocations.upper_bound(offset);
  Allocation* before = after == allocations.begin() ? nullptr : &std::prev(after)->second;
  if (before && offset < before->offset + before->bytes) return before;
  if (!nearest) return nullptr;
  if (after == allocations.end()) return before;
  if (!before) return &after->second;
  bool to_next = after->first - offset < offset - (before->offset + before->bytes);
  return to_next ? &after->second : before;
}

std::string where(const void* p) {
  const auto* u = static_cast<const unsigned char*>(p);
  if (in_arena(p)) {
    size_t offset = u - arena;
    const Allocation* near = allocation_at(offset, true);
    if (!near) return "global memory, of which nothing is allocated";
    return text("global '%s'%+lld of %zu bytes", near->name.c_str(),
                static_cast<long long>(offset) - static_cast<long long>(near->offset), near->bytes);
  }
  if (in_shared_window(p))
    return text("shared+%zu of %u bytes", size_t(u - shared_window), total_shared());
  return text("%p (neither global nor shared memory)", p);
}

namespace {

// Counts one sector's flags (those of its bytes that are asked for).
void add_sector(const uint8_t* flags, size_t bytes, uint64_t result[7]) {
  uint64_t read = 0, written = 0;
  for (size_t i = 0; i < bytes; i++) {
    read += flags[i] & kSeenRead;
    written += flags[i] & kSeenWritten;
  }
  result[0] += read / kSeenRead;
  result[1] += written / kSeenWritten;
  result[2] += read != 0;
  result[3] += written != 0;
  result[4] += (read | written) != 0;
}

}  // namespace

void footprint(const void* p, size_t bytes, uint64_t result[7]) {
  std::fill_n(result, 7, 0);
  if (!in_arena(p)) return;
  size_t begin = static_cast<const unsigned char*>(p) - arena;
  size_t end = std::min(begin + bytes, kArenaBytes);
  for (size_t at = begin; at < end;) {
    size_t next = std::min(end, (at / kSector + 1) * kSector);
    if (arena_pages_seen[at / kPageBytes]) add_sector(arena_flags + at, next - at, result);
    at = next;
  }
  if (const Allocation* allocation = allocation_at(begin)) {
    result[5] = allocation->requested_sectors[0];
    result[6] = allocation->requested_sectors[1];
  }
}

// Marks of unfinished copies go too: an aborted launch leaves some.
void arena_launch_start() {
  for (auto& [offset, allocation] : allocations) {
    allocation.requested_sectors[0] = allocation.requested_sectors[1] = 0;
    size_t end = offset + allocation.bytes;
    for (size_t page = offset / kPageBytes; page <= (end - 1) / kPageBytes; page++) {
      if (!arena_pages_seen[page]) continue;
      arena_pages_seen[page] = 0;
      uint8_t* flags = arena_flags + page * kPageBytes;
      for (size_t i = 0; i < kPageBytes; i++) flags[i] &= kAllocated | kWritten;
    }
  }
}

}  // namespace ptx
