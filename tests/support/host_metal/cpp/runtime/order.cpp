// Two accesses to one granule conflict if one of them writes, two threads make them, and nothing
// orders them. Within a threadgroup a threadgroup_barrier orders all that came before it, a
// simdgroup_barrier what its own simdgroup did before it, each only for the memory that its flags
// name. Nothing orders two threadgroups.
#include "order.h"

#include <cstdio>
#include <cstring>

#include "fault.h"

namespace hm {

static constexpr uint32_t NOBODY = 0;  // no access yet; threadgroups count from 1
static constexpr uint32_t PREFILLED = ~0u;

enum Memory { THREADGROUP_MEMORY, DEVICE_MEMORY };

// Barriers so far, per kind of memory.
static uint32_t epoch[2];
static uint32_t step[MAX_THREADS / SIMD_WIDTH][2];
static uint32_t group;

void begin_threadgroup(unsigned index) {
  group = index + 1;
  memset(epoch, 0, sizeof epoch);
  memset(step, 0, sizeof step);
}

void order_threadgroup(unsigned flags) {
  if (flags & FLAG_THREADGROUP) epoch[THREADGROUP_MEMORY]++;
  if (flags & FLAG_DEVICE) epoch[DEVICE_MEMORY]++;
}

void order_simdgroup(unsigned simdgroup, unsigned flags) {
  if (flags & FLAG_THREADGROUP) step[simdgroup][THREADGROUP_MEMORY]++;
  if (flags & FLAG_DEVICE) step[simdgroup][DEVICE_MEMORY]++;
}

static Memory memory_of(const Region& region) {
  return region.space == Space::threadgroup ? THREADGROUP_MEMORY : DEVICE_MEMORY;
}

static Stamp stamp_now(Memory memory) {
  unsigned mine = simdgroup_of(current_thread);
  return Stamp{group, epoch[memory], step[mine][memory], current_thread};
}

// Is `past`, an access by this threadgroup, ordered before the access that is made now?
static bool ordered(const Stamp& past, const Stamp& now) {
  if (past.thread == now.thread || past.epoch != now.epoch) return true;
  return simdgroup_of(past.thread) == simdgroup_of(now.thread) && past.step != now.step;
}

// A thread in words.
struct Who {
  char text[48];
};
static Who describe_thread(unsigned thread) {
  Who who;
  unsigned simdgroup = simdgroup_of(thread);
  if (thread < MAX_THREADS)
    snprintf(who.text, sizeof who.text, "thread %u (simdgroup %u)", thread, simdgroup);
  else
    snprintf(who.text, sizeof who.text, "simdgroup %u together", simdgroup);
  return who;
}

[[noreturn]] static void fault_race(const Region& region, uint64_t cell, bool write,
                                    const Stamp& past, const char* past_kind, Origin origin) {
  const char* kind = write ? "write" : "read";
  Where where = describe(region, region.base + cell * region.granule);
  if (past.group != group)
    fault_at(origin, "race", "%s of %s by threadgroup %u after a %s by threadgroup %u: nothing "
             "orders threadgroups", kind, where.text, group - 1, past_kind, past.group - 1);
  fault_at(origin, "race", "%s of %s by %s after a %s by %s, with no barrier for that memory "
           "between", kind, where.text, describe_thread(current_thread).text, past_kind,
           describe_thread(past.thread).text);
}

// Threadgroup memory holds garbage again in each threadgroup.
static bool is_written(const Region& region, const Cell& cell) {
  if (region.space == Space::threadgroup) return cell.write.group == group;
  return cell.write.group != NOBODY;
}

static void check_after_write(const Region& region, uint64_t index, bool write, const Stamp& now,
                              Origin origin) {
  const Cell& cell = region.cells[index];
  const Stamp& past = cell.write;
  if (!is_written(region, cell) || past.group == PREFILLED) return;
  if (past.group != group || !ordered(past, now))
    fault_race(region, index, write, past, "write", origin);
}

static void remember_read(Cell& cell, const Stamp& now) {
  const Stamp& past = cell.read;
  if (past.group == group && past.epoch == now.epoch) {
    if (simdgroup_of(past.thread) != simdgroup_of(now.thread))
      cell.many_simdgroups = true;
    else if (past.step != now.step)
      cell.many_threads = false;  // a simdgroup_barrier has ordered the earlier readers
    else if (past.thread != now.thread)
      cell.many_threads = true;
  } else {
    if (past.group != NOBODY && past.group != group) cell.many_groups = true;
    cell.many_threads = cell.many_simdgroups = false;
  }
  cell.read = now;
}

void check_read(const Region& region, uint64_t index, Origin origin) {
  Cell& cell = region.cells[index];
  if (!is_written(region, cell))
    fault_at(origin, "uninitialised", "read of %s, which nobody has written",
             describe(region, region.base + index * region.granule).text);
  Stamp now = stamp_now(memory_of(region));
  check_after_write(region, index, false, now, origin);
  remember_read(cell, now);
}

// Does a write made now conflict with a read since the last write?
static bool conflicts_with_reads(const Region& region, const Cell& cell, const Stamp& now) {
  const Stamp& past = cell.read;
  if (past.group == NOBODY) return false;
  if (past.group != group || cell.many_groups) return region.space == Space::output;
  if (past.epoch != now.epoch) return false;
  if (cell.many_simdgroups) return true;
  return (cell.many_threads && past.step == now.step) || !ordered(past, now);
}

void check_write(const Region& region, uint64_t index, Origin origin) {
  Cell& cell = region.cells[index];
  Stamp now = stamp_now(memory_of(region));
  check_after_write(region, index, true, now, origin);
  if (conflicts_with_reads(region, cell, now))
    fault_race(region, index, true, cell.read, "read", origin);
  cell = Cell{now, Stamp{}, false, false, false};
}

void mark_written(Region& region) {
  for (uint64_t i = 0; i < region.bytes / region.granule; i++)
    region.cells[i].write.group = PREFILLED;
}

uint64_t count_unwritten(const Region& region, uint64_t& first) {
  uint64_t missing = 0;
  for (uint64_t i = region.bytes / region.granule; i-- > 0;)
    if (region.cells[i].write.group == NOBODY) {
      missing++;
      first = i;
    }
  return missing;
}

}  // namespace hm
