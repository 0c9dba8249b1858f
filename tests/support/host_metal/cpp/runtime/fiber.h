// Switching between the stacks of a threadgroup's threads, in one operating system thread.
//
// swapcontext() makes two system calls a switch (235 ns against 7 ns measured), and a simd_sum is
// 32 switches: x86-64 therefore has its own switch, everything else falls back.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && !defined(HM_UCONTEXT)

namespace hm {

struct Fiber {
  void* stack_pointer = nullptr;
};

extern "C" void hm_switch_stack(void** save, void* load);

// Saves what the ABI calls callee-saved, changes stacks, restores the same registers from there.
asm(R"(
  .text
  .globl hm_switch_stack
  .type hm_switch_stack, @function
hm_switch_stack:
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
)");

inline void switch_fiber(Fiber& from, Fiber& to) {
  hm_switch_stack(&from.stack_pointer, to.stack_pointer);
}

// Lays out a stack as hm_switch_stack leaves one: six registers, then the address to return to.
// The word above it stands for main's own return address: it keeps the stack aligned as at a call.
inline void start_fiber(Fiber& fiber, char* low, char* high, void (*main)()) {
  (void)low;
  uintptr_t* top = (uintptr_t*)high;
  *--top = 0;
  *--top = (uintptr_t)main;
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.stack_pointer = top;
}

}  // namespace hm

#else
#include <ucontext.h>

namespace hm {

struct Fiber {
  ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void start_fiber(Fiber& fiber, char* low, char* high, void (*main)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = low;
  fiber.context.uc_stack.ss_size = (size_t)(high - low);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, main, 0);
}

}  // namespace hm

#endif
