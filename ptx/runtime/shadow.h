// The shadow's storage, and the parts of the race check that need it.
#pragma once
#include "races.h"

namespace ptx {

// Reserves arena, shared window and their shadows once; false: the system gives no address space.
bool reserve_memory();
void shadow_launch_start();
void shadow_block_start();  // the shared window is unwritten, filled with 0xff
void forget_records();      // of all memory
void return_records(size_t offset, size_t bytes);  // of a stretch of the arena, to the system

// Byte `p - arena` is inside the arena; inside the shared window.
bool in_arena(const void* p);
bool in_shared_window(const void* p);
extern uint8_t* arena_flags;
uint8_t* flags_of_shared(size_t offset);
// One per 4096 bytes of the arena: something in it was accessed in this launch.
extern uint8_t* arena_pages_seen;
constexpr size_t kPageBytes = 4096;

// One record against one access, then the access is recorded. `stored`: the bytes of a plain store.
void check_race(Record&, Access, uint32_t site, const unsigned char* p, uint32_t bytes,
                const void* stored, bool shared);
// A record that is a copy of another gets a table of readers of its own.
void copy_read_table(Record&);
extern bool racing_read;  // set when the access being checked reads what another thread may write

// Under poison_races: which reads of the former run raced with a later write.
void remember_raced_read(const unsigned char* p, uint32_t bytes, uint32_t read_site);
bool was_raced(const unsigned char* p, uint32_t bytes, uint32_t site);

}  // namespace ptx
