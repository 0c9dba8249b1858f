// Positions and sizes that a thread sees.
#pragma once
#include <cstdint>

#include "abi.h"
#include "scheduler.h"

namespace hm {

struct Triple {
  unsigned v[3];
};

// The place of a linear index, x fastest.
Triple unravel(uint64_t index, const unsigned extent[3]);

// How many groups of `width` hold `count`, the last one perhaps partly filled.
unsigned groups_of(unsigned count, unsigned width);

// For thread `id` of a threadgroup of `size` threads.
Attributes attributes_of(const Launch& launch, const Triple& group, const unsigned size[3],
                         unsigned id);

}  // namespace hm
