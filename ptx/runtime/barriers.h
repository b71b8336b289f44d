// Hooks of the block barriers and of the warp meetings.
#pragma once
#include "scheduler.h"

namespace ptx {

void barriers_block_start();
void barriers_thread_exit();  // those who wait for every live thread may be complete now
void meetings_block_start();
void meetings_thread_exit(const Fiber&);  // nobody may be waiting for this thread

}  // namespace ptx
