// One way out for every mistake the runtime finds: a line for Python, then the end of the process.
#pragma once
#include <cstdint>

#include "abi.h"

namespace hm {

// Whose fault it is: the thread that runs now. Kept by the scheduler.
struct Position {
  int thread = -1;
  unsigned threadgroup[3] = {};
};
extern Position position;

// A fault is placed by kernel text (`site`) or, where only an instruction is known, by its address,
// which Python looks up in the debug lines.
[[noreturn]] void fault_at(Site site, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] void fault_pc(uintptr_t pc, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace hm
