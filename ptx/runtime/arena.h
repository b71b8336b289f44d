// Global memory: allocations in one arena, with guard zones between them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ptx {

struct Allocation {
  size_t offset, bytes;  // in the arena
  std::string name;
  uint64_t requested_sectors[2];  // of the last launch: read, written; summed over requests
};

// Null if the arena is full or could not be reserved.
void* allocate(size_t bytes, const char* name, size_t align, bool written);
bool release_allocation(void* p);  // false: p is not the start of an allocation
void release_all_allocations();
// The allocation a byte of the arena lies in or, with nearest, is closest to; null: none.
Allocation* allocation_at(size_t offset, bool nearest = false);

// The footprint of the last launch, as ptx_footprint in api.cpp describes it.
void footprint(const void* p, size_t bytes, uint64_t result[7]);
void arena_launch_start();  // forget the former launch's footprint

}  // namespace ptx
