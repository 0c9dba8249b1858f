// What the lanes of a simdgroup do together with an 8x8 fragment. The last lane to arrive does it
// for all; every lane is there, so a whole simdgroup takes part or none of it.
#include <cstring>

#include "abi.h"
#include "fault.h"
#include "memory.h"

namespace hm {

static constexpr unsigned N = 8;

static void expect_all_lanes(const Together& call, const Exchange& exchange) {
  if (exchange.size < SIMD_WIDTH)
    fault_at(call.site, "simd-absent-lane", "%s needs %u lanes, the simdgroup has %u",
             call.operation, SIMD_WIDTH, exchange.size);
}

template <class Operand>
static Operand operand_of(const Exchange& exchange, unsigned lane) {
  Operand operand;
  memcpy(&operand, exchange.lane[lane], sizeof operand);
  return operand;
}

static void expect_same(const FragmentAccess& first, const FragmentAccess& other, unsigned lane) {
  if (other.memory != first.memory || other.row != first.row ||
      other.transpose != first.transpose)
    fault_at(first.site, "simd-divergence", "%s: lane %u names other memory than lane 0",
             first.operation, lane);
}

// Rows of memory, columns of the fragment where it is transposed.
static void check_memory(const FragmentAccess& access) {
  uintptr_t at = (uintptr_t)access.memory;
  if (at % access.item)
    fault_at(access.site, "misaligned", "%s at an address that is not a multiple of %u",
             access.operation, access.item);
  unsigned thread = current_thread;
  current_thread = thread_of_operation(simdgroup_of(thread));
  for (unsigned i = 0; i < N; i++)
    check_access(at + i * access.row * access.item, N * access.item, access.store, access.site);
  current_thread = thread;
}

static char* address_of(const FragmentAccess& access, unsigned row, unsigned column) {
  unsigned i = access.transpose ? column : row, j = access.transpose ? row : column;
  return (char*)access.memory + (i * access.row + j) * access.item;
}

}  // namespace hm

using namespace hm;

void hm_access_fragment(Exchange& exchange) {
  FragmentAccess first = operand_of<FragmentAccess>(exchange, 0);
  expect_all_lanes(first, exchange);
  for (unsigned lane = 1; lane < SIMD_WIDTH; lane++)
    expect_same(first, operand_of<FragmentAccess>(exchange, lane), lane);
  check_memory(first);
  for (unsigned lane = 0; lane < SIMD_WIDTH; lane++) {
    FragmentAccess own = operand_of<FragmentAccess>(exchange, lane);
    FragmentPlace place = fragment_place(lane);
    for (unsigned e = 0; e < 2; e++) {
      char* at = address_of(own, place.row, place.column + e);
      if (own.store)
        memcpy(at, own.elements[e], own.item);
      else
        memcpy(own.elements[e], at, own.item);
    }
    memcpy(exchange.lane[lane], &own, sizeof own);
  }
}

// In float, in the order of the inner dimension: the GPU's own order is not documented.
void hm_multiply_fragments(Exchange& exchange) {
  expect_all_lanes(operand_of<FragmentProduct>(exchange, 0), exchange);
  float a[N][N], b[N][N], c[N][N];
  for (unsigned lane = 0; lane < SIMD_WIDTH; lane++) {
    FragmentProduct own = operand_of<FragmentProduct>(exchange, lane);
    FragmentPlace place = fragment_place(lane);
    for (unsigned e = 0; e < 2; e++) {
      a[place.row][place.column + e] = own.a[e];
      b[place.row][place.column + e] = own.b[e];
      c[place.row][place.column + e] = own.c[e];
    }
  }
  for (unsigned k = 0; k < N; k++)
    for (unsigned row = 0; row < N; row++)
      for (unsigned column = 0; column < N; column++)
        c[row][column] += a[row][k] * b[k][column];
  for (unsigned lane = 0; lane < SIMD_WIDTH; lane++) {
    FragmentProduct own = operand_of<FragmentProduct>(exchange, lane);
    FragmentPlace place = fragment_place(lane);
    for (unsigned e = 0; e < 2; e++) own.c[e] = c[place.row][place.column + e];
    memcpy(exchange.lane[lane], &own, sizeof own);
  }
}
