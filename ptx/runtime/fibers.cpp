// Fibers: a stack per CUDA thread and a hand-written switch, because ucontext's makes a system call
// each time, and a matrix instruction alone takes 32 switches.
#include "fibers.h"

#include <sys/mman.h>

#ifndef __x86_64__
#error "the PTX executor's context switch is written for x86-64 Linux"
#endif

namespace ptx {

// The System V ABI leaves rbx, rbp and r12 to r15 to the callee; all else is saved by the caller.
// Kernels never change the floating-point control words, so those stay as they are.
asm(R"(
.text
.globl ptx_switch_stack
.type ptx_switch_stack,@function
ptx_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptx_switch_stack,.-ptx_switch_stack
)");

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr int kSavedRegisters = 6;
unsigned char* stacks = nullptr;

}  // namespace

Fiber fibers[kMaxThreads];

bool reserve_stacks() {
  if (stacks) return true;
  void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  stacks = static_cast<unsigned char*>(p);
  for (size_t i = 0; i < kMaxThreads; i++)  // an overflowing stack must not reach its neighbour
    mprotect(stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  return true;
}

void prepare_stack(Fiber& fiber, void (*entry)()) {
  // Staggered, so that equal frames of the 32 lanes do not fall into the same cache sets.
  size_t stagger = 64 + (fiber.linear % 64) * 192;
  uintptr_t top = reinterpret_cast<uintptr_t>(stacks + (fiber.linear + 1) * kStackBytes) - stagger;
  void** sp = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--sp = nullptr;  // entry's return address: keeps the stack 16-byte aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

}  // namespace ptx
