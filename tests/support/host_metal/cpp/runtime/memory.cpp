// Address space is laid out in slots of 4 GiB, one per buffer, threadgroup variable, and one for
// all stacks: an address tells its region by one division, and an index that runs away by less
// than 4 GiB is still named by the buffer that it left.
#include "memory.h"

#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include "fault.h"
#include "order.h"

extern "C" char __executable_start, _end;  // set by the linker

namespace hm {

Region buffers[MAX_BUFFERS];
Region variables[MAX_VARIABLES];
unsigned current_thread;

static constexpr uint64_t SLOT = 1ull << 32;
static constexpr uint64_t PAGE = 4096;
static constexpr unsigned STACKS = MAX_BUFFERS + MAX_VARIABLES;
static constexpr unsigned SLOTS = STACKS + 1;
static constexpr int POISON = 0xff;  // a NaN in every float type

static uintptr_t arena;
static MemoryLimits limits;
static uint64_t variable_bytes;

unsigned thread_of_operation(unsigned simdgroup) {
  static unsigned operations;
  operations = operations % (~0u / MAX_THREADS - 1) + 1;
  return operations * MAX_THREADS + simdgroup * SIMD_WIDTH;
}

// ---------------------------------------------------------------- layout

static void* map(uintptr_t at, uint64_t bytes, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = mmap((void*)at, bytes, protection, flags, -1, 0);
  if (memory == MAP_FAILED) {
    perror("host_metal: mmap");
    _exit(2);
  }
  return memory;
}

void reserve_memory(MemoryLimits given, unsigned threads) {
  limits = given;
  uintptr_t raw = (uintptr_t)map(0, (SLOTS + 1) * SLOT, PROT_NONE);
  arena = (raw + SLOT - 1) & ~(SLOT - 1);
  uintptr_t stacks = arena + STACKS * SLOT;
  map(stacks, threads * STACK_BYTES, PROT_READ | PROT_WRITE);
  for (unsigned t = 0; t < threads; t++)  // each overflow hits a guard page
    mprotect((void*)(stacks + t * STACK_BYTES), PAGE, PROT_NONE);
}

char* stack_of(unsigned thread) {
  return (char*)(arena + STACKS * SLOT + thread * STACK_BYTES + PAGE);
}

// Buffers start on 16 bytes, as MLX's allocations do. A view into one keeps only the alignment of
// its elements, which is what `misalign` stands for.
static uintptr_t place(unsigned slot, uint64_t bytes, unsigned align) {
  uintptr_t page = arena + slot * SLOT + 16 * PAGE;
  uint64_t mapped = (bytes + 2 * 16 + PAGE - 1) & ~(PAGE - 1);
  map(page, mapped, PROT_READ | PROT_WRITE);
  memset((void*)page, POISON, mapped);
  return page + (limits.misalign ? align : 16);
}

static void add_region(Region& region, Region made) {
  uint64_t cells = (made.bytes + made.granule - 1) / made.granule + 1;
  if (made.space != Space::input)
    made.cells = (Cell*)map(0, cells * sizeof(Cell), PROT_READ | PROT_WRITE);
  made.was_loaded = (uint8_t*)map(0, cells, PROT_READ | PROT_WRITE);
  region = made;
}

void* add_buffer(unsigned index, const char* name, Space space, uint64_t bytes, unsigned item) {
  Region made;
  made.base = place(index, bytes, item);
  made.bytes = bytes;
  made.granule = item;
  made.space = space;
  made.name = name;
  add_region(buffers[index], made);
  return (void*)made.base;
}

void forget_variables() {
  for (Region& variable : variables)
    if (variable.base) memset((void*)variable.base, POISON, variable.bytes);
}

uint64_t threadgroup_bytes_used() { return variable_bytes; }

// ---------------------------------------------------------------- accesses

Where describe(const Region& region, uintptr_t address) {
  static const char* const KIND[] = {"input", "output", "threadgroup variable"};
  long offset = (long)(address - region.base);
  Where where;
  snprintf(where.text, sizeof where.text, "%s '%s'[%ld] (byte %ld of %lu)",
           KIND[(int)region.space], region.name, offset / (long)region.granule, offset,
           (unsigned long)region.bytes);
  return where;
}

// The region that an address belongs to; null for memory that needs no check (the thread's own
// stack, constants of the program).
static Region* find_region(uintptr_t address, unsigned bytes, const char* kind, Origin origin) {
  uint64_t offset = address - arena;
  if (offset >= SLOTS * SLOT) {
    if (address >= (uintptr_t)&__executable_start && address < (uintptr_t)&_end) return nullptr;
    fault_at(origin, "out-of-bounds", "%s of %u bytes at %#lx, which is in no buffer", kind, bytes,
             (unsigned long)address);
  }
  unsigned slot = (unsigned)(offset / SLOT);
  if (slot == STACKS) {
    unsigned owner = (unsigned)(offset % SLOT / STACK_BYTES);
    if (owner == current_thread) return nullptr;
    fault_at(origin, "out-of-bounds", "%s of %u bytes in the private memory of thread %u", kind, bytes,
             owner);
  }
  Region& region = slot < MAX_BUFFERS ? buffers[slot] : variables[slot - MAX_BUFFERS];
  if (address < region.base || address + bytes > region.base + region.bytes)
    fault_at(origin, "out-of-bounds", "%s of %u bytes at %s", kind, bytes,
             describe(region, address).text);
  return &region;
}

static void count_load(Region& region, uint64_t first, uint64_t last, unsigned bytes) {
  region.loaded += bytes;
  for (uint64_t i = first; i <= last; i++)
    if (!region.was_loaded[i]) {
      region.was_loaded[i] = 1;
      region.distinct += region.granule;
    }
}

void check_access(uintptr_t address, unsigned bytes, bool write, Origin origin) {
  Region* found = find_region(address, bytes, write ? "write" : "read", origin);
  if (!found) return;
  Region& region = *found;
  unsigned shift = __builtin_ctz(region.granule);  // this is the hot path: no divisions
  uint64_t first = (address - region.base) >> shift;
  uint64_t last = (address + bytes - 1 - region.base) >> shift;
  if (write)
    region.stored += bytes;
  else
    count_load(region, first, last, bytes);
  if (region.space == Space::input) {
    if (write) fault_at(origin, "write-to-input", "write to %s", describe(region, address).text);
    return;  // nobody writes inputs, so there is no order to keep
  }
  for (uint64_t i = first; i <= last; i++) {
    if (write)
      check_write(region, i, origin);
    else
      check_read(region, i, origin);
  }
}

void fault_page(uintptr_t address, Origin origin) {
  uint64_t offset = address - arena;
  if (offset < SLOTS * SLOT && offset / SLOT == STACKS)
    fault_at(origin, "out-of-bounds", "the private memory of thread %lu overflows",
             (unsigned long)(offset % SLOT / STACK_BYTES));
  fault_at(origin, "crash", "invalid memory access at %#lx", (unsigned long)address);
}

}  // namespace hm

// ---------------------------------------------------------------- threadgroup variables

using namespace hm;

// Called where the declaration stands, by every thread; the first call makes the variable.
extern "C" void* hm_threadgroup_variable(unsigned id, const char* name, unsigned long bytes,
                                         unsigned long align, unsigned granule, Site site) {
  if (id >= MAX_VARIABLES)
    fault_at(site, "limit", "more than %u threadgroup variables", MAX_VARIABLES);
  Region& variable = variables[id];
  if (variable.base) return (void*)variable.base;
  variable_bytes += (bytes + 15) & ~15ul;
  if (variable_bytes > limits.threadgroup_bytes)
    fault_at(site, "threadgroup-memory", "'%s' brings threadgroup memory to %lu bytes, the limit "
             "is %lu", name, (unsigned long)variable_bytes,
             (unsigned long)limits.threadgroup_bytes);
  Region made;
  made.base = place(MAX_BUFFERS + id, bytes, (unsigned)align);
  made.bytes = bytes;
  made.granule = granule;
  made.space = Space::threadgroup;
  made.name = name;
  add_region(variable, made);
  return (void*)made.base;
}
