// Device and threadgroup memory: where it lies, what lies next to it, how many bytes move.
#pragma once
#include <cstdint>

#include "abi.h"
#include "fault.h"

namespace hm {

constexpr unsigned MAX_BUFFERS = 31;    // what Metal lets a kernel bind
constexpr unsigned MAX_VARIABLES = 24;  // threadgroup variables of one kernel
constexpr uintptr_t STACK_BYTES = 64 * 1024;

enum class Space : uint8_t { input, output, threadgroup };

struct Cell;  // see order.h

// A buffer or a threadgroup variable. Bytes are counted per access, as each thread asks for them;
// `distinct` counts every byte that was loaded once, however often.
struct Region {
  uintptr_t base = 0;
  uint64_t bytes = 0;
  unsigned granule = 1;  // bytes that one shadow cell stands for, a power of two
  Space space = Space::input;
  const char* name = "";
  Cell* cells = nullptr;
  uint8_t* was_loaded = nullptr;
  uint64_t loaded = 0, stored = 0, distinct = 0;
};

// An address in words: the region's kind and name, the element, the byte.
struct Where {
  char text[160];
};
Where describe(const Region& region, uintptr_t address);

extern Region buffers[MAX_BUFFERS];
extern Region variables[MAX_VARIABLES];

// Who accesses memory: the index of the thread in its threadgroup. What a simdgroup does together
// (simdgroup_load, simdgroup_store) is done by a thread of its own each time, as Metal does not say
// which lane moves which element: other lanes' accesses to the same memory need a barrier between.
extern unsigned current_thread;
unsigned thread_of_operation(unsigned simdgroup);
inline unsigned simdgroup_of(unsigned thread) { return thread % MAX_THREADS / SIMD_WIDTH; }

struct MemoryLimits {
  uint64_t threadgroup_bytes;
  bool misalign;  // place data at an address that only its element type allows
};

void reserve_memory(MemoryLimits limits, unsigned threads);
void* add_buffer(unsigned index, const char* name, Space space, uint64_t bytes, unsigned item);
void forget_variables();  // a threadgroup finds its memory as garbage, never as its predecessor's
uint64_t threadgroup_bytes_used();
char* stack_of(unsigned thread);  // lowest usable byte of STACK_BYTES less one guard page

void check_access(uintptr_t address, unsigned bytes, bool write, Origin origin);
[[noreturn]] void fault_page(uintptr_t address, Origin origin);

}  // namespace hm
