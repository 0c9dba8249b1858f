// Which access comes before which: barriers, and the conflicts they fail to order.
#pragma once
#include <cstdint>

#include "memory.h"

namespace hm {

// An access: by which threadgroup and thread, after how many barriers of the threadgroup (`epoch`)
// and of the thread's simdgroup (`step`).
struct Stamp {
  uint32_t group, epoch, step, thread;
};

// Shadow of one granule: the last write, and the reads since. Of several reads one stamp is kept,
// with what is needed to tell whether a later write can conflict with any of them.
struct Cell {
  Stamp write, read;
  bool many_threads, many_simdgroups, many_groups;
};

void begin_threadgroup(unsigned index);
void order_threadgroup(unsigned flags);
void order_simdgroup(unsigned simdgroup, unsigned flags);

void check_read(const Region& region, uint64_t cell, Origin origin);
void check_write(const Region& region, uint64_t cell, Origin origin);

void mark_written(Region& region);  // before the launch, by init_value
uint64_t count_unwritten(const Region& region, uint64_t& first);

}  // namespace hm
