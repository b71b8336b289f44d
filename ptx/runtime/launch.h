// A kernel launch: checks, then block after block.
#pragma once
#include <cstdint>

#include "device.h"

namespace ptx {

// What the last launch was, for its result.
struct Launch {
  const Kernel* kernel;  // null: nothing was launched yet
  Dim3 grid, block;
  uint64_t dynamic_shared;
  double seconds;
};
extern Launch last_launch;

// Runs the kernel over the grid; what it finds is in reports, counts and site_counts.
void launch(const Kernel&, Dim3 grid, Dim3 block, uint64_t dynamic_shared,
            const unsigned char* parameters);

bool in_parameters(const void* p, uint32_t bytes);  // of the running kernel (a tensor map by value)
uint32_t local_bytes();                             // of one thread's local window
const Thread* local_window_owner(const void* p);    // null: p is in no thread's local window

}  // namespace ptx
