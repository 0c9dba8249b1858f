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

// What a fault is placed by: a line of kernel text or, where only an instruction is known, its
// address, which Python looks up in the debug lines.
struct Origin {
  Site site = {"", 0};
  uintptr_t pc = 0;

  Origin(Site given) : site(given) {}
  Origin(uintptr_t given) : pc(given) {}
};
[[noreturn]] void fault_at(Origin origin, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace hm
