// What a compiled kernel and the runtime know of each other.
//
// The kernel's translation unit includes this and nothing of the C++ library: only names that Metal
// has may be visible to kernel text.
#pragma once

// Runs unchecked: the runtime's own bookkeeping must not be reported as the kernel's accesses.
#define HM_UNCHECKED __attribute__((noinline, no_sanitize("thread", "undefined")))

// Default arguments that name the line of kernel text which calls the function.
#define HM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HM_HERE hm::Site { file, line }

namespace hm {

constexpr unsigned SIMD_WIDTH = 32;
constexpr unsigned MAX_THREADS = 1024;  // of a threadgroup

// Bits of metal::mem_flags.
constexpr unsigned FLAG_DEVICE = 1;
constexpr unsigned FLAG_THREADGROUP = 2;

struct Site {
  const char* file;
  int line;
};

// Where the lanes of a simdgroup meet: each leaves its operand; the last one to arrive runs a
// Combine, which turns the operands into the lanes' results in place.
struct Exchange {
  alignas(64) unsigned char lane[SIMD_WIDTH][64];
  unsigned size;  // lanes in this simdgroup; fewer than 32 only at the end of a threadgroup
};
using Combine = void (*)(Exchange&);

// The operands of operations on simdgroup_matrix, in a lane: two elements of each 8x8 fragment.
struct Together {
  const char* operation;
  Site site;
};
struct FragmentAccess : Together {
  const void* memory;
  unsigned long row;  // elements from one row of memory to the next
  unsigned item;      // bytes of an element
  bool store, transpose;
  unsigned char elements[2][4];
};
struct FragmentProduct : Together {
  float a[2], b[2], c[2];  // c becomes a * b + c
};

// Where a lane's two elements lie: MLX relies on this map, which Metal does not document.
struct FragmentPlace {
  unsigned row, column;  // and the column after it
};
constexpr FragmentPlace fragment_place(unsigned lane) {
  unsigned quad = lane / 4;
  return {(quad & 4) + lane / 2 % 4, (quad & 2) * 2 + lane % 2 * 2};
}

// Every attribute that MLX can add to a kernel's parameters.
struct Attributes {
  unsigned thread_position_in_grid[3], thread_position_in_threadgroup[3];
  unsigned threadgroup_position_in_grid[3], threadgroups_per_grid[3], threads_per_grid[3];
  unsigned threads_per_threadgroup[3], dispatch_threads_per_threadgroup[3];
  unsigned grid_origin[3], grid_size[3];
  unsigned thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup;
  unsigned simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup, threads_per_simdgroup, thread_execution_width;
  unsigned quadgroup_index_in_threadgroup, quadgroups_per_threadgroup;
  unsigned dispatch_quadgroups_per_threadgroup;
};

}  // namespace hm

extern "C" {
// The kernel, called once per thread. Defined by the generated translation unit.
void hm_kernel(void* const* buffers, const hm::Attributes& attributes);

// Defined by the runtime. `operation` is a string literal: the name under which it is counted.
hm::Exchange& hm_simd(const char* operation, hm::Site site, const void* operand, unsigned bytes,
                      hm::Combine combine);
void hm_access_fragment(hm::Exchange& exchange);    // a Combine of FragmentAccess
void hm_multiply_fragments(hm::Exchange& exchange);  // a Combine of FragmentProduct
void hm_simdgroup_barrier(unsigned flags, hm::Site site);
void hm_threadgroup_barrier(unsigned flags, hm::Site site);
unsigned hm_lane();
void hm_absent_lane(const char* operation, hm::Site site, unsigned lane);
void* hm_threadgroup_variable(unsigned id, const char* name, unsigned long bytes,
                              unsigned long align, unsigned granule, hm::Site site);
}
