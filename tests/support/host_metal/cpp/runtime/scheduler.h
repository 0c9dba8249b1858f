// The threads of one threadgroup as fibers, and the places where they wait for each other.
#pragma once
#include <cstdint>

namespace hm {

struct Launch {
  unsigned grid[3];         // in threads, as MLX counts it
  unsigned threadgroup[3];  // the full size; the last threadgroups of a ragged grid are smaller
  uint64_t seed;            // 0: threads and threadgroups in order; else a shuffled schedule
  void* buffers[31];
};

// Rendezvous so far: barriers per threadgroup or simdgroup that met there, simd operations per
// simdgroup, under their names.
struct Counts {
  struct Operation {
    const char* name;
    uint64_t count;
  };
  uint64_t threadgroups, threads, threadgroup_barriers, simdgroup_barriers;
  Operation operations[64];
};
extern Counts counts;

void run_launch(const Launch& launch);

// Where the running thread last waited, for the report of a loop without end.
int last_line();

}  // namespace hm
