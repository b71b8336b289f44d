// Stacks of the fibers and the switch between them.
#pragma once
#include "scheduler.h"

namespace ptx {

// Saves the callee-saved registers and the stack pointer, and goes on where `load` was saved.
extern "C" void ptx_switch_stack(void** save, void* load);

// Reserves the stacks once; false: the system gives no address space.
bool reserve_stacks();
// The fiber will begin in `entry` when it is switched to.
void prepare_stack(Fiber&, void (*entry)());

}  // namespace ptx
