#include "attributes.h"

namespace hm {

Triple unravel(uint64_t index, const unsigned extent[3]) {
  return {{(unsigned)(index % extent[0]), (unsigned)(index / extent[0] % extent[1]),
           (unsigned)(index / extent[0] / extent[1])}};
}

unsigned groups_of(unsigned count, unsigned width) { return (count + width - 1) / width; }

Attributes attributes_of(const Launch& launch, const Triple& group, const unsigned size[3],
                         unsigned id) {
  Attributes a = {};
  Triple place = unravel(id, size);
  const unsigned *grid = launch.grid, *full = launch.threadgroup;
  for (int i = 0; i < 3; i++) {
    a.thread_position_in_threadgroup[i] = place.v[i];
    a.threadgroup_position_in_grid[i] = group.v[i];
    a.thread_position_in_grid[i] = group.v[i] * full[i] + place.v[i];
    a.threads_per_threadgroup[i] = size[i];
    a.dispatch_threads_per_threadgroup[i] = full[i];
    a.threads_per_grid[i] = a.grid_size[i] = grid[i];
    a.threadgroups_per_grid[i] = groups_of(grid[i], full[i]);
  }
  unsigned threads = size[0] * size[1] * size[2], dispatched = full[0] * full[1] * full[2];
  a.thread_index_in_threadgroup = id;
  a.thread_index_in_simdgroup = id % SIMD_WIDTH;
  a.thread_index_in_quadgroup = id % 4;
  a.simdgroup_index_in_threadgroup = id / SIMD_WIDTH;
  a.quadgroup_index_in_threadgroup = id / 4;
  a.simdgroups_per_threadgroup = groups_of(threads, SIMD_WIDTH);
  a.quadgroups_per_threadgroup = groups_of(threads, 4);
  a.dispatch_simdgroups_per_threadgroup = groups_of(dispatched, SIMD_WIDTH);
  a.dispatch_quadgroups_per_threadgroup = groups_of(dispatched, 4);
  a.threads_per_simdgroup = a.thread_execution_width = SIMD_WIDTH;
  return a;
}

}  // namespace hm
